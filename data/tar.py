"""A tar reader for shards: one scan over the headers finds every file, then samples are read by place.

Nothing is unpacked and no handle stays open: a sample is two or three `pread` calls. Reads what GNU tar,
bsdtar, Python's tarfile and every webdataset writer produce: ustar, GNU long names, PAX headers, hard links.
"""

from __future__ import annotations

import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.faults import Fault, FaultRecord

BLOCK = 512
SPAN = 8 * BLOCK  # bytes of one read while scanning
EXTENSIONS = 1 << 16  # different ones of a shard; their codes are uint16
REGULAR = (b"0", b"\0", b"7")  # the last one is "contiguous", which is read as regular everywhere
HARD_LINK = b"1"
OF_THE_NEXT = (b"L", b"K", b"x")  # the next member's long name, the long target of its link, its PAX records
# A header as nearly all writers make it, of a regular file without a folder: key, extension, size, checksum's field.
PLAIN = re.compile(
    rb"(?=([^\0./_][^\0./]*)\.([^\0/]*)\0).{124}([0-7]{11})[\0 ].{12}([0-7]{6}\0 )0.{188}\0.{166}",
    re.DOTALL,
)
META = re.compile(rb"__[^/]*__($|/)")  # webdataset's own notes about a shard


class BadTarError(ValueError):
    """The file cannot be followed further as a tar."""


class TruncatedError(BadTarError):
    """The file ends before the tar does."""


@dataclass(frozen=True)
class ShardIndex:
    """Where the files of each sample lie in one shard; about 80 bytes a sample.

    Attributes:
        path: The local file.
        name: What the user calls it (the URL of a fetched shard, otherwise the path).
        keys: Samples' keys as UTF-8, in the order of their first file; dtype `S`, shape (n,).
        starts: Sample i owns files `starts[i]:starts[i + 1]`; int64 (n + 1,).
        extensions: Code of each file's extension, an index into `names`; uint16 (files,).
        offsets: Byte offset of each file's content; int64 (files,).
        sizes: Bytes of each file; int64 (files,).
        names: The extensions that occur, lower case.
        faults: What the scan found wrong.
        bytes: Size of the shard.
        tag: Version of a fetched shard's source (its ETag or time); empty for a local one.
        seen: False for an index that came without its shard and may be that of another one.
    """

    path: str
    name: str
    keys: np.ndarray
    starts: np.ndarray
    extensions: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...]
    faults: tuple[FaultRecord, ...] = ()
    bytes: int = 0
    tag: str = ""
    seen: bool = True

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        return self.keys[sample].decode("utf-8", "backslashreplace")  # always printable

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) in bytes, of one sample."""
        first, last = self.starts[sample : sample + 2].tolist()
        columns = (column[first:last].tolist() for column in (self.extensions, self.offsets, self.sizes))
        return {self.names[code]: (offset, size) for code, offset, size in zip(*columns, strict=True)}


class _Building:
    """Files found so far, in columns; a key's files need not be neighbours."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}  # key -> number of its sample
        self.codes: dict[bytes, int] = {}  # extension -> its code
        self.files: list[int] = []  # sample, extension, offset and size of the first file, of the second, ...
        # Offset and size by sample and extension, for links.
        self.places: dict[tuple[int, int], tuple[int, int]] = {}
        self.placed = 0  # how much of `files` is in `places`

    def add(self, key: bytes, extension: bytes, offset: int, size: int) -> None:
        code = self.code(extension)
        self.files += (self.numbers.setdefault(key, len(self.numbers)), code, offset, size)

    def link(self, name: bytes, target: bytes) -> None:
        """Note a hard link: a further name of an earlier file, as tar writes it for the second of two that are one."""
        for at in range(self.placed, len(self.files), 4):
            sample, code, offset, size = self.files[at : at + 4]
            self.places.setdefault((sample, code), (offset, size))
        self.placed = len(self.files)
        key, extension = split_name(name)
        old, suffix = split_name(target)
        place = self.places.get((self.numbers.get(old, -1), self.codes.get(suffix.lower(), -1)))
        if key and place is not None:
            self.add(key, extension, *place)

    def code(self, extension: bytes) -> int:
        """The code of an extension.

        Raises:
            BadTarError: There are more than an index holds.
        """
        name = extension.lower()
        if len(self.codes) == EXTENSIONS and name not in self.codes:
            raise BadTarError(
                f"its files have more than {EXTENSIONS:,} different extensions; a sample's key ends at the first dot "
                "of its file's name, so that `photo.0001.jpg` and `photo.0002.jpg` are one sample"
            )
        return self.codes.setdefault(name, len(self.codes))

    def drop_incomplete(self, cut_inside: bytes | None) -> None:
        """Forget the last sample when the cut took a part of it."""
        samples = self.files[::4]
        if cut_inside is not None:
            dropped = self.numbers.get(split_name(cut_inside)[0])
        else:
            # The cut fell between two files. A last sample with fewer files than the first one has lost some.
            fewer = len(self.numbers) > 1 and samples.count(samples[-1]) < samples.count(0)
            dropped = samples[-1] if fewer else None
        if dropped is None:
            return
        keys = [key for key, number in self.numbers.items() if number != dropped]
        self.numbers = {key: number for number, key in enumerate(keys)}
        rows = zip(samples, self.files[1::4], self.files[2::4], self.files[3::4], strict=True)
        kept = [(row[0] - (row[0] > dropped), *row[1:]) for row in rows if row[0] != dropped]
        self.files = [number for row in kept for number in row]


