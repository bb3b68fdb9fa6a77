"""A FAISS index of a set's pictures and one of its texts, in a folder that knows its model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from retrieval.artifact import new_artifact, read_artifact, write_lines
from retrieval.parts import SIDES
from retrieval.side import Chain, Records, Segment, Side

if TYPE_CHECKING:  # an index is built and searched by rows without torch
    from retrieval.embed import Embeddings

KIND = "pairstream-index"


def flat_index(rows: np.ndarray, name: str = "embeddings") -> faiss.IndexFlatIP:
    """An exact inner-product index: `4 * dim` bytes a row, every query looks at every row.

    Args:
        rows: float `(n, dim)` unit rows.
        name: What they are, for messages.

    Returns:
        The index, holding a copy.

    Raises:
        ValueError: Not two dimensions, no rows, or NaN or infinite values, which FAISS takes without a word.
    """
    rows = checked_rows(rows, name)
    if not len(rows):
        raise ValueError(f"{name}: the gallery is empty, there is nothing to index")
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)  # pyright: ignore[reportCallIssue]
    return index


def top_k(
    index: Side | faiss.Index | None, queries: np.ndarray, k: int, *, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best rows for each query.

    Args:
        index: A side of an `Index`, or any inner-product index of FAISS.
        queries: float `(q, dim)`.
        k: Results wanted; all rows when the index has fewer.
        allowed: bool `(rows,)`: the only rows that may be found.

    Returns:
        Scores float32 and row numbers int64, both `(q, min(k, rows to be found))`, best first.

    Raises:
        ValueError: Another width than the index's, NaN or infinite values, k below 1.
    """
    queries = checked_rows(queries, "queries")
    if index is None:
        raise ValueError("this side was not indexed: build the index with it, or search the other side")
    if queries.shape[1] != index.d:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions, the index {index.d}: use the index's model"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    side = index if isinstance(index, Side) else Side([Segment(index)], [])
    if allowed is None:
        return side.search(queries, min(k, side.alive))
    if allowed.shape != (side.ntotal,):
        raise ValueError(
            f"allowed: expected one truth value for each of {side.ntotal} rows, got {allowed.shape}"
        )
    left = allowed if side.deleted is None else allowed & ~side.deleted
    return side.search(queries, min(k, int(left.sum())), allowed=allowed)


def checked_rows(rows: np.ndarray, name: str) -> np.ndarray:
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ValueError(f"{name}: expected (rows, dimensions), got shape {rows.shape}")
    bad = ~np.isfinite(rows).all(1)
    if bad.any():
        raise ValueError(
            f"{name}: row {int(bad.argmax())} has NaN or infinite values ({int(bad.sum())} such rows)"
        )
    return rows


