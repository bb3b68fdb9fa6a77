"""Tables of picture paths or URLs and captions: .csv, .tsv and .jsonl."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from data.adapters.common import Counted, Row, Skipped, not_utf8, plain, read_lines, read_rows
from pairstream.errors import nearest

IMAGE_COLUMNS = (
    "image",
    "image_path",
    "filepath",
    "file_path",
    "file_name",
    "filename",
    "path",
    "url",
    "image_url",
)
CAPTION_COLUMNS = ("caption", "captions", "title", "text")
DELIMITERS = ",\t;|"
OTHERS = (".json", ".parquet", ".xlsx", ".xls", ".gz", ".zip", ".bz2", ".xz", ".zst")
NUMBERS = {"width": int, "height": int, "similarity": float, "punsafe": float, "pwatermark": float}

T = TypeVar("T")
Table = Iterator[tuple[int, dict[str, Any] | str]]  # line, and the row's values by column or what is wrong


def samples(
    table: Path,
    root: Path | None = None,
    *,
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    keep_columns: Sequence[str] | None = None,
) -> Counted:
    """A table of one's own.

    Rows of one picture become one sample with several captions, wherever they stand: written apart, the
    picture would be its own negative in a contrastive batch. The whole table is held in memory (about 0.8 kB
    a row) and URLs are fetched by 16 threads; for many millions of URLs use img2dataset, whose shards need no
    adapter.

    Args:
        table: `.csv` or `.tsv` (the delimiter is the most frequent of comma, tab, semicolon and bar in the
            first line, tab where a .tsv has one there), or `.jsonl` with one object a line. UTF-8.
        root: Where relative picture paths start; the folder of `table` by default.
        image_column: Paths or http(s) URLs. By default the first of image, image_path, filepath, file_path,
            file_name, filename, path, url and image_url that there is.
        caption_columns: One or more. By default the first of caption, captions, title and text that there is.
            In .jsonl a value may be a list of captions. Numbers (from 1) for image and captions mean a file
            without a line of column names.
        keep_columns: Copied into the samples' JSON under their names.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No such column, or a file that is not UTF-8, not CSV or empty.
    """
    path = Path(table)
    base = Path(root) if root else path.parent
    given = [column for column in (image_column, *(caption_columns or ())) if column]
    unnamed = bool(given) and all(column.isdecimal() for column in given)
    columns, content = open_table(path, unnamed)
    image = pick(path, columns, image_column, IMAGE_COLUMNS, "pictures", "--image-column")
    texts = [
        pick(path, columns, column, CAPTION_COLUMNS, "captions", "--caption-columns")
        for column in caption_columns or (None,)
    ]
    kept = [pick(path, columns, column, (), "kept values", "--keep-columns") for column in keep_columns or ()]

    def values(row: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        found = captions_of(row, texts)
        meta = {column: number(column, row[column]) for column in kept if row.get(column) not in (None, "")}
        return found, {column: value for column, value in meta.items() if plain(value)}  # no NaN

    captions: dict[str, list[str]] = {}
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    faults: list[Skipped] = []
    for where, name, (found, meta) in good_rows(path, content, image, values, faults):
        first.setdefault(name, (where, meta))
        captions[name] = list(dict.fromkeys([*captions.get(name, ()), *found]))
    rows = [
        Row(name, source(name, base), where, captions[name], meta, f"{count:09d}")
        for count, (name, (where, meta)) in enumerate(first.items())
    ]
    return read_rows(rows, faults)


def open_table(path: Path, unnamed: bool = False) -> tuple[list[str], Table]:
    """Columns and rows of a table, by its file's suffix.

    Args:
        path: `.jsonl` or `.ndjson`, or a delimited file.
        unnamed: See `read_csv`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another format, not UTF-8, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}: expected a .csv, .tsv or .jsonl file")
    suffix = path.suffix.lower()
    if suffix in OTHERS:
        raise ValueError(f"{path}: expected a .csv, .tsv or .jsonl table, got {suffix}: convert or unpack it")
    return read_jsonl(path) if suffix in (".jsonl", ".ndjson") else read_csv(path, unnamed)


def good_rows(
    path: Path, content: Table, image: str, values: Callable[[dict[str, Any]], T], faults: list[Skipped]
) -> Iterator[tuple[str, str, T]]:
    """The rows of a table that can be used: place, picture, and what `values` makes of them.

    Args:
        path: The table.
        content: Of `open_table`.
        image: The column of pictures.
        values: Reads the rest of a row; its ValueError says what is wrong.
        faults: Gets the other rows.
    """
    for line, row in content:
        where = f"{path.name}:{line}"
        try:
            if isinstance(row, str):
                raise ValueError(row)
            name = row.get(image)
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"no picture in the column {image!r}")
            found = values(row)
        except ValueError as error:
            faults.append(Skipped("bad_row", where, str(error)))
            continue
        yield where, name.strip(), found


