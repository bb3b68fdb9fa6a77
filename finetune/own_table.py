"""Tables of one's own: which column is what, rows by picture with bad ones named, and what is kept to measure on."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from data.adapters.common import Row, Skipped
from data.adapters.csv import IMAGE_COLUMNS, good_rows, open_table, pick, source
from pairstream.errors import nearest

Kind = Literal["caption", "classify", "vqa", "retrieval", "flyp"]
Role = Literal["text", "label"]
CAPTIONS = ("caption", "captions", "text", "title", "description")
LABELS = ("label", "labels", "class", "category", "sentiment", "attribute")
COLUMNS: dict[str, dict[Role, tuple[str, tuple[str, ...]]]] = {
    "caption": {"text": ("captions", CAPTIONS)},
    "retrieval": {"text": ("captions", CAPTIONS)},
    "classify": {
        "text": ("texts", ("text", "caption", "title", "post", "description")),
        "label": ("labels", LABELS),
    },
    "flyp": {"label": ("labels", LABELS)},
    "vqa": {
        "text": ("questions", ("question", "text")),
        "label": ("answers", ("answer", "answers", "label")),
    },
}
"""By kind, the columns that are read: what they hold, and the names that are looked for."""
APART = ("classify", "flyp")  # each row is a sample of its own; elsewhere a picture's rows are taken together


class TableOptions(Protocol):
    """What a command says of a table; see `finetune.own_data.OwnData`."""

    @property
    def images(self) -> Path | None: ...
    @property
    def image_column(self) -> str | None: ...
    @property
    def text_column(self) -> str | None: ...
    @property
    def label_column(self) -> str | None: ...


def read_table(kind: Kind, own: TableOptions, table: Path, faults: list[Skipped]) -> list[Row]:
    """The pictures of a table with their texts; what is wrong with a row goes to `faults`, by line.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No such column, or a broken file.
    """
    base = own.images or table.parent
    if not base.is_dir():
        raise FileNotFoundError(f"no folder {base}: expected --images to be where the pictures lie")
    columns, content = open_table(table)
    image = pick(table, columns, own.image_column, IMAGE_COLUMNS, "pictures", "--image-column")
    found: dict[str, str | None] = {}
    given = {"text": own.text_column, "label": own.label_column}
    for role, (what, usual) in COLUMNS[kind].items():
        usual = tuple(name for name in usual if name not in (image, found.get("text")))
        absent = not any(name.lower() in usual for name in columns)
        if kind == "classify" and role == "text" and given[role] is None and absent:
            found[role] = None  # pictures with labels alone
            continue
        found[role] = pick(table, columns, given[role], usual, what, f"--{role}-column")
    rows: dict[str, Row] = {}
    read = partial(values, kind, found)
    for where, name, (meta, captions) in good_rows(table, content, image, read, faults):
        key = f"{where}/{name}" if kind in APART else name
        before = rows.get(key)
        if before is None:
            rows[key] = Row(name, source(name, base), where, captions, meta, f"{len(rows):09d}")
            continue
        if "questions" in meta:
            meta = {"questions": [*before.meta["questions"], *meta["questions"]]}
        captions = [*before.captions, *(text for text in captions if text not in before.captions)]
        rows[key] = Row(name, before.source, before.where, captions, meta, before.key)
    return list(rows.values())


def values(kind: Kind, found: dict[str, str | None], row: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a row says: JSON keys of its sample, and captions."""
    if kind == "flyp":
        names = class_names(filled(row, found["label"]))
        return {"label": names[0] if len(names) == 1 else names}, []
    column = found["text"]
    text = row.get(column) if column else None
    if (
        isinstance(text, list)
        and kind in ("caption", "retrieval")
        and all(isinstance(entry, str) for entry in text)
    ):
        captions = [entry.strip() for entry in text if entry.strip()]
    elif text is not None and not isinstance(text, str):
        raise ValueError(f"expected text in the column {column!r}, got {text!r}")
    else:
        captions = [text.strip()] if text and text.strip() else []
    if kind != "classify" and not captions:
        raise ValueError(f"nothing in the column {column!r}")
    if kind in ("caption", "retrieval"):
        return {}, captions
    label = filled(row, found["label"])
    if kind == "classify":
        entries = label if isinstance(label, list) else [label]
        if not all(isinstance(entry, str | int) and str(entry).strip() for entry in entries):
            raise ValueError(f"expected a label in the column {found['label']!r}, got {label!r}"[:200])
        return {"label": label, **({"text": captions[0]} if captions else {})}, []
    # One answer, written ten times: VQA accuracy, which is defined on ten people's answers, is exact match then.
    entries = label if isinstance(label, list) else [label] * 10
    answers = [str(entry).strip() for entry in entries if isinstance(entry, str | int | float)]
    if len(answers) < len(entries) or not all(answers):
        raise ValueError(f"expected answers in the column {found['label']!r}, got {label!r}")
    return {"questions": [{"question": captions[0], "answers": answers}]}, []


