"""Lists of URLs and captions in any usual format, as numbered parts of equal length."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data.adapters.csv import NUMBERS
from data.download.files import LOOKED_AT, column_names, kind_of, parquet_file, read_file
from data.download.presets import CAPTION_COLUMNS, URL_COLUMNS, Preset
from data.samples import is_text
from pairstream.errors import nearest, require

BATCH = 65_536
# img2dataset writes columns of these names itself.
RESERVED = ("key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message",
            "exif", "md5", "sha256", "sha512", "source_row")  # fmt: skip
SURROGATES = re.compile("[\ud800-\udfff]")


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
    require_values(path, there, lists, link, words)
    boxes = given.boxes if given and given.boxes in there else None
    for name in keep or ():
        pick(path, there, name, (), (), "kept values", "--keep-columns")
    single = [
        name for name in there if name and name not in lists
    ]  # spreadsheets number their rows under no name
    kept = {name: name for name in (single if keep is None else keep) if name not in (link, words, boxes)}
    for name in kept:
        if name in RESERVED:
            kept[name] = f"source_{name}"
        elif name.lower() in NUMBERS and name.lower() not in there:
            kept[name] = f"source_{name.lower()}" if name.lower() in RESERVED else name.lower()
    new = list(kept.values())
    for name in (link, words, *kept):
        same = [other for other in kept if new.count(kept[other]) > 1 and kept[other] == kept.get(name)]
        same = same or [other for other in there if other == name and there.count(name) > 1]
        if same:
            raise ValueError(
                f"{path}: the columns {' and '.join(map(repr, same))} would have one name in the samples' JSON: "
                "rename one, or choose with --keep-columns"
            )
    return Columns(link, words, kept, tuple(unnamed), boxes)


def require_values(path: Path, there: Sequence[str], lists: set[str], link: str, words: str) -> None:
    """Make sure that URLs and captions are two columns of single values.

    Raises:
        ValueError: They are not.
    """
    if link == words:
        raise ValueError(
            f"{path}: the column {link!r} cannot hold the URLs and the captions: it has {told(there)}; name another "
            "with --caption-column"
        )
    for name, what, option in ((link, "URL", "--url-column"), (words, "caption", "--caption-column")):
        if name in lists:
            raise ValueError(
                f"{path}: the column {name!r} holds lists, expected one {what} a row: name another with {option}, or "
                "give each its own row"
            )


def require_columns(files: Sequence[Path], columns: Columns) -> None:
    """Make sure that the later files of a list have the columns that were chosen by its first one.

    Args:
        files: All.
        columns: As chosen.

    Raises:
        ValueError: One of them has not; the message names it.
    """
    for path in files[1:]:
        kind = kind_of(path)
        if kind not in (".parquet", ".csv", ".tsv"):  # rows of JSON have names each of its own
            continue
        there, _ = column_names(path, columns.unnamed)
        needed = [columns.url, columns.caption]
        if kind == ".parquet":
            needed += [*columns.kept, *([columns.boxes] if columns.boxes else [])]
        missing = [name for name in needed if name not in there]
        if missing:
            raise ValueError(f"{path}: no column {missing[0]!r}, which {files[0]} has; it has {told(there)}")


def told(names: Sequence[str]) -> str:
    """The columns of a file, for a message."""
    text = ", ".join(names) or "no columns"
    return text if len(text) <= 300 else f"{text[:300]} ..."


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
        raise ValueError(f"{path}: no column {asked!r}: it has {told(there)}{nearest(asked, there)}")
    by_lower_case = {name.lower(): name for name in reversed(there)}
    for name in (*preset, *usual):
        if name in there or name.lower() in by_lower_case:
            return name if name in there else by_lower_case[name.lower()]
    raise ValueError(f"{path}: which column holds the {what}? It has {told(there)}; name one with {option}")


def count_rows(files: Sequence[Path], columns: Columns) -> int:
    """How many rows the files hold, bad ones included.

    Raises:
        ValueError: A file has not the columns.
    """
    require_columns(files, columns)
    total = 0
    for path in files:
        if kind_of(path) == ".parquet":
            total += parquet_file(path).metadata.num_rows
        else:
            total += sum(1 for _ in read_file(path, columns.unnamed))
    return total


def require_urls(files: Sequence[Path], columns: Columns) -> None:
    """Make sure that a list is not another one, or its columns mixed up: some of its first rows must have a URL.

    Raises:
        ValueError: All of their values are something else.
    """
    first = next(read_parts(files, columns, LOOKED_AT, LOOKED_AT))
    values = [value for value in first["url"].to_pylist() if value]
    if values and not any(map(is_url, values)):
        raise ValueError(
            f"{files[0]}: none of its first {first.num_rows:,} rows has a URL in the column {columns.url!r} (it holds "
            f"{values[0][:80]!r}): see whether this is the list that you mean, or name another column with --url-column"
        )


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
    joined = join_tables(pa, tables).combine_chunks()
    return joined.add_column(0, "source_row", pa.array(range(start, start + joined.num_rows), pa.int64()))


def join_tables(pa: Any, tables: list[Any]) -> Any:
    """One table of several; a column that is of different types in them becomes text.

    Raises:
        ValueError: One cannot, since it holds lists here and single values there.
    """
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        pass
    names = list(dict.fromkeys(name for table in tables for name in table.column_names))
    for name in names:
        kinds = {table.schema.field(name).type for table in tables if name in table.column_names}
        if len(kinds) > 1 and any(map(pa.types.is_nested, kinds)):
            raise ValueError(
                f"the files of the list differ in the column {name!r} ({', '.join(sorted(map(str, kinds)))}): leave it "
                "out by --keep-columns"
            )
        if len(kinds) > 1:
            tables = [
                table.set_column(
                    table.column_names.index(name), name, table[name].cast(pa.string(), safe=False)
                )
                if name in table.column_names
                else table
                for table in tables
            ]
    return pa.concat_tables(tables, promote_options="permissive")


def read_tables(path: Path, columns: Columns) -> Iterator[Any]:
    """One file as tables of some ten thousand rows, with the columns renamed."""
    pa = require("pyarrow", "download", "reading lists of URLs")
    names = {columns.url: "url", columns.caption: "caption", **columns.kept}
    if columns.boxes:
        names[columns.boxes] = "boxes"
    if kind_of(path) == ".parquet":
        file = parquet_file(path)
        for batch in file.iter_batches(BATCH, columns=list(names)):
            table = pa.Table.from_batches([batch]).select(list(names)).rename_columns(list(names.values()))
            yield plain(pa, table)
        return
    rows = read_file(path, columns.unnamed)
    while batch := [row for row, _ in zip(rows, range(BATCH), strict=False)]:
        # A URL or a caption in another encoding is no guess of ours: its row counts as one that cannot be read.
        batch = [
            row if is_text(row.get(columns.url)) and is_text(row.get(columns.caption)) else {}
            for row in batch
        ]
        arrays = {new: column_of(pa, [row.get(old) for row in batch], new) for old, new in names.items()}
        yield plain(pa, pa.table(arrays))


def column_of(pa: Any, values: list[Any], name: str) -> Any:
    """A column of values from text or JSON; numbers where readers compare them as such."""
    if name in NUMBERS:
        return pa.array([as_number(value) for value in values], pa.float64())
    if name in ("url", "caption"):
        return pa.array([value if isinstance(value, str) else None for value in values], pa.string())
    if not all(map(is_text, values)):
        values = [SURROGATES.sub("\ufffd", value) if isinstance(value, str) else value for value in values]
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        texts = [
            None if value is None else SURROGATES.sub("\ufffd", json.dumps(value, ensure_ascii=False))
            for value in values
        ]
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
        if is_bytes(pa, column):
            column = decoded(pa, column, "strict" if field.name in ("url", "caption") else "replace")
        elif field.name in ("url", "caption") and kind != pa.string():
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


def is_bytes(pa: Any, column: Any) -> bool:
    """Whether a column holds bytes that nobody has found to be UTF-8, whatever its type says."""
    types, kind = pa.types, column.type
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    if not (types.is_string(kind) or types.is_large_string(kind)):
        return False
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return True
    return False


def decoded(pa: Any, column: Any, errors: str) -> Any:
    """Bytes as text; with `strict` errors, None for those that are not UTF-8."""

    def text(value: bytes | None) -> str | None:
        try:
            return None if value is None else value.decode("utf-8", errors)
        except UnicodeDecodeError:
            return None

    return pa.array([text(value) for value in column.cast(pa.large_binary()).to_pylist()], pa.string())
