"""VQA v2: questions about COCO photographs, with the answers of ten people each."""

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

SUBSETS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
ANSWERS = 10  # people per question; VQA accuracy is defined on ten


def samples(root: Path, split: str = "train") -> Counted:
    """VQA v2, one sample per photograph with all questions about it.

    The record has `image_id` and `questions`: `question_id`, `question`, `answers` (ten texts as they were
    given), `answer_type` and `question_type`. The answers of the test splits are not public: there a
    question has only its first two keys.

    Args:
        root: Holds `v2_OpenEnded_mscoco_train2014_questions.json`, `v2_mscoco_train2014_annotations.json`
            (and the same for the other splits, there or one folder below) and the folders `train2014/`,
            `val2014/` and `test2015/` of COCO photographs.
        split: `train`, `val`, `test` or `test-dev`.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, or a broken file.
    """
    root = Path(root)
    need_split("vqav2", split, SUBSETS)
    subset = SUBSETS[split]
    asked = need_file(
        root, f"v2_OpenEnded_mscoco_{subset}_questions.json", what=f"{split} questions of VQA v2"
    )
    folder = subset.replace("-dev", "")  # test-dev is a part of the test photographs
    pictures = need_folder(root, folder)
    name = f"v2_mscoco_{subset}_annotations.json"
    answered = None if "test" in split else need_file(root, name, what=f"{split} answers of VQA v2")
    return coco_questions(asked, answered, pictures)


def coco_questions(asked: Path, answered: Path | None, pictures: Path) -> Counted:
    """Questions about COCO photographs, one sample per photograph.

    Args:
        asked: The file of questions.
        answered: The file of answers; None where they are not public.
        pictures: The folder of photographs, called `COCO_FOLDER_ID.jpg` after it.
    """
    faults: list[Skipped] = []
    answers = None if answered is None else read_answers(answered, faults)
    questions: dict[int, list[dict[str, Any]]] = defaultdict(list)
    first: dict[int, str] = {}
    for number, row in enumerate(read_json(asked, "questions")["questions"]):
        where = f"{asked.name}: questions[{number}]"
        image_id, question_id, question = row.get("image_id"), row.get("question_id"), row.get("question")
        if not (isinstance(image_id, int) and isinstance(question_id, int) and isinstance(question, str)):
            faults.append(Skipped("bad_row", where, "expected image_id, question_id and question"))
        elif answers is not None and len(answers.get(question_id, {}).get("answers", ())) != ANSWERS:
            faults.append(
                Skipped("missing_answer", where, f"question {question_id} has no {ANSWERS} answers")
            )
        else:
            first.setdefault(image_id, where)
            known = (answers or {}).get(question_id, {})
            questions[image_id].append({"question_id": question_id, "question": question, **known})
    rows = []
    for image_id, where in first.items():
        name = f"COCO_{pictures.name.lower()}_{image_id:012d}.jpg"
        meta = {"image_id": image_id, "questions": questions[image_id]}
        rows.append(Row(name, pictures / name, where, (), meta))
    return read_rows(rows, faults, captioned=False)


def read_answers(path: Path, faults: list[Skipped]) -> dict[int, dict[str, Any]]:
    """Answers and types by question; rows that say nothing are added to `faults`."""
    found: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(read_json(path, "annotations")["annotations"]):
        try:
            texts = [str(answer["answer"]) for answer in row["answers"]]
            types = {key: row[key] for key in ("answer_type", "question_type") if key in row}
            found[row["question_id"]] = {"answers": texts, **types}
        except (KeyError, TypeError):
            where = f"{path.name}: annotations[{number}]"
            faults.append(Skipped("bad_row", where, "expected question_id and answers[].answer"))
    return found