def filled(row: dict[str, Any], column: str | None) -> Any:
    """The value of a column that must have one; a text without blanks around it."""
    value = row.get(str(column))
    value = value.strip() if isinstance(value, str) else value
    if value in (None, "", []):
        raise ValueError(f"nothing in the column {column!r}")
    return value


def class_names(label: Any) -> list[str]:
    """A label as class names, on one line each."""
    names = [" ".join(str(entry).split()) for entry in (label if isinstance(label, list) else [label])]
    if not all(names):
        raise ValueError(f"expected class names, got {label!r}")
    return names


def classes_of(rows: Sequence[Row]) -> list[str]:
    """All classes of the rows of `flyp`, sorted.

    Raises:
        ValueError: Fewer than two.
    """
    names = sorted({name for row in rows for name in class_names(row.meta["label"])})
    if len(names) < 2:
        raise ValueError(f"the table has {len(names)} different labels: expected at least two classes")
    return names


def labels_of(row: Row, separator: str | None) -> set[str]:
    """The labels of a row of `classify`; with a separator, one text may hold several."""
    label = row.meta["label"]
    if separator is not None and isinstance(label, str):
        label = label.split(separator)
    entries = label if isinstance(label, list) else [label]
    return {str(entry).strip() for entry in entries} - {""}


def check_labels(
    table: Path,
    parts: dict[str, list[Row]],
    allowed: Sequence[str],
    separator: str | None,
    faults: list[Skipped],
) -> None:
    """Take out the rows whose label cannot be learnt or judged: a typo, mostly.

    Args:
        table: For messages.
        parts: Rows to train and to measure on; changed.
        allowed: The labels; those of the rows to train on when empty.
        separator: See `labels_of`.
        faults: Gets the rows that are taken out.

    Raises:
        ValueError: There are not two labels to tell apart.
    """
    names = set(allowed) or {name for row in parts["train"] for name in labels_of(row, separator)}
    said = ", ".join(sorted(names)[:10]) + (", ..." if len(names) > 10 else "")
    whose = "labels that task.labels names" if allowed else "labels of the pictures to train on"
    for part, rows in parts.items():
        for row in rows:
            strange = sorted(labels_of(row, separator) - names)
            if strange:
                why = f"the label {strange[0]!r} is none of the {whose} ({said}){nearest(strange[0], names)}"
                faults.append(Skipped("unknown_label", row.where, why))
        parts[part] = [row for row in rows if labels_of(row, separator) <= names]
    if len(names) < (1 if separator is not None else 2):
        raise ValueError(f"{table}: expected at least two labels to tell apart, found {said or 'none'}")


def lonely(rows: Sequence[Row], separator: str | None) -> list[str]:
    """Labels that one row alone has while the others have five and more on average, with its place: typos, perhaps."""
    places: dict[str, list[str]] = {}
    for row in rows:
        for name in labels_of(row, separator):
            places.setdefault(name, []).append(row.where)
    others = [len(found) for found in places.values() if len(found) > 1]
    if sum(others) < 5 * max(1, len(others)):
        return []
    return [f"{name!r} ({found[0]})" for name, found in sorted(places.items()) if len(found) == 1]


def split(
    rows: Sequence[Row], share: float, labels: Callable[[Row], set[str]] | None = None
) -> tuple[list[Row], list[Row]]:
    """Rows to train and to measure on; no picture is on both sides, and the same table is always split the same.

    Args:
        rows: Of the table.
        share: Of pictures, to measure on.
        labels: Of a row. A picture without which nothing would be left to learn one of them from is trained on.

    Raises:
        ValueError: Fewer than two pictures, or none that can be spared.
    """
    names = sorted({row.name for row in rows}, key=lambda name: (zlib.crc32(name.encode()), name))
    if len(names) < 2:
        raise ValueError(
            f"{len(names)} good pictures: expected at least two, one to train and one to measure on"
        )
    wanted = min(max(1, round(share * len(names))), len(names) - 1)
    held = set(names[:wanted])
    if labels is not None:
        own: dict[str, set[str]] = {}
        for row in rows:
            own.setdefault(row.name, set()).update(labels(row))
        left = Counter(label for found in own.values() for label in found)
        spare = []
        for name in names:
            if len(spare) < wanted and all(left[label] > 1 for label in own[name]):
                spare.append(name)
                left.subtract(own[name])
        held = set(spare)
        if not held:
            raise ValueError(
                "each label has one picture alone, so none is left to measure on: give --val-data"
            )
    return [row for row in rows if row.name not in held], [row for row in rows if row.name in held]
