"""Change an index on disk: add rows, delete keys, merge another index, rebuild it as one segment.

Files that stay are linked into the new version of the folder, which replaces the old one as a whole: a reader has
the old or the new index, never half of one, and nothing that is not new is written again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.artifact import new_artifact, read_artifact
from retrieval.build import Options, build_segment, query_count, sample_rows
from retrieval.first_pass import PartsSource, key_hashes
from retrieval.index import KIND, Index, segment_entry
from retrieval.parts import SIDES, EmbeddingSet
from retrieval.side import Side

COMPACT_ABOVE = 8  # segments past which each search pays for all of them


def add_to_index(
    folder: str | Path, embeddings: str | Path | EmbeddingSet, *, options: Options | None = None
) -> Index:
    """Add the rows of embeddings as a new segment, which is chosen for their number.

    Args:
        folder: The index; it is replaced by its new version.
        embeddings: A folder of embeddings of the same model.
        options: What is asked of the new segment.

    Returns:
        The new index.

    Raises:
        ValueError: Embeddings of another model or width, a key that the index already has.
    """
    index, manifest = Index.load(folder), read_artifact(folder, KIND)
    found = embeddings if isinstance(embeddings, EmbeddingSet) else EmbeddingSet.open(embeddings)
    index.check_model(found.manifest["fingerprint"], found.manifest["model"])
    if found.dim != index.dim:
        raise ValueError(f"the embeddings are {found.dim} wide, the index {index.dim}: use the index's model")
    sides = [side for side in SIDES if manifest[side]]
    keys = (record["key"] for part in found for record in part.image_records)
    refuse_known(index, keys, str(found.folder))
    with changed(folder, manifest) as (temporary, content):
        for side in sides:
            if not found.count(side):
                continue
            other = SIDES[1 - SIDES.index(side)]
            queries = sample_rows(found, other, query_count(found.count(side)))
            segment = build_segment(
                PartsSource(found, side),
                temporary,
                side,
                options or Options(),
                queries=queries,
                query_kind=other,
            )
            content[side].append(segment_entry(segment))
            grow_deleted(temporary, content, side, len(segment))
    return Index.load(folder)


def delete_from_index(folder: str | Path, keys: Iterable[str]) -> Index:
    """Delete pictures by key, with their texts: no search finds them any more; `compact_index` frees their space.

    Returns:
        The new index.

    Raises:
        ValueError: A key that the index does not have, or nothing would be left.
    """
    index, manifest = Index.load(folder), read_artifact(folder, KIND)
    wanted = set(keys)
    known: set[str] = set()
    masks: dict[str, np.ndarray] = {}
    for name in SIDES:
        side: Side | None = getattr(index, name)
        if side is None:
            continue
        deleted = np.zeros(side.ntotal, dtype=bool) if side.deleted is None else side.deleted.copy()
        for row, record in enumerate(side.records):
            if record["key"] in wanted and not deleted[row]:
                deleted[row] = True
                known.add(record["key"])
        if deleted.all():
            raise ValueError(f"{folder}: all {name} would be deleted: remove the folder instead")
        masks[name] = deleted
    if wanted - known:
        some = ", ".join(map(repr, sorted(wanted - known)[:3]))
        raise ValueError(
            f"{folder}: {len(wanted - known)} of {len(wanted)} keys are not in the index: {some}"
        )
    with changed(folder, manifest) as (temporary, content):
        for name, deleted in masks.items():
            put_deleted(temporary, content, name, deleted)
    return Index.load(folder)


def merge_indexes(folder: str | Path, other: str | Path) -> Index:
    """Take the segments of another index of the same model into this one; the other stays as it is.

    Returns:
        The new index.

    Raises:
        ValueError: Another model, width or choice of sides, or a key that both have.
    """
    index, manifest = Index.load(folder), read_artifact(folder, KIND)
    more, added = Index.load(other), read_artifact(other, KIND)
    index.check_model(more.fingerprint, more.model)
    has = [[side for side in SIDES if one[side]] for one in (manifest, added)]
    if has[0] != has[1] or manifest["dim"] != added["dim"]:
        raise ValueError(
            f"{folder} holds {' and '.join(has[0])} of {manifest['dim']} dimensions, {other} "
            f"{' and '.join(has[1])} of {added['dim']}: only alike indexes can be merged"
        )
    side = more.side(has[0][0])
    gone = np.zeros(side.ntotal, dtype=bool) if side.deleted is None else side.deleted
    refuse_known(
        index, (record["key"] for record, out in zip(side.records, gone, strict=True) if not out), str(other)
    )
    with changed(
        folder, manifest, {name: entry for name, entry in added["files"].items() if "deleted" not in name}
    ) as (
        temporary,
        content,
    ):
        for name in added["files"]:
            if "deleted" not in name:
                link(Path(other) / name, temporary / name)
        for name in has[0]:
            content[name] += added[name]
            grow_deleted(
                temporary,
                content,
                name,
                sum(entry["rows"] for entry in added[name]),
                getattr(more, name).deleted,
            )
    return Index.load(folder)


def compact_index(folder: str | Path, *, options: Options | None = None) -> Index:
    """Rebuild an index as one segment a side, without what was deleted; rows are those that it keeps.

    Returns:
        The new index.
    """
    index, manifest = Index.load(folder), read_artifact(folder, KIND)
    content = {**manifest, "deleted": {}, **{side: [] for side in SIDES}}
    for name in ("format", "version", "files"):
        del content[name]
    sources = {name: SideSource(getattr(index, name)) for name in SIDES if getattr(index, name) is not None}
    with new_artifact(folder, KIND, content) as temporary:
        for name, source in sources.items():
            other = sources.get(SIDES[1 - SIDES.index(name)])
            queries = np.zeros((0, index.dim), np.float32)
            if other is not None:
                chosen = np.sort(
                    np.random.default_rng(0).permutation(other.count)[: query_count(source.count)]
                )
                queries = other.side.vectors(other.rows[chosen])
            segment = build_segment(
                source,
                temporary,
                name,
                options or Options(),
                queries=queries,
                query_kind=SIDES[1 - SIDES.index(name)],
            )
            content[name].append(segment_entry(segment))
    return Index.load(folder)


class SideSource:
    """The rows of a side that were not deleted."""

    def __init__(self, side: Side):
        self.side, self.dim = side, side.d
        self.rows = np.arange(side.ntotal) if side.deleted is None else np.flatnonzero(~side.deleted)
        self.count = len(self.rows)

    def blocks(self, *, records: bool = False) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
        for start in range(0, self.count, 10_000):
            mine = self.rows[start : start + 10_000]
            yield (
                self.side.vectors(mine),
                [self.side.records[row] for row in mine.tolist()] if records else [],
            )


def refuse_known(index: Index, keys: Iterable[str], where: str) -> None:
    """Stop when a key of something new is one that a search may find already.

    Raises:
        ValueError: With the key.
    """
    side = index.images or index.texts
    assert side is not None
    alive = np.ones(side.ntotal, dtype=bool) if side.deleted is None else ~side.deleted
    hashes = np.sort(key_hashes(list(side.records))[alive])
    for key in keys:
        (mine,) = key_hashes([{"key": key}])
        place = int(np.searchsorted(hashes, mine))
        if place < len(hashes) and hashes[place] == mine:
            raise ValueError(
                f"the index already holds the key {key!r} of {where}: delete it first, or give the new rows keys of "
                "their own"
            )


@contextmanager
def changed(
    folder: str | Path, manifest: dict[str, Any], more: Mapping[str, dict[str, Any]] | None = None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The next version of an index, to be filled: its files are linked and its manifest's content is a copy.

    Args:
        folder: The index.
        manifest: Its manifest.
        more: Entries of further files whose checksums are known.
    """
    content = {name: value for name, value in manifest.items() if name not in ("format", "version", "files")}
    content |= {side: list(content[side]) for side in SIDES} | {"deleted": dict(content["deleted"])}
    known = {
        name: entry for name, entry in manifest["files"].items() if name not in manifest["deleted"].values()
    }
    with new_artifact(folder, KIND, content, known={**known, **(more or {})}) as temporary:
        for name in manifest["files"]:
            link(Path(folder) / name, temporary / name)
        yield temporary, content


