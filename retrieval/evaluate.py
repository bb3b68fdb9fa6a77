"""`retrieval eval`: the numbers of a model on a set, and the page that shows them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.encoder import Encoder
from retrieval.bootstrap import RESAMPLES
from retrieval.checks import checked_cutoffs
from retrieval.diagnostics import diagnostics
from retrieval.embed import Embeddings, embed_shards
from retrieval.index import Index
from retrieval.metrics import (
    DIRECTIONS,
    Ranking,
    chance,
    fold_metrics,
    retrieval_ranks,
    summary,
)
from retrieval.provenance import encoder_facts, pairs_hash, versions
from retrieval.queries import pack_queries, result_intervals, write_queries

TIES = "by expectation over the orders of equal scores; optimistic_ and pessimistic_ numbers bound them"
DEFINITION = (
    "recall@k: share of queries with a right answer among the first k; true_recall@k: share of the right answers "
    "found; ranks are of the first right answer"
)


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and what it was measured on.

    Attributes:
        metrics: Plain data for `metrics.json`; `metrics["retrieval"]` has both directions and `chance`.
        embeddings: The set.
        index: FAISS indexes of both sides.
        ranks: Where the right answers stand, for pictures and for texts as queries.
        queries: The places as bytes of a file, for `retrieval compare`.
    """

    metrics: dict[str, Any]
    embeddings: Embeddings
    index: Index
    ranks: tuple[Ranking, Ranking]
    queries: bytes

    def write_queries(self, result: str | Path) -> Path:
        """Write the places of all queries beside the JSON `result`."""
        return write_queries(result, self.queries)


def evaluate(
    encoder: Encoder,
    shards: str | Iterable[str],
    *,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 64,
    limit: int | None = None,
    workers: int = 0,
    max_faults: float = 0.01,
    folds: int | None = None,
    resamples: int = RESAMPLES,
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
        folds: Also the mean over so many consecutive parts of the set (5 of 1,000 for COCO-1k).
        resamples: Bootstrap samples of the intervals.
        show: Show progress.

    Returns:
        The numbers with all that is needed to understand them.

    Raises:
        ValueError: As `embed_shards`, `retrieval_metrics` and `fold_metrics`.

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
    seconds = {"embed": round(time.perf_counter() - began, 3)}
    return measure(
        found, encoder_facts(encoder), ks=ks, limit=limit, folds=folds, resamples=resamples, seconds=seconds
    )


def measure(
    found: Embeddings,
    facts: dict[str, Any],
    *,
    ks: Sequence[int] = (1, 5, 10),
    limit: int | None = None,
    folds: int | None = None,
    resamples: int = RESAMPLES,
    seconds: dict[str, float] | None = None,
    over_ranks: bool = False,
) -> Evaluation:
    """Every number of embeddings that are there already.

    Args:
        found: The rows.
        facts: What `encoder_facts` says of the model that made them.
        ks: As in `evaluate`.
        limit: As in `evaluate`, for the record.
        folds: As in `evaluate`.
        resamples: As in `evaluate`.
        seconds: What was spent so far, for the record.
        over_ranks: As in `retrieval_ranks`.

    Returns:
        As `evaluate`.

    Raises:
        ValueError: As `evaluate`.
    """
    began = time.perf_counter()
    ranks = retrieval_ranks(found.images, found.texts, found.image_of_text, over_ranks=over_ranks)
    ranked = time.perf_counter()
    index = Index.build(found)
    indexed = time.perf_counter()
    data_hash = pairs_hash(found.keys, found.captions, found.image_of_text)
    queries = pack_queries(ranks, found.image_of_text, data_hash)
    few = min(len(found.images), len(found.texts)) < 2
    metrics = {
        **facts,
        "data": found.shards,
        "data_hash": data_hash,
        "limit": limit,
        "images": len(found.images),
        "texts": len(found.texts),
        "dim": found.images.shape[1],
        "faults": found.faults,
        "retrieval": {
            **{name: summary(each, ks) for name, each in zip(DIRECTIONS, ranks, strict=True)},
            "chance": chance(found.image_of_text, len(found.images), ks),
        },
        "intervals": result_intervals(ranks, found.image_of_text, ks, resamples=resamples),
        "diagnostics": {} if few else diagnostics(found.images, found.texts, found.image_of_text),
        "definition": DEFINITION,
        "ties": TIES,
        "queries_sha256": hashlib.sha256(queries).hexdigest(),
        "versions": versions(),
    }
    if folds is not None:
        each = fold_metrics(found.images, found.texts, found.image_of_text, folds, ks)
        metrics["folds"] = {"folds": folds, "images": len(found.images) // folds, **each}
    metrics["seconds"] = {
        **(seconds or {}),
        "rank": round(ranked - began, 3),
        "index": round(indexed - ranked, 3),
        "intervals": round(time.perf_counter() - indexed, 3),
    }
    return Evaluation(metrics, found, index, ranks, queries)


def result_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of results: each direction above its chance."""
    numbers = metrics["retrieval"]
    names = shown_names(metrics)
    header = ["direction", *(name.replace("_", " ") for name in names)]
    rows = []
    for direction in DIRECTIONS:
        for label, values in (
            (direction.replace("_", " "), numbers[direction]),
            ("  by chance", numbers["chance"][direction]),
        ):
            rows.append([label, *(cell(name, values[name]) for name in names)])
    return header, rows


def interval_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """The rows of intervals that belong to `result_rows`, one a direction."""
    names = shown_names(metrics)
    return [
        [direction.replace("_", " "), *("-".join(cell(name, end) for end in ends[name]) for name in names)]
        for direction, ends in ((each, metrics["intervals"][each]) for each in DIRECTIONS)
    ]


def shown_names(metrics: dict[str, Any]) -> list[str]:
    recalls = [name for name in metrics["retrieval"][DIRECTIONS[0]] if name.startswith("recall")]
    return [*recalls, "median_rank", "mean_rank"]


def cell(name: str, value: float) -> str:
    """`0.2143` for a share, `7` or `12.5` for a rank."""
    return f"{value:,.1f}".removesuffix(".0") if name.endswith("rank") else f"{value:.4f}"