@dataclass(frozen=True)
class Index:
    """Both sides of a set, or one of them, ready to be searched.

    Attributes:
        images: The pictures; None where they were not indexed.
        texts: The texts; None where they were not indexed.
        model: Name of the encoder, for people.
        fingerprint: Hash of the encoder that made the rows.
    """

    images: Side | None
    texts: Side | None
    model: str
    fingerprint: str

    @classmethod
    def build(cls, embeddings: Embeddings) -> Index:
        """Index embeddings exactly, in memory; `retrieval.build.build_index` is for larger sets.

        Raises:
            ValueError: An empty side, or values that are not finite.
        """
        images, texts = (
            Side([Segment(flat_index(rows, name))], records)
            for rows, name, records in (
                (embeddings.images, "image embeddings", embeddings.image_records()),
                (embeddings.texts, "text embeddings", indexed(embeddings.text_records())),
            )
        )
        return cls(images, texts, embeddings.model, embeddings.fingerprint)

    def side(self, name: str) -> Side:
        """`images` or `texts`.

        Raises:
            ValueError: Another name, or a side that was not indexed.
        """
        if name not in SIDES:
            raise ValueError(f"among: {name!r}, expected images or texts")
        side = getattr(self, name)
        if side is None:
            raise ValueError(
                f"this index holds no {name}: build it with --sides {name}, or search the other side"
            )
        return side

    @property
    def dim(self) -> int:
        """Width of the rows."""
        side = self.images or self.texts
        assert side is not None
        return side.d

    @property
    def image_records(self) -> Sequence[dict[str, Any]]:
        """One a picture: `key`, `sample` and what filters use."""
        return self.side("images").records

    @property
    def text_records(self) -> Sequence[dict[str, Any]]:
        """One a text: `text` and `key`."""
        return self.side("texts").records

    def check_model(self, fingerprint: str, name: str) -> None:
        """Make sure that queries come from the model that made the rows.

        Raises:
            ValueError: They come from another one.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the index holds embeddings of {self.model} (fingerprint {self.fingerprint}), the queries are "
                f"from {name} ({fingerprint}): their scores would mean nothing. "
                "Search with that model, or embed and index again with this one."
            )

    def save(self, folder: str | Path) -> Path:
        """Write an index that was built in memory, all or none: see `index_manifest` for what it holds.

        Returns:
            The folder.
        """
        content = index_manifest(self.model, self.fingerprint, self.dim)
        with new_artifact(folder, KIND, content) as temporary:
            for name in SIDES:
                side: Side | None = getattr(self, name)
                if side is not None:
                    (segment,) = side.segments  # what came from a folder has files already
                    segment = replace(segment, name=f"{name}-0")
                    faiss.write_index(segment.index, str(temporary / f"{name}-0.faiss"))
                    write_lines(temporary / f"{name}-0.jsonl", side.records)
                    content[name].append(segment_entry(segment))
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Read a folder that `save` or `build_index` wrote.

        FAISS trusts what it reads, so only files that the manifest names are read, after their checksums were
        compared; they guard against damage. A stranger's folder is as dangerous as a stranger's program.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or its parts do not fit each other.
        """
        manifest, path = read_artifact(folder, KIND), Path(folder)
        if not all(isinstance(manifest.get(name), list) for name in SIDES):
            raise ValueError(f"{path}: its manifest names no segments: build the index again")
        images, texts = (load_side(path, manifest, name) if manifest[name] else None for name in SIDES)
        return cls(images, texts, manifest["model"], manifest["fingerprint"])


def indexed(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records as an index keeps them: without what only their part of the embeddings gives a meaning."""
    return [
        {name: value for name, value in record.items() if name not in ("crc32", "image")}
        for record in records
    ]


def index_manifest(model: str, fingerprint: str, dim: int) -> dict[str, Any]:
    """The manifest of an index without segments.

    `images` and `texts` list segments: `name` is the stem of the files `.faiss` (the FAISS index), `.jsonl` (records),
    for some `.npy` (rows for re-ranking) and `.ivfdata` (lists on disk). `deleted` names the file of each side's
    deleted rows.
    """
    return {
        "model": model,
        "fingerprint": fingerprint,
        "dim": dim,
        "metric": "inner_product",
        "images": [],
        "texts": [],
        "deleted": {},
    }


def segment_entry(segment: Segment) -> dict[str, Any]:
    return {
        "name": segment.name,
        "rows": len(segment),
        "effort": segment.effort,
        "candidates": segment.candidates,
        "report": segment.report,
    }


def load_side(path: Path, manifest: dict[str, Any], name: str) -> Side:
    """One side of an index whose files were found to be whole."""
    segments, records = [], []
    for entry in manifest[name]:
        stem = entry["name"]
        for needed in (f"{stem}.faiss", f"{stem}.jsonl"):
            if needed not in manifest["files"]:
                raise ValueError(f"{path}: its manifest has no checksum of {needed}: build the index again")
        index = faiss.read_index(str(path / f"{stem}.faiss"), faiss.IO_FLAG_ONDISK_SAME_DIR)
        lines = Records(path / f"{stem}.jsonl")
        rows = None
        if f"{stem}.npy" in manifest["files"]:
            rows = np.load(path / f"{stem}.npy", mmap_mode="r", allow_pickle=False)
        found = (index.ntotal, len(lines), index.d, index.metric_type)
        expected = (entry["rows"], entry["rows"], manifest["dim"], faiss.METRIC_INNER_PRODUCT)
        if found != expected or (rows is not None and rows.shape != (entry["rows"], manifest["dim"])):
            raise ValueError(
                f"{path}: the {name} are {found} (rows, records, dimensions, metric), "
                f"the manifest says {expected}: build the index again"
            )
        segments.append(Segment(index, entry["effort"], entry["candidates"], rows, entry["report"], stem))
        records.append(lines)
    deleted = None
    if name in manifest["deleted"]:
        deleted = np.load(path / manifest["deleted"][name], allow_pickle=False)
    return Side(segments, Chain(records), deleted)
