"""The files of a list of URLs: which they are, what columns they have, and their rows, in any usual format."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from data.adapters.csv import delimiter_of
from pairstream.errors import require

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
HEAD = 4096  # bytes that tell whether a file is text
LOOKED_AT = 1000  # rows by which a list is judged

Rows = Iterator[dict[str, Any]]


def list_files(words: Sequence[str]) -> list[Path]:
    """The files of a list: files as given, the lists in a folder, the matches of a glob; sorted within each.

    Raises:
        FileNotFoundError: One of the words means no file.
        ValueError: A file in another format.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            here = sorted(entry for entry in path.rglob("*") if is_list(entry, path))
        elif any(sign in word for sign in "*?["):
            anchor = Path(path.anchor)
            here = sorted(anchor.glob(str(path.relative_to(anchor))))
        else:
            here = [path] if path.is_file() else []
        if not here:
            raise FileNotFoundError(
                f"no list of URLs at {word}: expected a file, a folder or a glob of {', '.join(FORMATS)}"
            )
        found += here
    for path in found:
        if kind_of(path) not in FORMATS:
            raise ValueError(f"{path}: expected one of {', '.join(FORMATS)} (all but parquet also as .gz)")
    return list(dict.fromkeys(found))


def is_list(path: Path, folder: Path) -> bool:
    """Whether a file somewhere in a folder is a part of the list that lies there: nothing hidden is."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and kind_of(path) in FORMATS and path.is_file()


def kind_of(path: Path) -> str:
    """The format by the name, such as `.tsv` for `x.tsv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def column_names(path: Path, unnamed: Sequence[str]) -> tuple[tuple[str, ...], set[str]]:
    """All columns of a file, and those that hold lists.

    Raises:
        ValueError: It is empty, damaged, or in another format than its name says.
    """
    if kind_of(path) == ".parquet":
        types = require("pyarrow.types", "download", "reading parquet")
        schema = parquet_file(path).schema_arrow
        return tuple(schema.names), {field.name for field in schema if types.is_nested(field.type)}
    require_text(path)
    if unnamed:
        return tuple(unnamed), set()
    if kind_of(path) in (".csv", ".tsv"):
        with open_text(path) as file:
            first = header(csv.reader(without_zeros(file), delimiter=find_delimiter(path)))
        if not first:
            raise ValueError(f"{path} is empty: expected a line of column names and one row per URL")
        return tuple(first), set()
    rows = list(islice(filter(None, read_file(path, ())), LOOKED_AT))
    if not rows:
        raise ValueError(f"{path}: no row to be found in it")
    seen: dict[str, Any] = {}  # the first value of each column that is not null
    for name, value in chain.from_iterable(row.items() for row in rows):
        if value is not None:
            seen.setdefault(name, value)
    names = tuple(dict.fromkeys(chain.from_iterable(rows)))
    return names, {name for name, value in seen.items() if isinstance(value, list | dict)}


def parquet_file(path: Path) -> Any:
    """An opened parquet file.

    Raises:
        ValueError: It is none, or cut short.
    """
    parquet = require("pyarrow.parquet", "download", "reading parquet")
    try:
        return parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's own errors are both, and do not name the file
        raise ValueError(f"{path}: not a whole parquet file ({error}): download it again") from error


def require_text(path: Path) -> None:
    """Make sure that a file is text.

    Raises:
        ValueError: It is UTF-16, or no text at all.
    """
    with open_bytes(path) as file:
        head = file.read(HEAD)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or 10 * head.count(0) > len(head):
        kind = "parquet" if head.startswith(b"PAR1") else "UTF-16, or no text at all"
        raise ValueError(
            f"{path}: expected UTF-8 text and found what looks like {kind}: convert it, or give it the suffix of what "
            "it is"
        )


@contextmanager
def open_bytes(path: Path) -> Iterator[Any]:
    """A file's bytes, unpacked when its name ends in .gz.

    Raises:
        ValueError: It is packed in another way, or cut short.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}): download it again") from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file, unpacked when its name ends in .gz; bytes that are not UTF-8 become lone surrogates."""

    with open_bytes(path) as file:
        yield io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def without_zeros(file: TextIO) -> Iterator[str]:
    return (line.replace("\0", "") for line in file)


def header(rows: Iterator[list[str]]) -> list[str]:
    """The names of the columns: the first row that is not blank."""
    return [name.strip() for name in next((row for row in rows if row), [])]


def find_delimiter(path: Path) -> str:
    """The delimiter that the first line has."""
    with open_text(path) as file:
        return delimiter_of(next((line for line in file if line.strip()), ""), kind_of(path))


def read_file(path: Path, unnamed: Sequence[str]) -> Rows:
    """The rows of one file that is not parquet; an empty dict for one that cannot be read."""
    kind = kind_of(path)
    if kind in (".csv", ".tsv"):
        yield from read_delimited(path, unnamed)
    elif kind == ".json":
        yield from read_object(path)
    else:
        with open_text(path) as file:
            for line in file:
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError):
                        row = None
                    yield row if isinstance(row, dict) else {}


def read_delimited(path: Path, unnamed: Sequence[str]) -> Rows:
    """The rows of a .csv or .tsv file."""
    # The published files without names do not quote: a " there is a character like any other.
    quoting = csv.QUOTE_NONE if unnamed else csv.QUOTE_MINIMAL
    with open_text(path) as file:
        reader = csv.reader(without_zeros(file), delimiter=find_delimiter(path), quoting=quoting)
        names = list(unnamed) or header(reader)
        while True:
            try:
                values = next(reader, None)
            except (
                csv.Error
            ):  # a quote that is left open has swallowed 128 kB; the reader goes on behind them
                values = [""]
            if values is None:
                return
            if values:
                yield dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def read_object(path: Path) -> Rows:
    """A JSON file: a list of objects, `annotations` with one (RedCaps), or an object of lists (SBU).

    Raises:
        ValueError: It is none of these.
    """
    from data.adapters.common import load_json

    content = load_json(path)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = content["annotations"]
    if isinstance(content, list):
        yield from (row if isinstance(row, dict) else {} for row in content)
        return
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a list of objects or an object of lists, got {type(content).__name__}"
        )
    lists = {name: values for name, values in content.items() if isinstance(values, list)}
    length = max(map(len, lists.values()), default=0)
    names = [name for name, values in lists.items() if len(values) == length]
    yield from (
        dict(zip(names, values, strict=True)) for values in zip(*(lists[name] for name in names), strict=True)
    )
