"""Search an index by words, by a picture, by both, or by a vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.index import Index, checked_rows, top_k
from retrieval.side import Side

if TYPE_CHECKING:
    from pretrain.encoder import Encoder

MORE = (
    4  # results looked at for each one wanted, and again so many times more while near duplicates fill them
)


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        rank: 1 for the best.
        score: Cosine with the query.
        key: Key of the sample.
        text: The caption that was found; None for a picture.
        meta: Further keys of the picture's JSON.
        row: Its number in the index.
    """

    rank: int
    score: float
    key: str
    text: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    row: int = -1


def search(
    index: Index,
    encoder: Encoder | None = None,
    *,
    texts: Sequence[str] = (),
    images: Sequence[str | Path] = (),
    vectors: np.ndarray | None = None,
    image_weight: float = 0.5,
    among: str | None = None,
    k: int = 10,
    where: Iterable[str] = (),
    dedup: float | None = None,
) -> list[list[Hit]]:
    """Find the nearest pictures or captions.

    Args:
        index: What is searched.
        encoder: The model that made the index; not needed for vectors.
        texts: Queries in words.
        images: Picture files as queries; with as many texts, each pair is one query.
        vectors: float `(q, dim)` queries of the same model, instead of texts and images.
        image_weight: Share of the picture in a query of both, in [0, 1].
        among: `images` or `texts`; None for pictures, and for texts when pictures alone ask.
        k: Results a query; fewer when a filter or `dedup` leaves no more.
        where: Conditions on records, such as `width>=512`; all must be fulfilled.
        dedup: Leave out a result whose cosine with a better one is at least this.

    Returns:
        One list of hits a query, best first.

    Raises:
        ValueError: No or contradicting queries, an index of another model, a vector of another width, NaN, a file
            that is no picture, an unknown side or filter, k below 1 or above the rows, nothing that fulfils `where`.
        FileNotFoundError: A picture file that is not there.

    Example:
        >>> search(index, encoder, texts=["two dogs on a beach"], k=5)             # doctest: +SKIP
        >>> search(index, encoder, texts=["at night"], images=["street.jpg"], where=["width>=512"])  # doctest: +SKIP
    """
    name = among or ("texts" if len(images) and not len(texts) and vectors is None else "images")
    side = index.side(name)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k > side.alive:
        raise ValueError(f"k is {k:,}, but the index holds {side.alive:,} {name}: ask for at most so many")
    if dedup is not None and not 0 < dedup <= 1:
        raise ValueError(f"dedup is a cosine in (0, 1], got {dedup}")
    queries = query_rows(index, encoder, texts, images, vectors, image_weight)
    conditions = list(where)
    allowed = side.where(conditions) if conditions else None
    left = side.alive
    if allowed is not None:
        left = int((allowed if side.deleted is None else allowed & ~side.deleted).sum())
        if not left:
            raise ValueError(f"no row of the {name} fulfils {' and '.join(conditions)}")
    if dedup is None:
        scores, rows = top_k(side, queries, k, allowed=allowed)
        return [hits_of(side, *pair) for pair in zip(scores, rows, strict=True)]
    return [hits_of(side, *distinct(side, query, k, dedup, allowed, left)) for query in queries]


def query_rows(
    index: Index,
    encoder: Encoder | None,
    texts: Sequence[str],
    images: Sequence[str | Path],
    vectors: np.ndarray | None,
    image_weight: float,
) -> np.ndarray:
    """float32 `(q, dim)` unit rows that ask; see `search`."""
    if vectors is not None:
        if len(texts) or len(images):
            raise ValueError("expected vectors alone, or texts and images, as queries, got both")
        rows = checked_rows(np.atleast_2d(vectors), "query vectors")
        if rows.shape[1] != index.dim:
            raise ValueError(
                f"queries have {rows.shape[1]} dimensions, the index {index.dim}: use the index's model"
            )
        return normalised(rows, "query vectors")
    if not len(texts) and not len(images):
        raise ValueError("expected texts, images or vectors as queries, got none")
    if encoder is None:
        raise ValueError("texts and images need an encoder: the model that made the index")
    index.check_model(encoder.fingerprint, encoder.name)
    asked = []
    if len(texts):
        asked.append(encoder.encode_texts(list(texts)).cpu().numpy())
    if len(images):
        asked.append(encoder.encode_images([read_picture(path) for path in images]).cpu().numpy())
    if len(asked) == 1:
        return asked[0]
    if len(texts) != len(images):
        raise ValueError(
            f"texts and images together are queries of both: expected as many of each, got {len(texts)} and "
            f"{len(images)}"
        )
    if not 0 <= image_weight <= 1:
        raise ValueError(f"image_weight is a share in [0, 1], got {image_weight}")
    return normalised((1 - image_weight) * asked[0] + image_weight * asked[1], "text and image together")


def normalised(rows: np.ndarray, name: str) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (lengths > 1e-12).all():
        raise ValueError(f"{name}: row {int((lengths <= 1e-12).argmax())} has length zero and points nowhere")
    return (rows / lengths).astype(np.float32)


def distinct(
    side: Side, query: np.ndarray, k: int, threshold: float, allowed: np.ndarray | None, left: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k rows of which none is nearly the same as a better one: the best of each kind stays.

    Args:
        side: What is searched.
        query: float32 `(dim,)`.
        k: Results wanted.
        threshold: Cosine of near duplicates.
        allowed: bool `(rows,)`, or None.
        left: Rows that may be found.

    Returns:
        Scores and rows, best first; fewer than k only when there are no more.
    """
    wanted = k
    while True:
        wanted = min(MORE * wanted, left)
        scores, rows = (each[0] for each in top_k(side, query[None], wanted, allowed=allowed))
        scores, rows = scores[rows >= 0], rows[rows >= 0]
        vectors = side.vectors(rows)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        kept: list[int] = []
        open_ = np.ones(len(rows), dtype=bool)
        while len(kept) < k and open_.any():
            kept.append(int(open_.argmax()))
            open_ &= vectors @ vectors[kept[-1]] < threshold - 1e-6
            open_[kept[-1]] = False
        if len(kept) == k or wanted == left:
            return scores[kept], rows[kept]


def hits_of(side: Side, scores: np.ndarray, rows: np.ndarray) -> list[Hit]:
    hits = []
    for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
        if row < 0:
            break
        record = side.records[row]
        meta = {name: value for name, value in record.items() if name not in ("key", "text", "sample")}
        hits.append(Hit(len(hits) + 1, score, record["key"], record.get("text"), meta, row))
    return hits


def read_picture(path: str | Path) -> bytes:
    """Content of a picture file, known to be one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no picture.
    """
    from data.faults import Fault
    from data.transforms import decode_image

    content = Path(path).read_bytes()
    try:
        decode_image(content)
    except Fault as fault:
        raise ValueError(f"{path}: expected a picture file: {fault}") from fault
    return content
