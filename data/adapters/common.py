"""What all adapters share: what they yield, and how they find and read a set's files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from data.adapters.web import fetch, map_threads
from data.faults import Fault
from data.samples import is_text
from data.shards import IMAGE_EXTENSIONS, Sample


@dataclass(frozen=True)
class Skipped:
    """A row that gives no sample.

    Attributes:
        cause: A short name to count by: `missing_image`, `missing_caption`, `bad_row`, ...
        where: File and line (or the place in a JSON file) of the row.
        why: What is wrong with it.
    """

    cause: str
    where: str
    why: str


@dataclass(frozen=True)
class Row:
    """One picture of an annotation file, before its bytes are read.

    Attributes:
        name: The picture's own name in the set, kept in the sample's JSON.
        source: Its file, or its http(s) URL.
        where: File and line, or place in a JSON file, that speaks of it.
        captions: Its texts, as they stand in the file.
        meta: Further JSON keys of the sample.
        key: The sample's key; made of the stem of `name` when empty.
        compose: Makes the picture that is written from the file's bytes (a crop, two pictures side by side);
            None writes the file as it is.
    """

    name: str
    source: Path | str
    where: str
    captions: Sequence[str] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    compose: Callable[[bytes], bytes] | None = None


class Counted:
    """An iterator whose length is known beforehand, so that progress can be shown.

    Args:
        total: Samples and skipped rows that `items` will give.
        items: The samples and skipped rows.
    """

    def __init__(self, total: int, items: Iterable[Sample | Skipped]):
        self.total, self.items = total, iter(items)

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> Sample | Skipped:
        return next(self.items)

    def __length_hint__(self) -> int:
        return self.total


def read_rows(rows: Sequence[Row], faults: Sequence[Skipped] = (), *, captioned: bool = True) -> Counted:
    """Read the pictures of a table, URLs over many connections.

    Args:
        rows: One per picture.
        faults: What was found wrong while the table was read; given first.
        captioned: Whether a picture without a text is a fault.

    Returns:
        Samples and skipped rows, in the order of the table. Memory holds one file, or the answers to some
        dozens of requests, at a time.
    """
    read = partial(read_row, captioned=captioned)
    remote = any(isinstance(row.source, str) for row in rows)
    items = map_threads(read, rows) if remote else map(read, rows)
    return Counted(len(rows) + len(faults), chain(faults, items))


def read_row(row: Row, captioned: bool = True) -> Sample | Skipped:
    """Read one picture, or say why there is none."""
    captions = [text for text in map(str.strip, row.captions) if text]
    if captioned and not captions:
        return Skipped("missing_caption", row.where, f"{row.name} has no caption")
    if not all(map(is_text, captions)):
        return Skipped(
            "bad_text", row.where, f"a caption of {row.name} holds half a character (a lone surrogate)"
        )
    try:
        image = fetch(row.source) if isinstance(row.source, str) else row.source.read_bytes()
        image = row.compose(image) if row.compose else image
    except Fault as fault:
        return Skipped(fault.cause, row.where, fault.detail)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return Skipped("missing_image", row.where, f"no picture {error.filename}")
    except (OSError, ValueError) as error:  # no permission, a name too long for the disk, a NUL in it
        return Skipped("unreadable_image", row.where, f"{row.name[:80]!r} cannot be read: {error}"[:300])
    claimed = Path(row.name).suffix[1:].lower()  # `prepare` looks at the bytes and corrects it
    extension = claimed if claimed in IMAGE_EXTENSIONS else "jpg"
    meta = {"url" if isinstance(row.source, str) else "name": row.name, **row.meta}
    return Sample(row.key or safe_key(row.name), image, extension, captions, meta)


def safe_key(name: str) -> str:
    """A sample key from a file name: its stem, with `_` for all but ASCII letters, digits, `-` and `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem) or "_"


def plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(entry) for key, entry in value.items())
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int | bool)


def near(root: Path) -> list[Path]:
    """Entries of a set's folder and of the folders in it, nearest first, in a fixed order.

    Raises:
        FileNotFoundError: `root` is not a folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}: expected --root to be the folder of the unpacked data set"
        )
    first = sorted(root.iterdir())
    return first + [path for folder in first if folder.is_dir() for path in sorted(folder.iterdir())]


def find_file(root: Path, *names: str) -> Path | None:
    """The first of `names` (upper or lower case) in a folder or one level below; None when there is none."""
    entries = near(root)
    for name in names:
        for path in entries:
            if path.name.lower() == name.lower() and path.is_file():
                return path
    return None


def need_file(root: Path, *names: str, what: str) -> Path:
    """`find_file`, or a clear error.

    Raises:
        FileNotFoundError: Names the folder and the files that were looked for.
    """
    found = find_file(root, *names)
    if found is None:
        raise FileNotFoundError(
            f"no {what} in {root}: expected {' or '.join(names)} there or one folder below"
        )
    return found


def need_folder(root: Path, *names: str, what: str = "pictures") -> Path:
    """The first folder with one of the names that holds pictures, in a folder or one level below.

    Archives differ in how they wrap their folder (`flickr30k_images/flickr30k_images/`), so a folder of the
    right name without a picture is looked into, not taken.

    Raises:
        FileNotFoundError: No such folder, or none with a picture.
    """
    wanted = {name.lower() for name in names}
    entries = [path for path in near(root) if path.name.lower() in wanted and path.is_dir()]
    for path in entries:
        if any(entry.suffix[1:].lower() in IMAGE_EXTENSIONS for entry in path.iterdir()):
            return path
    raise FileNotFoundError(
        f"no folder of {what} in {root}: expected {' or '.join(names)} with pictures in it, "
        "there or one folder below"
    )


def load_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: Not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSON or UTF-8; brackets without end
        raise ValueError(
            f"{path}: not a JSON file: {error}. It may be cut short: download it again"
        ) from error


def read_list(path: Path, what: str) -> list[dict[str, Any]]:
    """Read an annotation file that is one list of objects.

    Args:
        path: The file.
        what: The objects in a word, such as `questions`.

    Raises:
        ValueError: Not JSON, or another structure.
    """
    content = load_json(path)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        has = f"an object with {', '.join(content)}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a list of {what}, but the file has {has}")
    return content


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read an annotation file and make sure of its lists.

    Args:
        path: A JSON file with one object.
        keys: Each must be there and be a list of objects.

    Raises:
        ValueError: Not JSON, or another structure.
    """
    content = load_json(path)
    if not isinstance(content, dict):
        under = f" with lists under {' and '.join(map(repr, keys))}" if keys else ""
        raise ValueError(f"{path}: expected one object{under}, but the file has {type(content).__name__}")
    for key in keys:
        rows = content.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            has = ", ".join(content) or "no keys"
            raise ValueError(f"{path}: expected a list of objects under {key!r}, but the file has {has}")
    return content


def read_json_lines(path: Path, faults: list[Skipped]) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file with one JSON object a line, each with its place; other lines go to `faults`."""
    rows = []
    for number, line in read_lines(path):
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(Skipped("bad_row", where, f"not JSON: {error}"))
            continue
        if isinstance(row, dict):
            rows.append((where, row))
        else:
            faults.append(Skipped("bad_row", where, f"expected a JSON object, got {line[:60]!r}"))
    return rows


def need_split(name: str, split: str, splits: Iterable[str]) -> None:
    """Refuse an unknown split.

    Raises:
        ValueError: Names the set, the split and those that there are.
    """
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}: expected one of {', '.join(splits)}")


def one_answer(answer: str) -> list[str]:
    """The answers of a question that has a single one.

    VQA accuracy is defined on ten people's answers; ten times the same makes it exact match.
    """
    return [answer] * 10


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """Where a file is no UTF-8, and what to do; decoding in blocks, `error` does not know the line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                wrong = f"byte 0x{line[found.start]:02x}"
                return f", line {number}: expected UTF-8 text, got {wrong}: save the file as UTF-8 (`iconv -t UTF-8`)"
    return f": expected UTF-8 text: {error}"


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1.

    Raises:
        ValueError: Not UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}{not_utf8(path, error)}") from error
    return [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
