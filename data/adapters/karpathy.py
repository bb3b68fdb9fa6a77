"""Karpathy's `dataset_*.json`: the splits that most published retrieval and captioning numbers use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data.adapters.common import Counted, Row, Skipped, read_json, read_rows
from pairstream.errors import nearest


def karpathy_samples(path: Path, split: str, folder: Callable[[str], Path]) -> Counted:
    """Samples of one split of a Karpathy file.

    Args:
        path: `dataset_flickr8k.json`, `dataset_flickr30k.json` or `dataset_coco.json`.
        split: `train`, `val` (or `dev`), `test` or `restval`; several joined by `+`, as in `train+restval`,
            the 113,287 pictures that COCO captioning papers train on.
        folder: From the picture's `filepath` (COCO: `train2014`; Flickr: empty) to the folder that holds it.

    Returns:
        One sample per picture, with its raw sentences as captions.

    Raises:
        ValueError: A broken file, or a split that it does not have.
    """
    images = read_json(path, "images")["images"]
    wanted = {"val" if part == "dev" else part for part in split.split("+")}
    there = {image["split"] for image in images if isinstance(image.get("split"), str)}
    for part in sorted(wanted - there):
        raise ValueError(
            f"{path}: no split {part!r}: it has {', '.join(sorted(there))}{nearest(part, there)}"
        )
    rows: list[Row] = []
    faults: list[Skipped] = []
    for number, image in enumerate(images):
        where, part = f"{path.name}: images[{number}]", image.get("split")
        if isinstance(part, str) and part not in wanted:
            continue
        try:
            name, captions = image["filename"], [sentence["raw"] for sentence in image["sentences"]]
            inside = image.get("filepath", "")
            if not all(isinstance(text, str) for text in (part, inside, name, *captions)):
                raise TypeError("all must be texts")
        except (KeyError, TypeError) as error:
            faults.append(Skipped("bad_row", where, f"expected split, filename and sentences[].raw: {error}"))
            continue
        # `cocoid` is COCO's image id; `imgid` only counts the pictures of this file.
        meta = {"image_id": image["cocoid"]} if "cocoid" in image else {}
        rows.append(Row(name, folder(inside) / name, where, captions, meta))
    return read_rows(rows, faults)