def same_places(one: ShardIndex, other: ShardIndex) -> bool:
    """Whether two indices say the same of where each file of each sample lies."""
    columns = ("keys", "starts", "extensions", "offsets", "sizes")
    return one.names == other.names and all(
        np.array_equal(getattr(one, column), getattr(other, column)) for column in columns
    )


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """A member's key, up to the first dot of its last part, and its extension.

    Both are empty for what is no file of a sample: no dot, a hidden file, or webdataset's notes about a shard.
    """
    stem, dot, extension = name.partition(b".")
    if b"/" in name:
        folder, slash, base = name.rpartition(b"/")
        last, dot, extension = base.partition(b".")
        stem = last and folder + slash + last
    if not stem or not dot or (name.startswith(b"__") and META.match(name)):
        return b"", b""
    return stem, extension


def scan_shard(path: str | Path, name: str | None = None, expected: int | None = None) -> ShardIndex:
    """Index one shard by its headers; the files' contents are not read.

    About 2 us a file. Damage is reported, never raised: a shard that is cut short gives the samples that
    are whole, and a fault that counts what is lost.

    Args:
        path: A local tar file.
        name: How messages call it; the path when None.
        expected: Samples that its manifest promises, when there is one.

    Returns:
        The index; `faults` holds `bad_shard`, `truncated_tar` and `duplicate_key` records.

    Raises:
        OSError: The file cannot be opened.
    """
    name = str(path) if name is None else name
    found = _Building()
    faults: list[FaultRecord] = []
    promised = "" if expected is None else f" of the {expected} that the manifest promises"
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - unbuffered
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        try:
            _scan(descriptor, size, found)
        except TruncatedError as error:
            found.drop_incomplete(cut_inside=error.args[1])
            whole = len(found.numbers)
            lost = max(1, (expected or 0) - whole)
            detail = f"{error.args[0]}; it still holds {whole} whole samples{promised}"
            faults.append(FaultRecord("truncated_tar", name, "", detail, lost))
        except BadTarError as error:
            whole = len(found.numbers)
            lost = max(1, (expected or 0) - whole)
            kept = f"; {whole} samples before that point{promised} are used" if whole else ""
            faults.append(FaultRecord("bad_shard", name, "", f"{error}{kept}", lost))
        else:
            if expected is not None and expected > len(found.numbers):
                detail = f"holds {len(found.numbers)} samples{promised}"
                faults.append(FaultRecord("bad_shard", name, "", detail, count=expected - len(found.numbers)))
    return _pack(str(path), name, found, faults, size)


