"""Lists of URLs and captions in any usual format, as numbered parts of equal length."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from data.adapters.csv import DELIMITERS, NUMBERS
from data.download.presets import CAPTION_COLUMNS, URL_COLUMNS, Preset
from pairstream.errors import nearest, require

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
BATCH = 65_536
# img2dataset writes columns of these names itself.
RESERVED = ("key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message",
            "exif", "md5", "sha256", "sha512", "source_row")  # fmt: skip

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Columns:
    """Which columns of a list are read.

    Attributes:
        url: The column of URLs.
        caption: The column of captions.
        kept: Column -> the name that it gets in the samples' JSON.
        unnamed: Names of the columns of a file that has no line of names.
        boxes: The column of boxes to blur, or None.
    """

    url: str
    caption: str
    kept: dict[str, str]
    unnamed: tuple[str, ...] = ()
    boxes: str | None = None


def list_files(words: Sequence[str]) -> list[Path]:
    """The files of a list: files as given, the lists in a folder, the matches of a glob; sorted within each.

    Raises:
        FileNotFoundError: One of the words means no file.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            here = sorted(entry for entry in path.rglob("*") if entry.is_file() and kind_of(entry) in FORMATS)
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


def kind_of(path: Path) -> str:
    """The format by the name, such as `.tsv` for `x.tsv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def choose_columns(
    path: Path,
    preset: Preset | None,
    url: str | None = None,
    caption: str | None = None,
    keep: Sequence[str] | None = None,
) -> Columns:
    """Find the columns of a list by what is asked for, the preset, or their usual names.

    Args:
        path: The first file.
        preset: A published layout.
        url: The column of URLs; found by itself when None.
        caption: The column of captions; likewise.
        keep: Further columns; None keeps all that hold single values.

    Raises:
        ValueError: No such column.
    """
    unnamed = preset.unnamed if preset else ()
    there, lists = column_names(path, unnamed)
    if preset is None and len(there) == 2 and sum(map(is_url, there)) == 1:  # the first row is a pair already
        unnamed = there = ("url", "caption") if is_url(there[0]) else ("caption", "url")
    given = preset if preset is not None else None
    link = pick(path, there, url, (given.url,) if given else (), URL_COLUMNS, "URLs", "--url-column")
    words = pick(
        path,
        there,
        caption,
        (given.caption,) if given else (),
        CAPTION_COLUMNS,
        "captions",
        "--caption-column",
    )
    boxes = given.boxes if given and given.boxes in there else None
    for name in keep or ():
        pick(path, there, name, (), (), "kept values", "--keep-columns")
    single = [name for name in there if name not in lists]
    kept = {name: name for name in (single if keep is None else keep) if name not in (link, words, boxes)}
    for name in kept:
        if name in RESERVED:
            kept[name] = f"source_{name}"
        elif name.lower() in NUMBERS and name.lower() not in there:
            kept[name] = f"source_{name.lower()}" if name.lower() in RESERVED else name.lower()
    return Columns(link, words, kept, tuple(unnamed), boxes)


def is_url(text: str) -> bool:
    return text.strip().lower().startswith(("http://", "https://"))


def pick(
    path: Path,
    there: Sequence[str],
    asked: str | None,
    preset: Sequence[str],
    usual: Sequence[str],
    what: str,
    option: str,
) -> str:
    """A column by its given name, by the preset's, or by the usual ones (upper or lower case)."""
    if asked is not None:
        if asked in there:
            return asked
        raise ValueError(f"{path}: no column {asked!r}: it has {', '.join(there)}{nearest(asked, there)}")
    by_lower_case = {name.lower(): name for name in reversed(there)}
    for name in (*preset, *usual):
        if name in there or name.lower() in by_lower_case:
            return name if name in there else by_lower_case[name.lower()]
    raise ValueError(
        f"{path}: which column holds the {what}? It has {', '.join(there)}; name one with {option}"
    )


def column_names(path: Path, unnamed: Sequence[str]) -> tuple[tuple[str, ...], set[str]]:
    """All columns of a file, and those that hold lists."""
    if kind_of(path) == ".parquet":
        parquet = require("pyarrow.parquet", "download", "reading parquet")
        types = require("pyarrow.types", "download", "reading parquet")
        schema = parquet.read_schema(path)
        return tuple(schema.names), {field.name for field in schema if types.is_nested(field.type)}
    if unnamed:
        return tuple(unnamed), set()
    if kind_of(path) in (".csv", ".tsv"):
        with open_text(path) as file:
            first = next(csv.reader(file, delimiter=delimiter_of(path)), None)
        if not first:
            raise ValueError(f"{path} is empty: expected a line of column names and one row per URL")
        return tuple(name.strip() for name in first), set()
    first = next((row for row in read_file(path, ()) if row), None)
    if first is None:
        raise ValueError(f"{path}: no row to be found in it")
    return tuple(first), {name for name, value in first.items() if isinstance(value, list | dict)}