def link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy on storage without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def put_deleted(folder: Path, content: dict[str, Any], side: str, deleted: np.ndarray) -> None:
    name = f"{side}.deleted.npy"
    (folder / name).unlink(missing_ok=True)  # a link to the old version's file must not be written through
    np.save(folder / name, deleted)
    content["deleted"][side] = name


def grow_deleted(
    folder: Path, content: dict[str, Any], side: str, rows: int, more: np.ndarray | None = None
) -> None:
    """Make room for new rows among the deleted ones; `more` are those of them that are deleted."""
    name = content["deleted"].get(side)
    if name is None and more is None:
        return
    before = sum(entry["rows"] for entry in content[side]) - rows
    old = np.zeros(before, dtype=bool) if name is None else np.load(folder / name, allow_pickle=False)
    put_deleted(folder, content, side, np.concatenate([old, np.zeros(rows, bool) if more is None else more]))


def advice(index: Index) -> str:
    """What to do about an index that many small changes have made slow; empty when nothing."""
    sides: Sequence[Side] = [side for side in (index.images, index.texts) if side is not None]
    segments = max(len(side.segments) for side in sides)
    dead = max(1 - side.alive / side.ntotal for side in sides)
    if segments > COMPACT_ABOVE or dead > 0.2:
        return (
            f"{segments} segments, {dead:.0%} deleted: --compact makes searches faster and the index smaller"
        )
    return ""
