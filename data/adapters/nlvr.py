"""NLVR and NLVR2: is a sentence true about a drawing, or about two photographs?"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data.adapters.common import (
    Counted,
    Row,
    Skipped,
    need_file,
    need_split,
    one_answer,
    read_json_lines,
    read_rows,
)
from data.faults import Fault
from data.pictures import open_picture

PERMUTATIONS = 6  # pictures of one NLVR example: the orders of its three boxes
GAP = 8  # pixels between two photographs
NLVR2_FILES = {
    "train": "train.json",
    "val": "dev.json",
    "dev": "dev.json",
    "test": "test1.json",
    "test2": "test2.json",
}


def nlvr2(root: Path, split: str = "train") -> Counted:
    """NLVR2: 86,373 sentences to train on, 6,982 to develop with, 6,967 in each public test split.

    Each sample is one sentence; its picture is the two photographs side by side, left first, brought to the height
    of the lower one with a white gap between. The sentence is the sample's `text` and its one question; `label`
    and the answers are `true` or `false`. There is no caption: half of the sentences are false.

    Args:
        root: Holds `train.json`, `dev.json`, `test1.json`, `test2.json` (there or in `data/`) and the pictures as the
            authors hand them out (`images/train/SET/`, `dev/`, `test1/`), or all in one folder.
        split: `train`, `val` (= `dev`), `test` (= test1) or `test2`.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, or a broken file.
    """
    root = Path(root)
    need_split("nlvr2", split, NLVR2_FILES)
    path = need_file(root, NLVR2_FILES[split], what=f"{split} split of NLVR2")
    part = path.stem
    bases = [base for base in (root / "images" / part, root / part, root / "images", root) if base.is_dir()]
    faults: list[Skipped] = []
    rows = []
    for where, identifier, folder, meta in read_examples(path, faults):
        pair = identifier.rsplit("-", 1)[0]
        left, right = (find(bases, folder, f"{pair}-img{side}.png") for side in (0, 1))
        meta["image_id"] = pair
        rows.append(Row(left.name, left, where, (), meta, identifier, partial(beside, right=right)))
    return read_rows(rows, faults, captioned=False)


def nlvr(root: Path, split: str = "train") -> Counted:
    """NLVR: 74,460 / 5,940 / 5,934 drawings with a sentence each, true or false.

    Every example has six pictures, the orders of its three boxes; each is a sample, as results are published. The
    record is that of NLVR2; `image_id` is the example's.

    Args:
        root: Holds `train/train.json` and `train/images/DIRECTORY/train-ID-K.png`, and the same for `dev` and `test`.
        split: `train`, `val` (= `dev`) or `test`.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, or a broken file.
    """
    root = Path(root)
    need_split("nlvr", split, ("train", "val", "dev", "test"))
    part = "dev" if split == "val" else split
    path = need_file(root, f"{part}.json", what=f"{split} split of NLVR")
    bases = [base for base in (path.parent / "images", path.parent) if base.is_dir()]
    faults: list[Skipped] = []
    rows = []
    for where, identifier, folder, meta in read_examples(path, faults):
        meta["image_id"] = identifier
        for order in range(PERMUTATIONS):
            name = f"{part}-{identifier}-{order}.png"
            rows.append(Row(name, find(bases, folder, name), where, (), meta))
    return read_rows(rows, faults, captioned=False)


def read_examples(path: Path, faults: list[Skipped]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Place in the file, identifier, picture folder and record of each good line; bad ones are added to `faults`."""
    for where, row in read_json_lines(path, faults):
        identifier, sentence = row.get("identifier"), row.get("sentence")
        label = str(row.get("label")).lower()  # "True" in NLVR2, "true" in NLVR
        if not (isinstance(identifier, str) and isinstance(sentence, str)) or label not in ("true", "false"):
            faults.append(
                Skipped("bad_row", where, "expected identifier, sentence and a label of true or false")
            )
            continue
        question = {"question_id": identifier, "question": sentence, "answers": one_answer(label)}
        folder = str(row.get("directory", ""))
        yield where, identifier, folder, {"text": sentence, "label": label, "questions": [question]}


def find(bases: list[Path], folder: str, name: str) -> Path:
    """Where a picture lies; where it is expected first when it lies nowhere."""
    places = [base / inner / name for base in bases for inner in ((folder, "") if folder else ("",))]
    try:
        return next((place for place in places if place.is_file()), places[0])
    except OSError:  # a name that is too long for the disk, as reading it will say
        return places[0]


def beside(left: bytes, right: Path) -> bytes:
    """Two pictures as one JPEG: the left one, a white gap, the right one, all of the lower one's height.

    Raises:
        FileNotFoundError: The right one is not there.
        Fault: `undecodable_image` or `too_large_image`.
    """
    try:
        pictures = [open_picture(content).convert("RGB") for content in (left, right.read_bytes())]
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise Fault("undecodable_image", f"{right.name} or its left neighbour: {error}") from error
    height = min(picture.height for picture in pictures)
    scaled = [
        picture.resize(
            (max(round(picture.width * height / picture.height), 1), height), Image.Resampling.BICUBIC
        )
        for picture in pictures
    ]
    joined = Image.new("RGB", (scaled[0].width + GAP + scaled[1].width, height), "white")
    joined.paste(scaled[0], (0, 0))
    joined.paste(scaled[1], (scaled[0].width + GAP, 0))
    file = io.BytesIO()
    joined.save(file, "JPEG", quality=95)
    return file.getvalue()