def open_text(path: Path) -> TextIO:
    """A text file, unpacked when its name ends in .gz; bytes that are not UTF-8 are replaced."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace", newline="")
    return path.open(encoding="utf-8-sig", errors="replace", newline="")


def delimiter_of(path: Path) -> str:
    """Tab for .tsv; otherwise the most frequent of the usual delimiters in the first line."""
    if kind_of(path) == ".tsv":
        return "\t"
    with open_text(path) as file:
        head = file.readline()
    return max(DELIMITERS, key=head.count)


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
                    except ValueError:
                        row = None
                    yield row if isinstance(row, dict) else {}


def read_delimited(path: Path, unnamed: Sequence[str]) -> Rows:
    # The published files without names do not quote: a " there is a character like any other.
    quoting = csv.QUOTE_NONE if unnamed else csv.QUOTE_MINIMAL
    with open_text(path) as file:
        lines = (line.replace("\0", "") for line in file)
        reader = csv.reader(lines, delimiter=delimiter_of(path), quoting=quoting)
        names = list(unnamed) or [name.strip() for name in next(reader, [])]
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
    """A JSON file: a list of objects, `annotations` with one (RedCaps), or an object of lists (SBU)."""
    from data.adapters.common import load_json

    content = load_json(path)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = content["annotations"]
    if isinstance(content, list):
        yield from (row if isinstance(row, dict) else {} for row in content)
        return
    lists = {name: values for name, values in content.items() if isinstance(values, list)}
    length = max(map(len, lists.values()), default=0)
    names = [name for name, values in lists.items() if len(values) == length]
    yield from (
        dict(zip(names, values, strict=True)) for values in zip(*(lists[name] for name in names), strict=True)
    )


def count_rows(files: Iterable[Path], columns: Columns) -> int:
    """How many rows the files hold, bad ones included."""
    total = 0
    for path in files:
        if kind_of(path) == ".parquet":
            total += require("pyarrow.parquet", "download", "reading parquet").read_metadata(path).num_rows
        else:
            total += sum(1 for _ in read_file(path, columns.unnamed))
    return total


def read_parts(files: Iterable[Path], columns: Columns, size: int, limit: int) -> Iterator[Any]:
    """The whole list as tables of `size` rows, in order.

    Args:
        files: In order; a part may run over the end of a file.
        columns: As chosen.
        size: Rows in a part; the last one may have fewer.
        limit: Rows in all.

    Yields:
        A pyarrow Table with `source_row` (int64, counted over all files), `url`, `caption`, the kept columns under
        their new names, and `boxes` where they are asked for. A row that cannot be read has neither URL nor
        caption.
    """
    pa = require("pyarrow", "download", "reading lists of URLs")
    waiting: list[Any] = []
    held = start = 0
    for table in chain.from_iterable(read_tables(path, columns) for path in files):
        while table.num_rows and start < limit:
            room = min(size, limit - start) - held
            waiting.append(table.slice(0, room))
            held += waiting[-1].num_rows
            table = table.slice(room)
            if held == min(size, limit - start):
                yield number_rows(pa, waiting, start)
                start, waiting, held = start + held, [], 0
    if held:
        yield number_rows(pa, waiting, start)


def number_rows(pa: Any, tables: list[Any], start: int) -> Any:
    joined = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    return joined.add_column(0, "source_row", pa.array(range(start, start + joined.num_rows), pa.int64()))


def read_tables(path: Path, columns: Columns) -> Iterator[Any]:
    """One file as tables of some ten thousand rows, with the columns renamed."""
    pa = require("pyarrow", "download", "reading lists of URLs")
    names = {columns.url: "url", columns.caption: "caption", **columns.kept}
    if columns.boxes:
        names[columns.boxes] = "boxes"
    if kind_of(path) == ".parquet":
        file = require("pyarrow.parquet", "download", "reading parquet").ParquetFile(path)
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            has = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{path}: no column {missing[0]!r}, which the files before have; it has {has}")
        for batch in file.iter_batches(BATCH, columns=list(names)):
            table = pa.Table.from_batches([batch]).select(list(names)).rename_columns(list(names.values()))
            yield plain(pa, table)
        return
    rows = read_file(path, columns.unnamed)
    while batch := [row for row, _ in zip(rows, range(BATCH), strict=False)]:
        arrays = {new: column_of(pa, [row.get(old) for row in batch], new) for old, new in names.items()}
        yield plain(pa, pa.table(arrays))


def column_of(pa: Any, values: list[Any], name: str) -> Any:
    """A column of values from text or JSON; numbers where readers compare them as such."""
    if name in NUMBERS:
        return pa.array([as_number(value) for value in values], pa.float64())
    if name in ("url", "caption"):
        return pa.array([value if isinstance(value, str) else None for value in values], pa.string())
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        return pa.array(texts, pa.string())


def as_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def plain(pa: Any, table: Any) -> Any:
    """Columns that JSON can hold: no NaN, nothing but numbers, truth values, texts and lists."""
    pc = require("pyarrow.compute", "download", "reading lists of URLs")
    types = pa.types
    for place, field in enumerate(table.schema):
        column, kind = table.column(place), field.type
        if field.name in ("url", "caption") and kind != pa.string():
            column = column.cast(pa.string(), safe=False)
        elif types.is_floating(kind):
            column = pc.if_else(pc.is_finite(column), column, None)
        elif types.is_null(kind):
            column = column.cast(pa.string())
        elif not (
            types.is_integer(kind) or types.is_boolean(kind) or types.is_string(kind) or types.is_nested(kind)
        ):
            column = column.cast(pa.string(), safe=False)
        table = table.set_column(place, field.name, column)
    return table
