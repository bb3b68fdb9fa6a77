"""The index of a shard, kept in a file beside it, so that only the first start has to walk through the tar.

`00000.tar.idx` is one line of JSON and then the arrays of a `ShardIndex`. It is a copy of what a scan finds: it may be
deleted at any time, and is made anew when the shard's size or time, or its manifest's promise, is another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.faults import FaultRecord
from data.tar import ShardIndex, same_places, scan_shard
from pairstream.atomic import aside

logger = logging.getLogger(__name__)

SUFFIX = ".idx"
FORMAT = "pairstream index 1"
YOUNG = 2.0  # seconds; a shard that was written so recently may still grow within one tick of its clock


def cache_home() -> Path:
    """Where this project keeps what it can make again: `$XDG_CACHE_HOME/pairstream`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairstream"


def index_files(path: Path) -> tuple[Path, Path]:
    """Where a shard's index may lie: beside the shard; in the cache, for shards whose folder cannot be written."""
    digest = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return path.with_name(path.name + SUFFIX), cache_home() / "index" / f"{digest}-{path.name}{SUFFIX}"


def index_shard(
    path: str | Path, name: str | None = None, expected: int | None = None, *, tag: str | None = None
) -> ShardIndex:
    """The index of one shard, from its file where there is one that fits, otherwise by a scan.

    0.1 ms for a shard of 1,000 samples from its file, 10 ms by a scan. Several processes may do it at once.

    Args:
        path: A local tar file.
        name: How messages call it; the path when None.
        expected: Samples that its manifest promises, when there is one.
        tag: For a shard that was fetched, the version of its source (empty when unknown); None for a shard of
            one's own, which is known by its size and time.

    Returns:
        The index, as `data.tar.scan_shard` gives it.

    Raises:
        OSError: The shard cannot be read.
    """
    path = Path(path)
    name = str(path) if name is None else name
    found = path.stat()
    stamp = [found.st_size, found.st_mtime_ns if tag is None else tag, expected]
    for file in index_files(path):
        index = read_index(file, path, name, stamp)
        if index is not None:
            return index
    index = replace(scan_shard(path, name, expected), tag=tag or "")
    if tag is not None or not 0 <= time.time() - found.st_mtime < YOUNG:
        keep_index(index, path, stamp)
    return index


def fetched_index(path: Path, name: str, expected: int | None) -> ShardIndex | None:
    """The index of a shard of the cache, which need not lie there any more; None when it was never made."""
    index = read_index(index_files(path)[0], path, name, None)
    return index if index is not None and not (expected and expected != len(index)) else None


def far_file(path: Path) -> Path:
    """Where the index is kept that lay beside a shard elsewhere, until the shard itself has been seen."""
    return path.with_name(f"{path.name}.far{SUFFIX}")


def far_index(path: Path, name: str, expected: int | None) -> ShardIndex | None:
    """What `keep_far_index` kept; None when there is nothing, or the manifest promises another number of samples."""
    index = read_index(far_file(path), path, name, None)
    if index is None or (expected and expected != len(index)):
        return None
    return replace(index, seen=False)


def keep_far_index(content: bytes, path: Path, name: str, size: int | None, tag: str) -> None:
    """Keep the index that lies beside a shard elsewhere, when it can be that of the shard which lies there now.

    It can be when the sizes agree. Whether it is shows when the shard is fetched, and only then `confirm_index` makes
    it one that others trust.

    Args:
        content: Of the index file.
        path: Where the shard will lie.
        name: The shard.
        size: Bytes that it has at its source.
        tag: Its version at its source.
    """
    index = parse_index(content, path, name, None)
    if index is not None and index.bytes == size:
        write_index(far_file(path), pack(index, [size, tag, None]))


