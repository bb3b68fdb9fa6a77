"""Examples that stand in front of every picture (few-shot prompts), from a small table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.adapters.common import Skipped, read_rows
from data.shards import Sample
from finetune.own_table import Kind, read_table


@dataclass(frozen=True)
class Usual:
    """A table whose columns have the usual names, and whose pictures lie beside it."""

    images: Path | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None


def read_examples(table: Path, kind: str) -> list[tuple[Any, ...]]:
    """What `caption` and `answer` of a model take as `examples`.

    Args:
        table: A .csv, .tsv or .jsonl file with pictures and captions (`caption`), or questions and answers (`vqa`).
        kind: The model's task.

    Returns:
        For each row the picture's file contents, and its caption; or question and answer.

    Raises:
        FileNotFoundError: No such table.
        ValueError: The task takes no examples, or a row or picture is bad: a prompt is made of all or of none.
    """
    if kind not in ("caption", "vqa"):
        raise ValueError(f"--examples are for models that write, this one is for {kind}: leave them out")
    faults: list[Skipped] = []
    reading: Kind = "caption" if kind == "caption" else "vqa"
    rows = read_table(reading, Usual(), table, faults)
    found: list[tuple[Any, ...]] = []
    for item in read_rows(rows, captioned=False):
        if isinstance(item, Sample) and kind == "caption":
            found.append((item.image, item.captions[0]))
        elif isinstance(item, Sample):
            entries = item.meta["questions"]
            found += [(item.image, entry["question"], entry["answers"][0]) for entry in entries]
        else:
            faults.append(item)
    if faults or not found:
        said = "; ".join(f"{fault.where}: {fault.why}" for fault in faults[:5]) or "no row"
        raise ValueError(f"{table}: all examples must be good: {said}")
    return found
