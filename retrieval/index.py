"""A FAISS index of a set's pictures and one of its texts, in a folder that knows its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retrieval.artifact import new_artifact, read_artifact, read_lines, write_lines
from retrieval.embed import Embeddings

KIND = "pairstream-index"
SIDES = ("images", "texts")


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


def top_k(index: faiss.Index, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best rows for each query.

    Args:
        index: An inner-product index.
        queries: float `(q, dim)`.
        k: Results wanted; all rows when the index has fewer.

    Returns:
        Scores float32 and row numbers int64, both `(q, min(k, rows))`, best first.

    Raises:
        ValueError: Another width than the index's, NaN or infinite values, k below 1.
    """
    queries = checked_rows(queries, "queries")
    if queries.shape[1] != index.d:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions, the index {index.d}: use the index's model"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return index.search(queries, min(k, index.ntotal))  # pyright: ignore[reportCallIssue]


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
    """Both sides of a set, ready to be searched.

    Attributes:
        images: FAISS index of the pictures.
        texts: FAISS index of the texts.
        image_records: One a picture: `key`, `sample`.
        text_records: One a text: `text`, `key`, `image`.
        model: Name of the encoder, for people.
        fingerprint: Hash of the encoder that made the rows.
    """

    images: faiss.Index
    texts: faiss.Index
    image_records: list[dict[str, Any]]
    text_records: list[dict[str, Any]]
    model: str
    fingerprint: str

    @classmethod
    def build(cls, embeddings: Embeddings) -> Index:
        """Index embeddings exactly.

        Raises:
            ValueError: An empty side, or values that are not finite.
        """
        return cls(
            flat_index(embeddings.images, "image embeddings"),
            flat_index(embeddings.texts, "text embeddings"),
            embeddings.image_records(),
            embeddings.text_records(),
            embeddings.model,
            embeddings.fingerprint,
        )

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
        """Write `images.faiss`, `texts.faiss`, their records and a manifest with checksums, all or none.

        Returns:
            The folder.
        """
        content = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "dim": self.images.d,
            "images": self.images.ntotal,
            "texts": self.texts.ntotal,
            "metric": "inner_product",
        }
        with new_artifact(folder, KIND, content) as temporary:
            for side in SIDES:
                faiss.write_index(getattr(self, side), str(temporary / f"{side}.faiss"))
            write_lines(temporary / "images.jsonl", self.image_records)
            write_lines(temporary / "texts.jsonl", self.text_records)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Read a folder that `save` wrote.

        FAISS trusts what it reads, so the checksums are compared before; they guard against damage. A
        stranger's folder is as dangerous as a stranger's program.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or its parts do not fit each other.
        """
        manifest, path = read_artifact(folder, KIND), Path(folder)
        sides = [faiss.read_index(str(path / f"{side}.faiss")) for side in SIDES]
        records = [read_lines(path / f"{side}.jsonl") for side in SIDES]
        for side, index, lines in zip(SIDES, sides, records, strict=True):
            found = (index.ntotal, len(lines), index.d, index.metric_type)
            expected = (manifest[side], manifest[side], manifest["dim"], faiss.METRIC_INNER_PRODUCT)
            if found != expected:
                raise ValueError(
                    f"{path}: the {side} are {found} (rows, records, dimensions, metric), "
                    f"the manifest says {expected}: build the index again"
                )
        images, texts = sides
        return cls(images, texts, records[0], records[1], manifest["model"], manifest["fingerprint"])
