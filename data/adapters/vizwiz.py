"""VizWiz: photographs that blind people took, with their spoken questions, or with captions."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from data.adapters.common import (
    Counted,
    Row,
    Skipped,
    load_json,
    need_file,
    need_folder,
    need_split,
    read_json,
    read_list,
    read_rows,
)
from data.adapters.vqav2 import ANSWERS

SPLITS = ("train", "val", "test")


def samples(root: Path, split: str = "train") -> Counted:
    """VizWiz-VQA (one question per picture, ten answers) or VizWiz-Captions, whichever `root` holds.

    Both have files of the same names; the one of questions is a list, the one of captions an object. A VQA question has
    `answers`, `answer_type` and `answerable` (0 or 1). Captions that the set marks as rejected, or as the ready-made
    sentence about a spoilt picture, are left out.

    Args:
        root: Holds `train.json`, `val.json`, `test.json` (there, in `Annotations/` or in `annotations/`) and the
            folders `train/`, `val/` and `test/`.
        split: VQA: 20,523 / 4,319 / 8,000 questions. Captions: 23,431 / 7,750 / 8,000 pictures. Answers and captions of
            `test` are not public.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, a broken file, or captions of the test split.
    """
    root = Path(root)
    need_split("vizwiz", split, SPLITS)
    path = need_file(root, f"{split}.json", what=f"{split} annotations of VizWiz")
    pictures = need_folder(root, split)
    if isinstance(load_json(path), dict):
        return captioned(path, pictures)
    questions: list[Row] = []
    faults: list[Skipped] = []
    for number, row in enumerate(read_list(path, "questions")):
        where = f"{path.name}[{number}]"
        name, question = row.get("image"), row.get("question")
        if not (isinstance(name, str) and isinstance(question, str)):
            faults.append(Skipped("bad_row", where, "expected image and question"))
            continue
        entry: dict[str, Any] = {"question_id": Path(name).stem, "question": question}
        if split != "test":
            try:
                entry["answers"] = [str(answer["answer"]) for answer in row["answers"]]
            except (KeyError, TypeError):
                entry["answers"] = []
            if len(entry["answers"]) != ANSWERS:
                faults.append(Skipped("missing_answer", where, f"{name} has no {ANSWERS} answers"))
                continue
        entry |= {key: row[key] for key in ("answer_type", "answerable") if key in row}
        questions.append(Row(name, pictures / name, where, (), {"questions": [entry]}))
    return read_rows(questions, faults, captioned=False)


def captioned(path: Path, pictures: Path) -> Counted:
    """The samples of a file of captions."""
    content = read_json(path, "images")
    if "annotations" not in content:
        raise ValueError(f"{path}: the captions of this split are not public: prepare train or val")
    captions: dict[int, list[str]] = defaultdict(list)
    faults: list[Skipped] = []
    for number, annotation in enumerate(read_json(path, "annotations")["annotations"]):
        text = annotation.get("caption")
        if not isinstance(text, str) or not isinstance(annotation.get("image_id"), int):
            where = f"{path.name}: annotations[{number}]"
            faults.append(Skipped("bad_row", where, "expected an image_id and a caption"))
        elif not annotation.get("is_rejected") and not annotation.get("is_precanned"):
            captions[annotation["image_id"]].append(text)
    rows = []
    for number, image in enumerate(content["images"]):
        where, name = f"{path.name}: images[{number}]", image.get("file_name")
        if not isinstance(name, str) or not isinstance(image.get("id"), int):
            faults.append(Skipped("bad_row", where, "expected an id and a file_name"))
            continue
        rows.append(Row(name, pictures / name, where, captions[image["id"]], {"image_id": image["id"]}))
    return read_rows(rows, faults)
