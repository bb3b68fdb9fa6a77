"""Shards: WebDataset tar files of image-text samples, their names, and the writer with its manifest."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import webdataset

from pairstream.atomic import aside, fsync_path, write_text

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MANIFEST = "manifest.json"
INDEX_SUFFIX = ".tar.idx"  # of what readers keep beside a shard
UNLISTED = {"pipe", "http", "https"}  # sources that cannot say what lies there
REMOTE_PATTERN = re.compile(r"[*[]|\?(?!\w+=)")  # what follows `?` in `?versionId=...` is no pattern


@dataclass(frozen=True)
class Sample:
    """One image with its texts, as it goes into a shard.

    Attributes:
        key: Unique in the data set; letters, digits, `-` and `_` (a dot would start the extension).
        image: The encoded picture, bytes.
        extension: `jpg`, `png` or `webp`.
        captions: Texts of the picture; the first one is also written as `KEY.txt`.
        meta: Further JSON keys (`url`, `label`, `questions`, `text`, ...; docs/data.md has the format).
    """

    key: str
    image: bytes
    extension: str
    captions: Sequence[str] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def members(self) -> dict[str, bytes]:
        """The sample's files by extension."""
        record = dict(self.meta)
        if self.captions:
            record = {"caption": self.captions[0], "captions": list(self.captions), **record}
        files = {self.extension: self.image}
        if self.captions:
            files["txt"] = self.captions[0].encode("utf-8")
        # Half a character, which UTF-8 cannot hold, is escaped as JSON itself does it.
        files["json"] = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
        return files


class ShardFile:
    """One shard while it is written; it appears under its name only when it is complete.

    Args:
        path: The shard's name.

    Attributes:
        samples: How many were written.
    """

    def __init__(self, path: Path):
        self.path, self.temporary = path, aside(path)
        self.file: Any = self.temporary.open("wb")
        self.tar = webdataset.TarWriter(self.file, encoder=False, mtime=0)
        self.samples = 0

    def write(self, key: str, files: dict[str, bytes]) -> None:
        """Append one sample, given as its files by extension."""
        self.tar.write({"__key__": key, **files})
        self.samples += 1

    def finish(self) -> dict[str, Any]:
        """Complete the shard; returns its entry in a manifest."""
        self.tar.close()
        self.file.close()
        fsync_path(self.temporary)
        digest = hashlib.sha256(self.temporary.read_bytes()).hexdigest()
        size = self.temporary.stat().st_size
        self.temporary.replace(self.path)
        return {"samples": self.samples, "bytes": size, "sha256": digest}

    def abandon(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):  # on a full disk its last blocks cannot be written either
            self.tar.close()
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def write_manifest(folder: Path, shards: dict[str, dict[str, Any]]) -> None:
    """Write `manifest.json`, from the entries of all shards by file name."""
    samples = sum(entry["samples"] for entry in shards.values())
    manifest = {"format": "webdataset", "samples": samples, "shards": shards}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


