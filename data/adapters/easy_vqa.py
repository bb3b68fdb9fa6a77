"""easy-VQA: coloured shapes of 64 px with short questions, carried whole by a Python package."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from data.adapters.common import Counted, Row, read_rows
from pairstream.errors import require

SPLITS = ("train", "test")


def samples(split: str = "train") -> Counted:
    """easy-VQA: 4,000 pictures and 38,575 questions to train on, 1,000 and 9,673 to test.

    The one answer that each question has is written ten times, so that VQA accuracy, which is defined on ten
    people's answers, is exact match here.

    Args:
        split: `train` or `test`.

    Raises:
        ImportError: The package `easy_vqa` is not installed.
        ValueError: Another split.
    """
    if split not in SPLITS:
        raise ValueError(f"easy_vqa has no split {split!r}: expected one of {', '.join(SPLITS)}")
    package = require("easy_vqa", "data", "the data set easy_vqa")
    pictures: dict[int, str] = getattr(package, f"get_{split}_image_paths")()
    questions: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for number, (question, answer, image_id) in enumerate(
        zip(*getattr(package, f"get_{split}_questions")(), strict=True)
    ):
        questions[image_id].append(
            {
                "question_id": number,
                "question": question,
                "answers": [answer] * 10,
                "answer_type": "yes/no" if answer in ("yes", "no") else "other",
                "question_type": " ".join(question.lower().split()[:2]),
            }
        )
    rows = []
    for image_id, path in sorted(pictures.items()):
        meta = {"image_id": image_id, "questions": questions[image_id]}
        name = f"{split}/images/{image_id}.png"
        rows.append(Row(name, Path(path), f"easy_vqa: {name}", (), meta, f"{split}-{image_id:05d}"))
    return read_rows(rows, captioned=False)
