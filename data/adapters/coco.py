"""COCO captions: photographs with five captions each, by the official files or Karpathy's splits."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path

from data.adapters.common import (
    Counted,
    Row,
    Skipped,
    find_file,
    need_file,
    need_folder,
    read_json,
    read_rows,
)
from data.adapters.karpathy import karpathy_samples

YEARS = ("2017", "2014")


def samples(root: Path, split: str = "train") -> Counted:
    """COCO captions.

    Args:
        root: Holds the picture folders (`train2017/`, `val2014/`, ...) and `captions_train2017.json` and its
            sisters (there or in `annotations/`), or `dataset_coco.json`, or both.
        split: `train2017`, `val2017`, `train2014` or `val2014` by the official files; `train`, `val`, `test`,
            `restval` or `train+restval` by `dataset_coco.json`. Without that file, `train` and `val` mean the
            official ones of the one year that is there.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, both years for a split without a year, or a broken annotation file.
    """
    root = Path(root)
    official = re.fullmatch(r"(train|val)(2014|2017)", split)
    karpathy = find_file(root, "dataset_coco.json")
    if karpathy and not official:
        return karpathy_samples(karpathy, split, cache(lambda folder: need_folder(root, folder or "images")))
    if official:
        return official_samples(root, split)
    if split not in ("train", "val"):
        raise ValueError(
            f"coco has no captions for the split {split!r} in {root}: expected train or val (with a year, as "
            "in train2017, when both are there); test, restval and train+restval need dataset_coco.json"
        )
    names = [f"captions_{split}{year}.json" for year in YEARS]
    there = [name for name in names if find_file(root, name)]
    if len(there) > 1:
        raise ValueError(
            f"{root} holds {' and '.join(there)}: say which with --split {split}2017 or {split}2014"
        )
    found = need_file(root, *names, "dataset_coco.json", what=f"captions of the {split} split")
    return official_samples(root, found.stem.removeprefix("captions_"))


def official_samples(root: Path, split: str) -> Counted:
    path = need_file(root, f"captions_{split}.json", what=f"captions of the {split} split")
    pictures = need_folder(root, split)
    content = read_json(path, "images", "annotations")
    captions: dict[int, list[str]] = defaultdict(list)
    faults: list[Skipped] = []
    names: dict[int, tuple[str, str]] = {}
    for number, image in enumerate(content["images"]):
        where = f"{path.name}: images[{number}]"
        if isinstance(image.get("id"), int) and isinstance(image.get("file_name"), str):
            names[image["id"]] = (image["file_name"], where)
        else:
            faults.append(Skipped("bad_row", where, "expected an id and a file_name"))
    for number, annotation in enumerate(content["annotations"]):
        where = f"{path.name}: annotations[{number}]"
        if not isinstance(annotation.get("caption"), str):
            faults.append(Skipped("bad_row", where, "expected a caption"))
        elif not isinstance(annotation.get("image_id"), int) or annotation["image_id"] not in names:
            faults.append(Skipped("bad_row", where, f"no image has the id {annotation.get('image_id')!r}"))
        else:
            captions[annotation["image_id"]].append(annotation["caption"])
    rows = [
        Row(name, pictures / name, where, captions.get(image_id, ()), {"image_id": image_id})
        for image_id, (name, where) in names.items()
    ]
    return read_rows(rows, faults)
