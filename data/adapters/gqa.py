"""GQA: questions composed from scene graphs of Visual Genome photographs."""

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
    one_answer,
    read_rows,
)

FILES = {
    "train": ("train_balanced_questions.json",),
    "val": ("val_balanced_questions.json",),
    "testdev": ("testdev_balanced_questions.json",),
    "test": ("test_balanced_questions.json", "test_all_questions.json"),
}


def samples(root: Path, split: str = "train") -> Counted:
    """GQA's balanced questions, one sample per photograph.

    A question has `question_id`, `question`, `answers` (its one answer, ten times), `full_answer`, `answer_type`
    (`yes/no` or `other`) and `question_type` (the structural one: verify, query, choose, logical, compare).

    Args:
        root: Holds `train_balanced_questions.json` and its sisters, and `images/`. Scene graphs are not read.
        split: `train` (943,000 questions on 72,140 pictures), `val` (132,062), `testdev` (12,578) or `test` (95,336;
            their answers are not public).

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, or a broken file.
    """
    root = Path(root)
    need_split("gqa", split, FILES)
    path = need_file(root, *FILES[split], what=f"{split} questions of GQA")
    pictures = need_folder(root, "images", "allImages")
    content = load_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected one object with questions by their id, got {type(content).__name__}"
        )
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    first: dict[str, str] = {}
    faults: list[Skipped] = []
    for question_id, row in content.items():
        where = f"{path.name}: {question_id}"
        image_id, question = (
            row.get(key) if isinstance(row, dict) else None for key in ("imageId", "question")
        )
        if not (isinstance(image_id, str) and isinstance(question, str)):
            faults.append(Skipped("bad_row", where, "expected imageId and question"))
            continue
        entry: dict[str, Any] = {"question_id": question_id, "question": question}
        if split != "test":
            answer = row.get("answer")
            if not isinstance(answer, str) or not answer.strip():
                faults.append(Skipped("missing_answer", where, f"question {question_id} has no answer"))
                continue
            entry["answers"] = one_answer(answer)
            entry["answer_type"] = "yes/no" if answer in ("yes", "no") else "other"
            if isinstance(row.get("fullAnswer"), str):
                entry["full_answer"] = row["fullAnswer"]
        types = row.get("types")
        if isinstance(types, dict) and isinstance(types.get("structural"), str):
            entry["question_type"] = types["structural"]
        first.setdefault(image_id, where)
        questions[image_id].append(entry)
    rows = [
        Row(
            f"{image_id}.jpg",
            pictures / f"{image_id}.jpg",
            where,
            (),
            {"image_id": image_id, "questions": asked},
        )
        for image_id, where in first.items()
        for asked in (questions[image_id],)
    ]
    return read_rows(rows, faults, captioned=False)
