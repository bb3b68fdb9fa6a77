"""Writes that are whole or absent: write aside, fsync, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"  # a name that starts so is never read, and may be deleted


def fsync_path(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def aside(path: Path) -> Path:
    """The temporary neighbour in which a new version of `path` is written."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")


def check_place(path: Path, option: str) -> None:
    """Make the folder around a place and see that it can be written in: before the work, not after it.

    Args:
        path: The file or folder that an option names.
        option: Its name, for the message.

    Raises:
        ValueError: It cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {path}: no file can be written in {path.parent} ({error.strerror}): name another place, or get "
            "the right to write there"
        ) from error


def check_file_place(path: Path, option: str) -> None:
    """`check_place` for a file, which no folder may stand in the way of.

    Raises:
        ValueError: It cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
    check_place(path, option)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step.

    Args:
        path: The file; its folder is made when absent.
        content: All of its bytes.

    Raises:
        OSError: The disk is full or not writable; the old file is untouched and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = aside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder aside and let it appear under its name only when it is complete.

    Replacing an older folder takes two renames, since a rename onto a folder that is not empty is refused and
    Python has no exchange of two names. Between the two there is no folder at `path`: a process killed just then
    leaves the old one beside it as `.tmp-old-NAME-PID` and the new one, complete, as `.tmp-NAME-PID`. A new name
    for each version, as checkpoints have, avoids that.

    Args:
        path: The folder's final name; an older folder there is replaced.

    Yields:
        The temporary folder to write into.

    Raises:
        OSError: As raised by the writes inside; then the temporary folder is removed and `path` is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = aside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            fsync_path(file)
        fsync_path(temporary)
        if path.exists():
            old = path.with_name(f"{TEMPORARY}old-{path.name}-{os.getpid()}")
            path.replace(old)
            temporary.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)
