"""Shards from elsewhere: fetched into a cache folder of bounded size, then read like any local file."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import urlsplit

from filelock import FileLock

from data.index import SUFFIX, cache_home, confirm_index, far_file, far_index, keep_far_index
from data.tar import ShardIndex
from pairstream.atomic import TEMPORARY, aside, fsync_path

logger = logging.getLogger(__name__)

ATTEMPTS = 5
PART = 8 << 20  # bytes of one request
TIMEOUT = 60.0  # seconds without a byte
ABANDONED = 3600.0  # seconds; a half-written file that nobody has touched for so long has no writer any more
GIVE_UP = {400, 401, 403, 404, 405, 410, 451}  # another attempt gets the same answer
PIPE = "pipe:"
VERSION = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created")
VERSION += ("blob_id",)  # of a file on the Hugging Face hub
Check: TypeAlias = Callable[[Path, str], None]
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}


def cache_folder() -> Path:
    """Where fetched shards are kept: `$XDG_CACHE_HOME/pairstream/shards`, by default under `~/.cache`."""
    return cache_home() / "shards"


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL or a `pipe:` command, and no local path."""
    return name.startswith(PIPE) or "://" in name


def local_shard(name: str, cache_dir: str | Path | None = None, *, backoff: float = 1.0) -> Path:
    """`ShardCache.local` for one shard, in a cache without a limit."""
    return ShardCache(Path(cache_dir or cache_folder()), backoff=backoff).local(name)[0]


