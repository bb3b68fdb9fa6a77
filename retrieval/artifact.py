"""Folders that this stage writes and reads back: files, and a manifest that has the checksum of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pairstream import __version__
from pairstream.atomic import new_folder, write_text
from pairstream.run import finite

MANIFEST = "manifest.json"


def refuse_to_replace(folder: str | Path, kind: str, *, overwrite: bool) -> None:
    """Stop before the work when `folder` holds something that must not be replaced.

    Raises:
        FileExistsError: It is not empty and `overwrite` is False, or it is not of this kind.
    """
    path = Path(folder)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        ours = json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("format") == kind
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise FileExistsError(f"{path} exists and holds no {kind}: choose another --out")
    if not overwrite:
        raise FileExistsError(
            f"{path} already holds {kind}: choose another --out, or replace it with --overwrite"
        )


@contextmanager
def new_artifact(
    folder: str | Path,
    kind: str,
    content: dict[str, Any],
    *,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> Iterator[Path]:
    """Fill a folder aside; it appears as a whole, with its manifest.

    Args:
        folder: Its final name.
        kind: What it is, such as `pairstream-index`.
        content: Further keys of the manifest; may be completed until the folder is filled.
        known: Entries of files whose checksum need not be computed again, such as links to unchanged ones.

    Yields:
        The temporary folder to write files into.
    """
    with new_folder(Path(folder)) as temporary:
        yield temporary
        write_manifest(
            temporary, kind, content, sorted(path.name for path in temporary.iterdir()), known=known
        )


def write_manifest(
    folder: str | Path,
    kind: str,
    content: dict[str, Any],
    names: Iterable[str],
    *,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write a folder's manifest, with size and checksum of the named files; see `new_artifact`.

    Returns:
        The manifest.
    """
    folder, known = Path(folder), known or {}
    files = {
        name: known.get(name) or {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
    }
    manifest = {"format": kind, "version": __version__, **content, "files": files}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def read_artifact(folder: str | Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder whose files are all there and unchanged.

    Args:
        folder: What `new_artifact` wrote.
        kind: What it must be.

    Raises:
        FileNotFoundError: No manifest there.
        ValueError: Another kind of folder, or a file that is missing, cut or changed.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"{path / MANIFEST} does not exist: expected a folder of {kind}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found, files = manifest["format"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST} is damaged ({error!r}): write the folder again") from error
    if found != kind:
        raise ValueError(f"{path}: expected a folder of {kind}, found {found!r}")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: write the folder again")
        if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
            raise ValueError(f"{file} is damaged: its checksum is not the manifest's; write the folder again")
    return manifest


def sha256(path: Path) -> str:
    """Checksum of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One JSON object for people and programs; NaN and infinities, which JSON does not have, become null."""
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """JSON objects, one a line."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
