"""Search an index by text or by picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.faults import Fault
from pretrain.encoder import Encoder
from retrieval.index import SIDES, Index, top_k


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        rank: 1 for the best.
        score: Cosine with the query.
        key: Key of the sample.
        text: The caption that was found; None for a picture.
    """

    rank: int
    score: float
    key: str
    text: str | None


def search(
    index: Index,
    encoder: Encoder,
    *,
    texts: Sequence[str] = (),
    images: Sequence[str | Path] = (),
    among: str | None = None,
    k: int = 10,
) -> list[list[Hit]]:
    """Find the nearest pictures or captions.

    Args:
        index: What is searched.
        encoder: The model that made the index.
        texts: Queries in words, or
        images: picture files as queries.
        among: `images` or `texts`; None for the side that the query is not.
        k: Results a query.

    Returns:
        One list of hits a query, best first.

    Raises:
        ValueError: Both or no queries, an index of another model, a file that is no picture, an unknown side,
            k below 1.
        FileNotFoundError: A picture file that is not there.

    Example:
        >>> search(index, encoder, texts=["two dogs on a beach"], k=5)             # doctest: +SKIP
    """
    if bool(texts) == bool(images):
        raise ValueError("expected either texts or images as queries, got " + ("both" if texts else "none"))
    side = among or ("images" if texts else "texts")
    if side not in SIDES:
        raise ValueError(f"among: {side!r}, expected images or texts")
    index.check_model(encoder.fingerprint, encoder.name)
    if texts:
        queries = encoder.encode_texts(list(texts))
    else:
        queries = encoder.encode_images([read_picture(path) for path in images])
    scores, rows = top_k(getattr(index, side), queries.cpu().numpy(), k)
    records = index.image_records if side == "images" else index.text_records
    return [
        [
            Hit(rank, float(score), records[row]["key"], records[row].get("text"))
            for rank, (score, row) in enumerate(zip(*pair, strict=True), 1)
        ]
        for pair in zip(scores, rows.tolist(), strict=True)
    ]


def read_picture(path: str | Path) -> bytes:
    """Content of a picture file, known to be one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no picture.
    """
    from data.transforms import decode_image

    content = Path(path).read_bytes()
    try:
        decode_image(content)
    except Fault as fault:
        raise ValueError(f"{path}: expected a picture file: {fault}") from fault
    return content