def confirm_index(index: ShardIndex, path: Path, tag: str) -> bool:
    """Whether a shard that has just been fetched is the one that was indexed; if not, the index is forgotten.

    Sizes and times tell little, and not every source has a tag: the headers are read, 10 us a sample.

    Args:
        index: What is believed of it.
        path: Where it lies for now.
        tag: The version that its source gave.
    """
    home = Path(index.path)
    same = not (tag and index.tag and tag != index.tag) and path.stat().st_size == index.bytes
    same = same and same_places(scan_shard(path), index)
    if not same:
        home.with_name(home.name + SUFFIX).unlink(missing_ok=True)
        write_index(far_file(home), b"")  # what lies at the source is not believed again
    elif far_file(home).is_file():
        keep_index(index, home, [index.bytes, tag, None])
        far_file(home).unlink(missing_ok=True)
    return same


def keep_index(index: ShardIndex, path: Path, stamp: list[Any]) -> None:
    """Write an index beside its shard, or into the cache; not being able to is no error."""
    content = pack(index, stamp)
    for file in index_files(path):
        if write_index(file, content):
            return


def write_index(file: Path, content: bytes) -> bool:
    """Write an index file, whole or not at all; False when it cannot be."""
    temporary = aside(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # No fsync, which would take longer than the scan: a torn file is known by its checksum.
        temporary.write_bytes(content)
        temporary.replace(file)
        return True
    except OSError as error:
        logger.debug("index %s cannot be kept: %s", file, error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False


def pack(index: ShardIndex, stamp: list[Any]) -> bytes:
    """The content of an index file."""
    arrays = (index.starts, index.offsets, index.sizes, index.extensions, index.keys)
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    head = {
        "format": FORMAT,
        "stamp": stamp,
        "samples": len(index),
        "files": len(index.offsets),
        "key_bytes": index.keys.dtype.itemsize,
        "names": index.names,
        "faults": [[fault.cause, fault.key, fault.detail, fault.count] for fault in index.faults],
        "crc32": zlib.crc32(body),
    }
    return json.dumps(head).encode("ascii") + b"\n" + body


def read_index(file: Path, path: Path, name: str, stamp: list[Any] | None) -> ShardIndex | None:
    """An index from its file; None when there is none, it is damaged, or its shard is another now.

    Args:
        file: The index.
        path: Its shard.
        name: How messages call the shard.
        stamp: Size, time or tag, and promised samples that the shard has; None trusts the file.
    """
    try:
        content = file.read_bytes()
    except OSError:
        return None
    return parse_index(content, path, name, stamp)


def parse_index(content: bytes, path: Path, name: str, stamp: list[Any] | None) -> ShardIndex | None:
    """An index from the content of its file; as `read_index`."""
    line, _, body = content.partition(b"\n")
    try:
        head = json.loads(line)
        fits = head["format"] == FORMAT and (stamp is None or head["stamp"] == stamp)
        if not fits or head["crc32"] != zlib.crc32(body):
            return None
        return unpack(head, body, path, name)
    except (ValueError, KeyError, TypeError):
        return None


def unpack(head: dict[str, Any], body: bytes, path: Path, name: str) -> ShardIndex:
    """The arrays of an index file, as views of its content."""
    samples, files = head["samples"], head["files"]
    arrays, first = [], 0
    for dtype, length in (
        *((np.int64, samples + 1), (np.int64, files), (np.int64, files)),
        *((np.uint16, files), (f"S{head['key_bytes']}", samples)),
    ):
        arrays.append(np.frombuffer(body, dtype, length, first))
        first += arrays[-1].nbytes
    starts, offsets, sizes, extensions, keys = arrays
    size, tag, _ = head["stamp"]
    faults = tuple(
        FaultRecord(cause, name, key, detail, count) for cause, key, detail, count in head["faults"]
    )
    return ShardIndex(
        path=str(path),
        name=name,
        keys=keys,
        starts=starts,
        extensions=extensions,
        offsets=offsets,
        sizes=sizes,
        names=tuple(head["names"]),
        faults=faults,
        bytes=size,
        tag=tag if isinstance(tag, str) else "",
    )
