"""Copies of checkpoints elsewhere: any place that fsspec knows (`s3://`, `gs://`, `hf://`, a mounted folder)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pairstream.atomic import new_folder
from pretrain.checkpoint import STATE

MARKER = f"training/{STATE}"
"""Copied last: a checkpoint without it is not whole."""


def open_place(url: str) -> tuple[Any, str]:
    """The file system and the path of a URL.

    Raises:
        ValueError: fsspec knows no such protocol, or misses the package for it.
    """
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"checkpoint.copy_to {url!r}: expected a folder or a URL that fsspec knows (s3://, gs://, ...): {error}"
        ) from error
    return files, root.rstrip("/")


def copy_checkpoint(folder: Path, url: str, *, keep: int | None = None) -> str:
    """Copy a checkpoint into a place, where it is whole or is not taken for one.

    Object stores have no rename, so the file that makes a checkpoint one is copied last, and taken away first.

    Args:
        folder: The checkpoint, `step-N`.
        url: A folder of any file system that fsspec knows.
        keep: How many of the newest stay there; None leaves all.

    Returns:
        Where it lies.

    Raises:
        OSError: A file arrived with another size; and whatever the file system raises.
    """
    files, root = open_place(url)
    target = f"{root}/{folder.name}"
    if files.exists(f"{target}/{MARKER}"):
        files.rm(f"{target}/{MARKER}")
    every = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in sorted(every, key=lambda path: path == folder / MARKER):
        name = path.relative_to(folder).as_posix()
        files.makedirs(f"{target}/{name}".rsplit("/", 1)[0], exist_ok=True)
        files.put_file(str(path), f"{target}/{name}")
        size = files.size(f"{target}/{name}")
        if size != path.stat().st_size:
            raise OSError(f"{target}/{name} has {size} bytes, {path} {path.stat().st_size}")
    for name in whole_copies(files, root)[keep:] if keep else []:
        files.rm(f"{root}/{name}/{MARKER}")
        files.rm(f"{root}/{name}", recursive=True)
    return target


def whole_copies(files: Any, root: str) -> list[str]:
    """Names of the checkpoints in a place, newest first."""
    files.invalidate_cache()
    if not files.exists(root):
        return []
    names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(root, detail=False)]
    return sorted(
        (name for name in names if name.startswith("step-") and files.exists(f"{root}/{name}/{MARKER}")),
        reverse=True,
    )


def fetch_newest(url: str, checkpoints: Path) -> Path | None:
    """Bring the newest copy back into a run's folder of checkpoints.

    Returns:
        The checkpoint's folder there; None where the place has none.
    """
    files, root = open_place(url)
    names = whole_copies(files, root)
    if not names:
        return None
    place = f"{root}/{names[0]}"
    with new_folder(checkpoints / names[0]) as temporary:
        for remote in files.find(place):
            local = temporary / remote[remote.index(names[0]) + len(names[0]) + 1 :]
            local.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(remote, str(local))
    return checkpoints / names[0]