def source(name: str, base: Path) -> Path | str:
    """A URL as it is, a path below `base`."""
    return name if name.lower().startswith(("http://", "https://")) else base / name


def captions_of(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """The texts of a row; a list in one column counts as several."""
    found: list[str] = []
    for column in columns:
        value = row.get(column)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) for text in values):
            raise ValueError(f"expected text in the column {column!r}, got {value!r}")
        found += [text.strip() for text in values if text.strip()]
    return found


def number(column: str, value: Any) -> Any:
    """The value; a number for the columns that readers compare as one."""
    if column not in NUMBERS:
        return value
    try:
        return NUMBERS[column](value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a number in the column {column!r}, got {value!r}") from None


def pick(
    path: Path, columns: Sequence[str], given: str | None, usual: Sequence[str], what: str, option: str
) -> str:
    """A column by its given name, or by the usual ones.

    Raises:
        ValueError: There is none; the message lists those that there are.
    """
    if given is not None:
        if given in columns:
            return alone(path, columns, given)
        raise ValueError(f"{path}: no column {given!r}: it has {', '.join(columns)}{nearest(given, columns)}")
    by_lower_case = {column.lower(): column for column in reversed(columns)}
    for name in usual:
        if name in by_lower_case:
            return alone(path, columns, by_lower_case[name])
    raise ValueError(
        f"{path}: which column holds the {what}? It has {', '.join(columns)}; name one with {option}"
    )


def alone(path: Path, columns: Sequence[str], name: str) -> str:
    """The column's name, unless another one has it, too: one of them would be lost."""
    if columns.count(name) > 1:
        raise ValueError(f"{path}: {columns.count(name)} columns are called {name!r}: rename all but one")
    return name


def read_csv(path: Path, unnamed: bool) -> tuple[list[str], Table]:
    """Columns and rows of a delimited file.

    Args:
        path: The file.
        unnamed: Its first line is a row already; columns are then called 1, 2, 3, ...

    Raises:
        ValueError: Not UTF-8 text, or empty.
    """
    with path.open("rb") as file:
        head = next((line for line in file if line.strip()), b"").decode("utf-8", "replace")
    records = parse_csv(path, delimiter_of(head, path.suffix))
    line, first = next(records, (0, None))
    if first is None:
        raise ValueError(f"{path} is empty: expected a line of column names and one row per picture")
    if unnamed:
        columns = [str(position) for position in range(1, len(first) + 1)]
        records = chain([(line, first)], records)
    else:
        columns = [column.strip() for column in first]
    return columns, name_values(columns, records)


def delimiter_of(head: str, suffix: str) -> str:
    """The most frequent of the usual delimiters in the first line; tab where a .tsv has one there."""
    return "\t" if suffix.lower() == ".tsv" and "\t" in head else max(DELIMITERS, key=head.count)


def parse_csv(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        begins = 1  # a quoted value may run over several lines; the row is named by its first
        try:
            for values in reader:
                if values:
                    yield begins, values
                begins = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}{not_utf8(path, error)}") from error
        except csv.Error as error:
            raise ValueError(
                f'{path}, row from line {begins} on: {error}. Is a quote (") left open?'
            ) from error


def name_values(columns: Sequence[str], records: Iterator[tuple[int, list[str]]]) -> Table:
    for line, values in records:
        if len(values) == len(columns):
            yield line, dict(zip(columns, values, strict=True))
        else:
            yield line, f"expected {len(columns)} values, got {len(values)}"


def read_jsonl(path: Path) -> tuple[list[str], Table]:
    """Keys of all objects, and all rows, of a file with one JSON object a line.

    Raises:
        ValueError: Not UTF-8 text, or no line is a JSON object.
    """
    rows: list[tuple[int, dict[str, Any] | str]] = []
    for line, text in read_lines(path):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            row = str(error)
        rows.append((line, row if isinstance(row, dict) else f"expected a JSON object: {str(row)[:80]}"))
    objects = [row for _, row in rows if isinstance(row, dict)]
    if not objects:
        raise ValueError(f"{path}: expected one JSON object a line, found none")
    return list(dict.fromkeys(chain.from_iterable(objects))), iter(rows)
