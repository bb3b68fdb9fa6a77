"""TextVQA: questions that are answered by reading text in the picture."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

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
from data.adapters.vqav2 import ANSWERS

SPLITS = ("train", "val", "test")


def samples(root: Path, split: str = "train") -> Counted:
    """TextVQA, one sample per photograph (of Open Images) with all questions about it and ten answers each.

    Args:
        root: Holds `TextVQA_0.5.1_train.json` and its sisters, `train_images/` (pictures of `train` and `val`) and
            `test_images/`.
        split: `train` (34,602 questions on 21,953 pictures), `val` (5,000 on 3,166) or `test` (5,734 on 3,289; their
            answers are not public).

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, or a broken file.
    """
    root = Path(root)
    need_split("textvqa", split, SPLITS)
    path = need_file(
        root, f"TextVQA_0.5.1_{split}.json", f"TextVQA_0.5_{split}.json", what=f"{split} questions of TextVQA"
    )
    pictures = need_folder(root, "test_images" if split == "test" else "train_images")
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    faults: list[Skipped] = []
    for number, row in enumerate(read_json(path, "data")["data"]):
        where = f"{path.name}: data[{number}]"
        image_id, question_id, question = row.get("image_id"), row.get("question_id"), row.get("question")
        if not (isinstance(image_id, str) and question_id is not None and isinstance(question, str)):
            faults.append(Skipped("bad_row", where, "expected image_id, question_id and question"))
            continue
        entry: dict[str, Any] = {"question_id": question_id, "question": question}
        if split != "test":
            answers = row.get("answers")
            if not isinstance(answers, list) or len(answers) != ANSWERS:
                faults.append(
                    Skipped("missing_answer", where, f"question {question_id} has no {ANSWERS} answers")
                )
                continue
            entry["answers"] = [str(answer) for answer in answers]
        url = row.get("flickr_original_url")
        first.setdefault(image_id, (where, {"url": url} if url else {}))
        questions[image_id].append(entry)
    rows = [
        Row(
            f"{image_id}.jpg",
            pictures / f"{image_id}.jpg",
            where,
            (),
            {"image_id": image_id, **meta, "questions": questions[image_id]},
        )
        for image_id, (where, meta) in first.items()
    ]
    return read_rows(rows, faults, captioned=False)