@dataclass(frozen=True)
class ShardCache:
    """Shards that were fetched, the least recently used of which make room for others.

    Any number of processes may share the folder: each shard is fetched by one of them while the others wait, and a
    shard that is dropped while somebody reads it stays readable for him. A name stands for one immutable file: what is
    in the cache is not asked for again.

    Attributes:
        folder: The cache folder.
        limit: Bytes that all shards in it may take together; None for no limit.
        backoff: Seconds before the second attempt; doubled for each further one, five attempts in all without
            progress.
        confirmed: Shards whose index came without them and was found to be theirs by this process.
    """

    folder: Path
    limit: int | None = None
    backoff: float = 1.0
    confirmed: set[str] = field(default_factory=set, compare=False, repr=False)

    def path(self, name: str) -> Path:
        """Where the shard of a name lies, or would lie."""
        if not is_remote(name):
            return Path(name)
        digest = hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]
        last = "" if name.startswith(PIPE) else Path(urlsplit(name).path).name
        return self.folder / f"{digest}-{last or 'shard.tar'}"

    def prepare(self) -> None:
        """Make the cache folder, once for all shards: each of them would fail for the same reason.

        Raises:
            ValueError: It cannot be made, or not be written to.
        """
        try:
            (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
            usable = os.access(self.folder, os.W_OK)
        except OSError as error:
            raise ValueError(
                f"cache_dir {self.folder} cannot be made ({error}): give the path of a folder that can be written to"
            ) from error
        if not usable:
            raise ValueError(
                f"cache_dir {self.folder} cannot be written to: give another folder, or the right to"
            )

    def local(self, name: str, check: Check | None = None) -> tuple[Path, str | None]:
        """The local file of a shard, fetched first when it is not there.

        Args:
            name: A path, a URL of any scheme that fsspec knows, or `pipe:` and a shell command that writes the shard.
            check: Called with a shard that was fetched just now, and the version of its source, before others see it;
                what it raises is raised here, and the shard is not kept.

        Returns:
            The path, and the version of its source: empty when unknown or not asked for, None for a local path.

        Raises:
            FileNotFoundError: It cannot be had; the message has the name and the last answer.
            ValueError: An unknown scheme, or a shard larger than the limit.
            ImportError: The scheme needs a package that is not installed.
        """
        path = self.path(name)
        if not is_remote(name):
            return path, None
        if not self.use(path):
            locks = self.folder / ".locks"
            locks.mkdir(parents=True, exist_ok=True)
            with FileLock(locks / path.name):
                if not self.use(path):
                    return path, self.fetch(name, path, check)
        return path, ""

    def locate(self, index: ShardIndex) -> str:
        """The local path of an indexed shard, for `data.tar.ShardReader`.

        Raises:
            FetchError: It cannot be had, or is another than the one that was indexed.
        """

        def same(path: Path, tag: str) -> None:
            if not confirm_index(index, path, tag):
                raise FetchError(
                    "is another at its source than when it was indexed; the next start takes the new one"
                )

        try:
            path, tag = self.local(index.name, same)
        except FileNotFoundError as error:
            raise FetchError(str(error)) from error
        if not index.seen and index.name not in self.confirmed:
            if not tag:  # it was there already, and may have come after the index by other ways
                same(path, "")
            self.confirmed.add(index.name)
        return str(path)

    def index_from_afar(self, name: str, expected: int | None) -> ShardIndex | None:
        """The index of a shard elsewhere from the file that lies beside it there, which saves fetching the shard.

        Args:
            name: A URL.
            expected: Samples that its manifest promises, when there is one.

        Returns:
            None when there is none, it is damaged, or the shard has another size now; the shard says all then.
        """
        path = self.path(name)
        if far_file(path).is_file() or name.startswith(PIPE):
            return far_index(path, name, expected)
        require_scheme(name)
        source = Ranges(name)
        try:
            source.begin()
            content = source.system.cat_file(source.path_beside(SUFFIX))
        except Exception as error:  # whatever a file system or its network library raises
            logger.debug("no index beside %s: %s", name, error)
            return None
        keep_far_index(content, path, name, source.size, source.tag)
        return far_index(path, name, expected)

    def use(self, path: Path) -> bool:
        """Note that a shard is read now; False when it is not there."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def fetch(self, name: str, path: Path, check: Check | None = None) -> str:
        """Bring a shard into the cache; returns its source's version."""
        require_scheme(name)
        for left in self.folder.glob(
            f"{TEMPORARY}{path.name}-*"
        ):  # of a process that was killed: the lock is ours
            left.unlink(missing_ok=True)
        temporary = aside(path)
        try:
            with temporary.open("wb") as file:
                transfer = Pipe(name) if name.startswith(PIPE) else Ranges(name)
                self.persist(transfer, file)
            if transfer.size is None:
                self.make_room(0, name)  # it has become known only now
            if check is not None:
                check(temporary, transfer.tag)
            fsync_path(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return transfer.tag

    def persist(self, transfer: Pipe | Ranges, file: BinaryIO) -> None:
        """Carry a transfer through, with pauses after each failure."""
        failures = 0
        while True:
            before = file.tell()
            try:
                if not transfer.begun:
                    transfer.begin()
                    if transfer.size is not None:
                        self.make_room(transfer.size, transfer.name)
                        file.truncate(transfer.size)  # others that count the folder see it whole
                transfer.carry_on(file)
                return
            except TooLargeError:
                raise
            except Exception as error:  # whatever a file system or its network library raises
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                failures = 1 if file.tell() > before else failures + 1
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                if _hopeless(error) or failures == ATTEMPTS:
                    raise FileNotFoundError(
                        f"shard {transfer.name} cannot be fetched ({failures} attempts): {reason}. "
                        "Check the address and the connection, or copy the shard and give its local path."
                    ) from error
                pause = self.backoff * 2 ** (failures - 1)
                logger.warning("shard %s: %s; another attempt in %.0f s", transfer.name, reason, pause)
                time.sleep(pause)

    def make_room(self, size: int, name: str) -> None:
        """Drop the least recently used shards until one of `size` bytes fits in."""
        if self.limit is None:
            return
        if size > self.limit:
            raise TooLargeError(
                f"shard {name} has {size:,} bytes, more than cache_limit ({self.limit:,}): raise the limit"
            )
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / "room"):
            held = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):  # dropped by another process
                    if entry.is_file() and not entry.name.endswith(SUFFIX):
                        found = entry.stat()
                        held.append((found.st_mtime, found.st_size, entry))
            total = sum(taken for _, taken, _ in held) + size
            for used, taken, entry in sorted(held, key=lambda row: row[0]):
                if total <= self.limit:
                    break
                written = entry.name.startswith(TEMPORARY)
                if not written or time.time() - used > ABANDONED:
                    with suppress(FileNotFoundError):
                        Path(entry.path).unlink()
                    total -= taken


def _hopeless(error: Exception) -> bool:
    """Whether another attempt would end the same."""
    answer = getattr(error, "response", None)  # huggingface_hub's errors carry it, aiohttp's only its status
    status = getattr(error, "status", getattr(answer, "status_code", None))
    offline = type(error).__name__ == "OfflineModeIsEnabled"  # huggingface_hub's, with HF_HUB_OFFLINE set
    return offline or status in GIVE_UP or isinstance(error, FileNotFoundError | PermissionError)


class FetchError(OSError):
    """A shard cannot be had, and asking again at once is of no use."""


class TooLargeError(ValueError):
    """A shard is larger than the whole cache may be."""