class ShardWriter:
    """Write samples into numbered shards and a manifest; equal samples give equal bytes.

    A shard appears under its name only when it is complete, and the manifest when all are.

    Args:
        folder: Where `00000.tar`, `00001.tar`, ... and `manifest.json` go.
        samples_per_shard: Samples a shard holds at the most.
        overwrite: Remove the shards of an earlier, finished or unfinished, writing first.

    Raises:
        FileExistsError: The folder holds shards and `overwrite` is False.
        ValueError: `samples_per_shard` below 1, a bad or repeated key, an unknown image extension.

    Example:
        >>> with ShardWriter(folder) as writer:                                   # doctest: +SKIP
        ...     writer.write(Sample("000000001", jpeg, "jpg", ["a dog on a beach"]))
    """

    def __init__(self, folder: str | Path, *, samples_per_shard: int = 1000, overwrite: bool = False):
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        old = sorted(self.folder.glob("*.tar"))
        if old and not overwrite:
            raise FileExistsError(
                f"{self.folder} already holds {len(old)} shards ({old[0].name} ...). "
                "Choose another --out, or replace them with --overwrite."
            )
        for path in [*old, self.folder / MANIFEST]:
            path.unlink(missing_ok=True)
        self.shards: dict[str, dict[str, Any]] = {}
        self.keys: set[str] = set()
        self.samples = 0
        self.shard: ShardFile | None = None

    def write(self, sample: Sample) -> None:
        """Append one sample."""
        if not re.fullmatch(r"[\w-]+", sample.key):
            raise ValueError(f"key {sample.key!r}: expected letters, digits, '-' and '_' only")
        if sample.key in self.keys:
            raise ValueError(f"key {sample.key!r} was written before: keys must be unique in a data set")
        if sample.extension not in IMAGE_EXTENSIONS:
            raise ValueError(
                f"sample {sample.key!r}: image extension {sample.extension!r}, "
                f"expected one of {', '.join(IMAGE_EXTENSIONS)}"
            )
        if self.shard is None:
            self.shard = ShardFile(self.folder / f"{len(self.shards):05d}.tar")
        self.shard.write(sample.key, sample.members())
        self.keys.add(sample.key)
        self.samples += 1
        if self.shard.samples == self.samples_per_shard:
            self.finish_shard()

    def finish_shard(self) -> None:
        assert self.shard is not None
        self.shards[self.shard.path.name] = self.shard.finish()
        self.shard = None

    def close(self) -> None:
        """Finish the last shard and write the manifest."""
        if self.shard is not None:
            self.finish_shard()
        write_manifest(self.folder, self.shards)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self.shard is not None:
            self.shard.abandon()


def expand_shards(shards: str | Path | Iterable[str | Path]) -> list[str]:
    """Names of the shards that a specification means, in a fixed order.

    Args:
        shards: One or several of: a folder (all its `*.tar`), a file, a glob, braces as in
            `train-{00000..00041}.tar`, a URL with or without braces, a glob as a URL (not of http, which lists no
            folders), `pipe:` and a command that writes a shard.

    Returns:
        Sorted paths of a glob or folder, otherwise the given order; no duplicates, and no index files.

    Raises:
        ValueError: Nothing was given, a folder or glob holds nothing, a shard that is named does not exist, or a
            folder elsewhere cannot be listed.
    """
    words = [shards] if isinstance(shards, str | Path) else list(shards)
    if not words:
        raise ValueError("the shard list is empty: expected at least one path, glob or URL of .tar files")
    found: list[str] = []
    for word in words:
        for name in expand_braces(str(word)):
            if not name.strip():
                raise ValueError(
                    "the name of a shard is empty: expected a path, a glob or a URL of .tar files"
                )
            here = [path for path in find_shards(name) if not path.endswith(INDEX_SUFFIX)]
            if not here:  # a mount that is missing must not pass for a part without samples
                raise ValueError(f"no shards found: {name} matches no .tar file")
            found += here
    return list(dict.fromkeys(found))


def find_shards(name: str) -> list[str]:
    """What one name without braces means; see `expand_shards`."""
    scheme = "pipe" if name.startswith("pipe:") else name.partition("://")[0] if "://" in name else ""
    if scheme in UNLISTED:
        if scheme != "pipe" and "*" in name.partition("?")[0]:
            raise ValueError(
                f"no shards at {name}: {scheme} lists no folders, so name them with braces as in {{00000..00041}}.tar "
                "(and write %2A for a * in the address itself)"
            )
        return [name]
    if scheme and REMOTE_PATTERN.search(name):
        from data.fetch import remote_glob

        return remote_glob(name)
    if scheme or Path(name).is_file():
        return [name]
    if Path(name).is_dir():
        return sorted(str(path) for path in Path(name).glob("*.tar"))
    if any(sign in name for sign in "*?["):
        return sorted(glob.glob(name))  # noqa: PTH207 - the pattern may be absolute
    raise ValueError(
        f"no shards at {name}: expected a .tar file, a folder of them, a glob, a URL or pipe:COMMAND"
    )


def expand_braces(name: str) -> list[str]:
    """`a-{00..02}.tar` and `a-{x,y}.tar` as lists of names, as in bash (numbers keep their width)."""
    match = re.search(r"\{([^{}]*)\}", name)
    if match is None:
        return [name]
    inside = match.group(1)
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if bounds:
        first, last = bounds.groups()
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
    else:
        choices = inside.split(",")
    head, tail = name[: match.start()], name[match.end() :]
    return [expanded for choice in choices for expanded in expand_braces(head + choice + tail)]
