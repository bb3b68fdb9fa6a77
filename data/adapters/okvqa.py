"""OK-VQA: questions about COCO photographs that need knowledge from outside the picture."""

from __future__ import annotations

from pathlib import Path

from data.adapters.common import Counted, need_file, need_folder, need_split
from data.adapters.vqav2 import coco_questions

SUBSETS = {"train": "train2014", "val": "val2014"}


def samples(root: Path, split: str = "train") -> Counted:
    """OK-VQA: 9,009 questions to train on and 5,046 to test with (`val`), one sample per photograph.

    Five people answered each question; the set's own files write every answer twice, which makes the ten that VQA
    accuracy is defined on.

    Args:
        root: Holds `OpenEnded_mscoco_train2014_questions.json`, `mscoco_train2014_annotations.json` (and the
            same for `val2014`) and the folders `train2014/` and `val2014/` of COCO photographs.
        split: `train` or `val`, on which results are published.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, or a broken file.
    """
    root = Path(root)
    need_split("okvqa", split, SUBSETS)
    subset = SUBSETS[split]
    asked = need_file(root, f"OpenEnded_mscoco_{subset}_questions.json", what=f"{split} questions of OK-VQA")
    answered = need_file(root, f"mscoco_{subset}_annotations.json", what=f"{split} answers of OK-VQA")
    return coco_questions(asked, answered, need_folder(root, subset))