class Ranges:
    """A file of any file system that fsspec knows, a range at a time, so that a broken one is all that is lost."""

    def __init__(self, name: str):
        self.name, self.tag, self.begun = name, "", False
        self.size: int | None = None

    def begin(self) -> None:
        """Ask for size and version."""
        import fsspec

        options: dict[str, Any] = {}
        if self.name.startswith(("http://", "https://")):
            from aiohttp import ClientTimeout

            options["client_kwargs"] = {
                "timeout": ClientTimeout(total=None, connect=TIMEOUT, sock_read=TIMEOUT)
            }
        # A fresh one: file systems are not made to be used after a fork.
        self.system, self.path = fsspec.core.url_to_fs(self.name, use_listings_cache=False, **options)
        # A file of the hub would read 5 MiB ahead of each range, and forget them.
        self.reading = {"cache_type": "none"} if self.name.startswith("hf://") else {}
        info = self.system.info(self.path)
        self.size = info.get("size")
        self.ranges = info.get("partial", True)
        self.tag = next((str(info[key]) for key in VERSION if info.get(key)), "")
        self.begun = True

    def path_beside(self, suffix: str) -> str:
        """The path of the file whose name has this suffix more; what follows a URL's `?` stays behind it."""
        path, mark, query = self.path.partition("?") if "://" in self.path else (self.path, "", "")
        return path + suffix + mark + query

    def carry_on(self, file: BinaryIO) -> None:
        """Go on where the last range ended."""
        if self.size is None or not self.ranges:
            content = self.system.cat_file(self.path)
            if self.size is not None and len(content) != self.size:
                raise ConnectionError(f"{len(content)} of {self.size} bytes came")
            file.write(content)
            return
        while file.tell() < self.size:
            first = file.tell()
            last = min(first + PART, self.size)
            content = self.system.cat_file(self.path, start=first, end=last, **self.reading)
            if len(content) == self.size != last - first:  # the server knows no ranges and sent everything
                content = content[first:]
            elif len(content) != last - first:
                raise ConnectionError(f"{len(content)} of {last - first} bytes came from byte {first} on")
            file.write(content)


class Pipe:
    """What a shell command writes; it starts over when it fails."""

    def __init__(self, name: str):
        self.name, self.tag, self.begun = name, "", True
        self.size: int | None = None

    def begin(self) -> None:
        """Nothing is known before it has run."""

    def carry_on(self, file: BinaryIO) -> None:
        """Run it."""
        file.seek(0)
        file.truncate()
        command = self.name.removeprefix(PIPE)
        done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, check=False)
        file.seek(0)  # the child moved the place that both share; a failure has made no progress
        said = done.stderr.decode("utf-8", "replace").strip()[-300:]
        if done.returncode:
            raise ConnectionError(f"the command ended with {done.returncode}{': ' if said else ''}{said}")
        if not os.fstat(file.fileno()).st_size:  # as when the first part of a pipeline fails
            raise ConnectionError(f"the command wrote nothing{': ' if said else ''}{said}")


def remote_glob(pattern: str) -> list[str]:
    """The shards elsewhere whose URLs match a pattern, sorted.

    Args:
        pattern: A URL with `*`, `?` or `[...]` of a file system that can list its folders: s3, gs, hf and others, but
            not http.

    Raises:
        ValueError: An unknown scheme, or the folder cannot be listed.
        ImportError: The scheme needs a package that is not installed.
    """
    import fsspec

    require_scheme(pattern)
    try:
        system, path = fsspec.core.url_to_fs(pattern, use_listings_cache=False)
        return sorted(system.unstrip_protocol(found) for found in system.glob(path))
    except Exception as error:  # whatever a file system or its network library raises
        raise ValueError(
            f"shards {pattern} cannot be listed: {type(error).__name__}: {error}. Check the address and the "
            "connection, or name the shards with braces as in {00000..00041}.tar."
        ) from error


def require_scheme(name: str) -> None:
    """Make sure that a name's scheme is known and its package installed.

    Raises:
        ValueError: fsspec knows no such scheme.
        ImportError: Its package is absent.
    """
    from fsspec.registry import get_filesystem_class, known_implementations, registry

    if name.startswith(PIPE):
        return
    scheme = name.partition("://")[0]
    package = PACKAGES.get(scheme)
    if package and importlib.util.find_spec(package) is None:
        raise ImportError(
            f"shard {name}: {scheme}:// needs the package {package}: pip install 'pairstream[remote]'"
        )
    if scheme not in known_implementations and scheme not in registry:
        raise ValueError(
            f"shard {name}: expected a local path, `pipe:COMMAND`, or a URL whose scheme fsspec knows (http, https, "
            f"s3, gs, hf, ...), got the scheme {scheme!r}"
        )
    get_filesystem_class(scheme)
