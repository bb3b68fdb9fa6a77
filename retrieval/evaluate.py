"""`retrieval eval`: the numbers of a model on a set, and the page that shows them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pairstream import __version__
from pretrain.encoder import Encoder
from retrieval.embed import Embeddings, embed_shards
from retrieval.index import Index
from retrieval.metrics import DIRECTIONS, Ranking, chance, checked_cutoffs, retrieval_ranks, summary


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and what it was measured on.

    Attributes:
        metrics: Plain data for `metrics.json`; `metrics["retrieval"]` has both directions and `chance`.
        embeddings: The set.
        index: FAISS indexes of both sides.
        ranks: Where the right answers stand, for pictures and for texts as queries.
    """

    metrics: dict[str, Any]
    embeddings: Embeddings
    index: Index
    ranks: tuple[Ranking, Ranking]


def evaluate(
    encoder: Encoder,
    shards: str | Iterable[str],
    *,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 64,
    limit: int | None = None,
    workers: int = 0,
    max_faults: float = 0.01,
    show: bool = False,
) -> Evaluation:
    """Measure zero-shot retrieval: exact ranks for the numbers, a FAISS index for the results to look at.

    Args:
        encoder: The model.
        shards: Pictures with one or more captions.
        ks: Cut-offs of recall.
        batch_size: Pictures at a time.
        limit: Only the first so many samples. Recall over fewer is higher: never compare across limits.
        workers: Loader processes.
        max_faults: Share of bad samples past which it stops.
        show: Show progress.

    Returns:
        The numbers with all that is needed to understand them.

    Raises:
        ValueError: As `embed_shards` and `retrieval_metrics`.

    Example:
        >>> result = evaluate(load_encoder("runs/scenes_cpu"), "shards/test")       # doctest: +SKIP
        >>> result.metrics["retrieval"]["text_to_image"]["recall@1"]                # doctest: +SKIP
    """
    ks = checked_cutoffs(ks)
    began = time.perf_counter()
    found = embed_shards(
        encoder,
        shards,
        batch_size=batch_size,
        limit=limit,
        workers=workers,
        max_faults=max_faults,
        show=show,
    )
    embedded = time.perf_counter()
    ranks = retrieval_ranks(found.images, found.texts, found.image_of_text)
    ranked = time.perf_counter()
    index = Index.build(found)
    metrics = {
        "model": found.model,
        "fingerprint": found.fingerprint,
        "data": found.shards,
        "limit": limit,
        "images": len(found.images),
        "texts": len(found.texts),
        "dim": found.images.shape[1],
        "faults": found.faults,
        "retrieval": {
            **{name: summary(each, ks) for name, each in zip(DIRECTIONS, ranks, strict=True)},
            "chance": chance(found.image_of_text, len(found.images), ks),
        },
        "definition": "recall@k: share of queries with a right answer among the first k; ties by expectation",
        "seconds": {
            "embed": round(embedded - began, 3),
            "rank": round(ranked - embedded, 3),
            "index": round(time.perf_counter() - ranked, 3),
        },
        "versions": {
            "pairstream": __version__,
            **{name: version(name) for name in ("torch", "open_clip_torch", "faiss-cpu")},
        },
    }
    return Evaluation(metrics, found, index, ranks)


def result_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of results: each direction above its chance."""
    numbers = metrics["retrieval"]
    names = [name for name in numbers[DIRECTIONS[0]] if name.startswith("recall")]
    names += ["median_rank", "mean_rank", "mrr"]
    header = ["direction", *(name.replace("_", " ") for name in names)]
    rows = []
    for direction in DIRECTIONS:
        for label, values in (
            (direction.replace("_", " "), numbers[direction]),
            ("  by chance", numbers["chance"][direction]),
        ):
            rows.append([label, *(cell(name, values[name]) for name in names)])
    return header, rows


def cell(name: str, value: float) -> str:
    """`0.2143` for a share, `7` or `12.5` for a rank."""
    return f"{value:,.1f}".removesuffix(".0") if name.endswith("rank") else f"{value:.4f}"
