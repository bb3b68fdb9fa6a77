"""NoCaps: Open Images photographs with ten captions each, many of kinds of things that COCO does not have."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from data.adapters.common import (
    Counted,
    Row,
    Skipped,
    need_file,
    need_folder,
    need_split,
    read_json,
    read_rows,
)


def samples(root: Path, split: str = "val") -> Counted:
    """NoCaps: 4,500 photographs with ten captions each; an evaluation set, there is nothing to train on.

    The JSON has `image_id`, `open_images_id` and `domain` (`in-domain`, `near-domain`, `out-domain`, by which
    results are published).

    Args:
        root: Holds `nocaps_val_4500_captions.json` and the pictures in `validation/`, `val/` or `images/`.
        split: `val`. The captions of the test split are not public.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, or a broken file.
    """
    root = Path(root)
    need_split("nocaps", split, ("val",))
    path = need_file(root, "nocaps_val_4500_captions.json", what="captions of NoCaps")
    pictures = need_folder(root, "validation", "val", "images")
    content = read_json(path, "images", "annotations")
    captions: dict[int, list[str]] = defaultdict(list)
    faults: list[Skipped] = []
    for number, annotation in enumerate(content["annotations"]):
        if isinstance(annotation.get("caption"), str) and isinstance(annotation.get("image_id"), int):
            captions[annotation["image_id"]].append(annotation["caption"])
        else:
            where = f"{path.name}: annotations[{number}]"
            faults.append(Skipped("bad_row", where, "expected an image_id and a caption"))
    rows = []
    for number, image in enumerate(content["images"]):
        where = f"{path.name}: images[{number}]"
        if not (isinstance(image.get("id"), int) and isinstance(image.get("file_name"), str)):
            faults.append(Skipped("bad_row", where, "expected an id and a file_name"))
            continue
        meta = {"image_id": image["id"]}
        meta |= {key: image[key] for key in ("open_images_id", "domain") if key in image}
        name = image["file_name"]
        rows.append(Row(name, pictures / name, where, captions[image["id"]], meta))
    return read_rows(rows, faults)
