"""Hateful Memes: pictures with a text on them, to be told hateful or not by both together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.adapters.common import (
    Counted,
    Row,
    Skipped,
    need_file,
    need_folder,
    need_split,
    read_json_lines,
    read_rows,
)

LABELS = {0: "not hateful", 1: "hateful"}
FILES = {
    "train": ("train.jsonl",),
    "val": ("dev_seen.jsonl", "dev.jsonl"),
    "dev": ("dev_seen.jsonl", "dev.jsonl"),
    "test": ("test_seen.jsonl", "test.jsonl"),
    "dev_seen": ("dev_seen.jsonl",),
    "dev_unseen": ("dev_unseen.jsonl",),
    "test_seen": ("test_seen.jsonl",),
    "test_unseen": ("test_unseen.jsonl",),
}


def samples(root: Path, split: str = "train") -> Counted:
    """Hateful Memes: 8,500 to train on, 500 / 540 (dev seen / unseen) and 1,000 / 2,000 (test seen / unseen).

    The text is the sample's `text` and its caption; `label` is `hateful` or `not hateful`, and absent where the
    file has none (the first release of the test split).

    Args:
        root: Holds `train.jsonl`, `dev_seen.jsonl` (or `dev.jsonl`), `test_seen.jsonl` (or `test.jsonl`), ... and
            `img/`.
        split: `train`, `val` (= `dev`, the seen one), `test` (the seen one), or `dev_seen`, `dev_unseen`, `test_seen`,
            `test_unseen`.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, or a broken file.
    """
    root = Path(root)
    need_split("hateful_memes", split, FILES)
    path = need_file(root, *FILES[split], what=f"{split} split of Hateful Memes")
    pictures = need_folder(root, "img").parent
    faults: list[Skipped] = []
    rows = []
    for where, row in read_json_lines(path, faults):
        name, text, label = row.get("img"), row.get("text"), row.get("label")
        if not (isinstance(name, str) and isinstance(text, str)) or label not in (None, *LABELS):
            faults.append(Skipped("bad_row", where, "expected img, text and a label of 0 or 1"))
            continue
        meta: dict[str, Any] = {"text": text.strip()}
        meta |= {"image_id": row["id"]} if "id" in row else {}
        meta |= {} if label is None else {"label": LABELS[label]}
        rows.append(Row(name, pictures / name, where, [text], meta))
    return read_rows(rows, faults)