def _scan(descriptor: int, size: int, found: _Building) -> None:
    adler32, match, number = zlib.adler32, PLAIN.match, found.numbers.setdefault
    codes = _Known(found.code)
    sums = _Known(
        lambda field: (int(field[:6], 8) - 255 + sum(field)) % 65521
    )  # what Adler-32 of it should be
    last, sample = b"", -1
    special = False  # whether the next member's name or size stands in a header of its own
    position = base = 0
    buffer = b""
    longname = longlink = None
    pax: dict[str, bytes] = {}
    while True:
        start = position - base
        if not 0 <= start <= len(buffer) - BLOCK:
            # The texts of a sample and the next picture's header lie close together: one read has them all.
            buffer, base, start = os.pread(descriptor, SPAN, position), position, 0
        header = buffer[start : start + BLOCK]
        if len(header) < BLOCK:
            if position == 0:
                raise BadTarError(
                    "is empty" if not header else f"not a tar: {size} bytes, less than one header"
                )
            raise TruncatedError(f"ends at byte {size} without the end-of-archive mark", None)
        plain = None if special else match(header)
        if plain:  # nearly all files; each call of a function of ours would take a twentieth of the time
            key, extension, digits, field = plain.groups()
            if sums[field] == adler32(header) & 0xFFFF:
                length, content = int(digits, 8), position + BLOCK
                if content + length <= size:
                    code = codes[extension]
                    if key != last:
                        last, sample = key, number(key, len(found.numbers))
                    found.files += (sample, code, content, length)
                    position = content + -(-length // BLOCK) * BLOCK
                    continue
        if not header[0] and header.count(0) == BLOCK:
            _require_end(descriptor, position)
            return
        _verify(header, position)
        length = _number(header[124:136], header, position)
        kind = header[156:157]
        content = position + BLOCK
        following = content + -(-length // BLOCK) * BLOCK
        if kind in OF_THE_NEXT:
            if content + length > size:
                raise TruncatedError(f"ends at byte {size} inside a header", None)
            text = os.pread(descriptor, length, content)
            special = True
            if kind == b"x":
                pax = _pax(text, position)
            elif kind == b"L":
                longname = text.split(b"\0", 1)[0]
            else:
                longlink = text.split(b"\0", 1)[0]
        elif kind != b"g":  # defaults that no writer uses for names
            member = pax.get("path") or longname or _name(header)
            if "size" in pax:
                length = _decimal(pax["size"], position)
                following = content + -(-length // BLOCK) * BLOCK
            target = pax.get("linkpath") or longlink or header[157:257].split(b"\0", 1)[0]
            longname, longlink, pax, special = None, None, {}, False
            if kind in REGULAR and not member.endswith(b"/"):
                if content + length > size:
                    told = member.decode("utf-8", "backslashreplace")
                    raise TruncatedError(f"ends at byte {size} inside {told!r}", member)
                key, extension = split_name(member)
                if key:
                    found.add(key, extension, content, length)
            elif kind not in REGULAR:
                following = content if kind in b"123456" and kind else following  # these carry no content
                if kind == HARD_LINK:
                    found.link(member, target)
        position = following


class _Known(dict):
    """What a function gives for few different arguments, each asked for once."""

    def __init__(self, make: Callable[[bytes], int]):
        super().__init__()
        self.make = make

    def __missing__(self, argument: bytes) -> int:
        made = self[argument] = self.make(argument)
        return made


def _sum_is(stored: int, header: bytes) -> bool:
    """Whether a header has this checksum: the sum of all its bytes, with spaces in the checksum's own place.

    The lower half of Adler-32 is 1 plus the sum modulo 65,521, and zlib has it ten times as fast as Python adds.
    """
    return (stored - 8 * 32 + sum(header[148:156]) + 1) % 65521 == zlib.adler32(header) & 0xFFFF


def _require_end(descriptor: int, position: int) -> None:
    """Make sure that nothing but zeros follows the end-of-archive mark.

    Raises:
        BadTarError: Something does, as in tars that were joined by `cat`: no reader would see its samples.
    """
    at = position
    while block := os.pread(descriptor, SPAN, at):
        if block.count(0) < len(block):
            raise BadTarError(
                f"goes on behind its end-of-archive mark at byte {position}: tars are joined by `tar -A`, not by `cat`"
            )
        at += len(block)


def _verify(header: bytes, position: int) -> None:
    if _sum_is(_number(header[148:156], header, position), header):
        return
    raise _no_header(header, position)


def _no_header(header: bytes, position: int) -> BadTarError:
    """What is wrong where a header should be."""
    if position:
        return BadTarError(f"damaged header at byte {position}")
    kinds = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK": "zip"}
    packed = next((word for magic, word in kinds.items() if header.startswith(magic)), None)
    return BadTarError(
        f"not a tar but {packed}; shards are uncompressed tar files" if packed else "not a tar"
    )


def _number(field_: bytes, header: bytes, position: int) -> int:
    if field_[0] in (0x80, 0xFF):  # base 256, for sizes of 8 GiB and more
        return int.from_bytes(field_[1:], "big")
    try:
        return int(field_.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _no_header(header, position) from None


def _decimal(text: bytes, position: int) -> int:
    if not text.isdigit():
        raise BadTarError(f"damaged PAX header at byte {position}")
    return int(text)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if (
        header[345] and header[257:263] == b"ustar\0"
    ):  # GNU's own format keeps other things in the prefix field
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _pax(text: bytes, position: int) -> dict[str, bytes]:
    records: dict[str, bytes] = {}
    while text and text[0]:
        head, _, rest = text.partition(b" ")
        length = _decimal(head, position)
        key, _, value = rest[: length - len(head) - 2].partition(b"=")
        records[key.decode("latin-1")] = value
        text = text[max(length, 1) :]
    return records


def _pack(path: str, name: str, found: _Building, faults: list[FaultRecord], size: int) -> ShardIndex:
    keys, extensions = list(found.numbers), list(found.codes)
    samples, codes, offsets, sizes = np.array(found.files, dtype=np.int64).reshape(-1, 4).T
    _, first = np.unique(samples * max(len(extensions), 1) + codes, return_index=True)
    once = np.zeros(len(samples), dtype=bool)
    once[first] = True
    again = np.flatnonzero(~once)
    for sample, code in {int(samples[file]): int(codes[file]) for file in again}.items():
        key = keys[sample].decode("utf-8", "backslashreplace")
        twice = f"{key}.{extensions[code].decode('utf-8', 'backslashreplace')}"
        detail = f"{twice} is in the shard twice; the first one is used"
        faults.append(FaultRecord("duplicate_key", name, key, detail))
    kept = np.flatnonzero(once)
    kept = kept[np.argsort(samples[kept], kind="stable")]
    return ShardIndex(
        path=path,
        name=name,
        keys=np.array(keys, dtype=np.bytes_),
        starts=np.searchsorted(samples[kept], np.arange(len(keys) + 1)),
        extensions=codes[kept].astype(np.uint16),
        offsets=offsets[kept],
        sizes=sizes[kept],
        names=tuple(extension.decode("utf-8", "backslashreplace") for extension in extensions),
        faults=tuple(faults),
        bytes=size,
    )


def lies_there(index: ShardIndex) -> str:
    """The path of a shard that needs no fetching."""
    return index.path


class ShardReader:
    """Reads files out of indexed shards and keeps the descriptors of the last few shards open.

    Args:
        capacity: Shards that stay open; a shuffle window of the usual size has 65 of 1,000 samples.
        locate: Gives the path of a shard that is to be opened, fetching it where needed.
    """

    def __init__(self, capacity: int = 128, locate: Callable[[ShardIndex], str] = lies_there):
        self.capacity, self.locate = capacity, locate
        self.open: OrderedDict[str, int] = OrderedDict()
        self.failed: dict[str, str] = {}  # what could not be had is not asked for again, sample by sample

    def read(self, index: ShardIndex, offset: int, size: int) -> bytes:
        """Content of one file.

        Raises:
            Fault: `truncated_tar` when the shard became shorter since it was indexed, `unreadable_shard` when it
                is gone or the disk fails.
        """
        descriptor = self.open.get(index.name)
        if descriptor is None:
            descriptor = self.open_shard(index)
        else:
            self.open.move_to_end(index.name)
        try:
            content = os.pread(descriptor, size, offset)
        except OSError as error:
            raise Fault("unreadable_shard", f"cannot be read: {error}") from error
        if len(content) < size:
            raise Fault("truncated_tar", "the shard is shorter now than when it was indexed")
        return content

    def open_shard(self, index: ShardIndex) -> int:
        """A descriptor of a shard that is not open yet."""
        if index.name in self.failed:
            raise Fault("unreadable_shard", self.failed[index.name])
        for attempt in range(3):
            try:
                descriptor = os.open(self.locate(index), os.O_RDONLY)
                break
            except FileNotFoundError as error:
                # Between locating and opening, a shard may have to make room for another one.
                if attempt == 2 or index.path == index.name:
                    raise self._fail(index, error) from error
            except OSError as error:
                raise self._fail(index, error) from error
        self.open[index.name] = descriptor
        if len(self.open) > self.capacity:
            os.close(self.open.popitem(last=False)[1])
        return descriptor

    def _fail(self, index: ShardIndex, error: Exception) -> Fault:
        self.failed[index.name] = f"cannot be opened any more: {error}"
        return Fault("unreadable_shard", self.failed[index.name])

    def close(self) -> None:
        while self.open:
            os.close(self.open.popitem()[1])

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
