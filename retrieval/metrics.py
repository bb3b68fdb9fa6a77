"""Image-text retrieval numbers: exact, streamed, honest about ties, and beside what chance would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from retrieval.checks import checked_cutoffs, checked_owner, checked_pairs
from retrieval.ranking import Ranking, Ranks, rank_pairs
from retrieval.rows import Rows

__all__ = [
    "DIRECTIONS",
    "Ranking",
    "Ranks",
    "chance",
    "fold_metrics",
    "relevance_metrics",
    "retrieval_metrics",
    "retrieval_ranks",
    "summary",
]

DIRECTIONS = ("image_to_text", "text_to_image")
BLOCK = 1024


def retrieval_metrics(
    image_embeddings: Any,
    text_embeddings: Any,
    image_of_text: Any,
    ks: Sequence[int] = (1, 5, 10),
    *,
    block: int = BLOCK,
    over_ranks: bool = False,
) -> dict[str, dict[str, float]]:
    """Recall@k, ranks and graded numbers of cosine retrieval in both directions.

    recall@k is the CLIP paper's: the share of queries with at least one right answer among the first k;
    true_recall@k is the share of right answers found. Ties are counted by expectation, so a model that scores
    everything alike gets exactly `chance` in everything but median_rank. The result depends neither on the
    order of the gallery nor on `block`. Time is O(images x texts x dim), with one cheap pass over the scores
    for each caption of an image; memory beside the arguments is about
    `40 * block**2 + 16 * block * dim` bytes.

    Args:
        image_embeddings: `(images, dim)` floats, numpy or torch on any device; normalised here.
        text_embeddings: `(texts, dim)` floats.
        image_of_text: `(texts,)` integers: the image that each text describes; each image has one or more.
        ks: Cut-offs; one above the size of the gallery counts as the whole gallery.
        block: Rows of both sides in one product.
        over_ranks: As in `retrieval_ranks`.

    Returns:
        `{"image_to_text": {...}, "text_to_image": {...}}`, each as `summary` gives it.

    Raises:
        ValueError: Shapes that do not fit, an empty side, NaN, infinity or a row of zeros, an index out of
            range, an image without a text, a cut-off below 1.
        TypeError: Embeddings that are not real numbers, or indices that are not integers.

    Reference:
        Radford et al. 2021, table 13 (protocol); ties: hypergeometric expectation of a hit.

    Example:
        >>> retrieval_metrics(np.eye(2), np.eye(2)[[0, 1, 1]], [0, 1, 1])["image_to_text"]["recall@1"]
        1.0
    """
    ks = checked_cutoffs(ks)
    ranks = retrieval_ranks(
        image_embeddings, text_embeddings, image_of_text, block=block, over_ranks=over_ranks
    )
    return {name: summary(each, ks) for name, each in zip(DIRECTIONS, ranks, strict=True)}


def retrieval_ranks(
    image_embeddings: Any,
    text_embeddings: Any,
    image_of_text: Any,
    *,
    block: int = BLOCK,
    over_ranks: bool = False,
) -> tuple[Ranking, Ranking]:
    """The places behind `retrieval_metrics`, of every right answer of every query.

    Args:
        image_embeddings: `(images, dim)` floats.
        text_embeddings: `(texts, dim)` floats.
        image_of_text: `(texts,)` integers.
        block: Rows of both sides in one product.
        over_ranks: Share the work among the processes of torch.distributed; every one of them holds all rows
            and gets the same result as one process alone.

    Returns:
        Rankings of the texts for the images, and of the images for the texts (on the CPU).

    Raises:
        ValueError: As `retrieval_metrics`.
        TypeError: As `retrieval_metrics`.
    """
    images = Rows(image_embeddings, "image_embeddings", block)
    texts = Rows(text_embeddings, "text_embeddings", block)
    owner = checked_owner(image_of_text, len(images), len(texts))
    return rank_pairs(images, texts, owner, torch.arange(len(texts)), over_ranks=over_ranks)


def relevance_metrics(
    query_embeddings: Any,
    gallery_embeddings: Any,
    relevant: Any,
    ks: Sequence[int] = (1, 5, 10),
    *,
    block: int = BLOCK,
) -> dict[str, float]:
    """The same numbers for any set of right answers, in one direction: several images of a text, say.

    Sets with judged pairs, such as ECCV Caption, have queries with many right answers in both directions and
    a gallery that is larger than the answers.

    Args:
        query_embeddings: `(queries, dim)` floats; each has at least one right answer.
        gallery_embeddings: `(candidates, dim)` floats.
        relevant: `(pairs, 2)` integers: a query and a candidate that is right for it.
        ks: Cut-offs.
        block: Rows of both sides in one product.

    Returns:
        As `summary`.

    Raises:
        ValueError: Shapes that do not fit, a pair that is out of range or given twice, a query without a
            right answer, and as `retrieval_metrics`.
        TypeError: As `retrieval_metrics`.

    Reference:
        Chun et al. 2022, ECCV Caption (mAP@R, R-precision).
    """
    ks = checked_cutoffs(ks)
    queries = Rows(query_embeddings, "query_embeddings", block)
    gallery = Rows(gallery_embeddings, "gallery_embeddings", block)
    pairs = checked_pairs(relevant, len(queries), len(gallery))
    ranking, _ = rank_pairs(queries, gallery, pairs[:, 0], pairs[:, 1], directions=(True, False))
    return summary(ranking, ks)


def fold_metrics(
    image_embeddings: Any,
    text_embeddings: Any,
    image_of_text: Any,
    folds: int = 5,
    ks: Sequence[int] = (1, 5, 10),
    *,
    block: int = BLOCK,
) -> dict[str, dict[str, float]]:
    """The mean over consecutive parts of the images, each with its own texts alone: COCO-1k is 5 of 1,000.

    Fewer candidates make higher numbers: compare only with numbers over the same folds.

    Args:
        image_embeddings: `(images, dim)` floats.
        text_embeddings: `(texts, dim)` floats.
        image_of_text: `(texts,)` integers.
        folds: Parts of equal size; they must divide the images.
        ks: Cut-offs.
        block: Rows of both sides in one product.

    Returns:
        As `retrieval_metrics`; counts are summed, everything else is the mean of the folds.

    Raises:
        ValueError: The images cannot be cut into that many equal parts, and as `retrieval_metrics`.
        TypeError: As `retrieval_metrics`.
    """
    image_embeddings, text_embeddings = (
        each if isinstance(each, torch.Tensor) else np.asarray(each)
        for each in (image_embeddings, text_embeddings)
    )
    images = len(image_embeddings)
    if folds < 1 or images % folds:
        raise ValueError(f"folds: expected a number that divides the {images} images, got {folds}")
    owner = checked_owner(image_of_text, images, len(text_embeddings))
    size = images // folds
    found = []
    for start in range(0, images, size):
        texts = ((owner >= start) & (owner < start + size)).nonzero()[:, 0]
        chosen = texts if isinstance(text_embeddings, torch.Tensor) else texts.numpy()
        found.append(
            retrieval_metrics(
                image_embeddings[start : start + size],
                text_embeddings[chosen],
                owner[texts] - start,
                ks,
                block=block,
            )
        )
    return {
        direction: {
            name: sum(fold[direction][name] for fold in found) / (1 if name == "tied_queries" else folds)
            for name in found[0][direction]
        }
        for direction in DIRECTIONS
    }


def summary(ranking: Ranking, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The numbers of one direction that are reported.

    Args:
        ranking: What `retrieval_ranks` counted.
        ks: Cut-offs.

    Returns:
        `recall@K`, `median_rank` and `mean_rank` of the first right answer (1-based; the median of an even
        number of queries is the mean of the middle two), `mrr`, `true_recall@K`, `ndcg@K`, `map@r` and
        `r_precision`; `optimistic_` and `pessimistic_` recall and ranks, where each tie goes the query's way
        or against it; and `tied_queries`, the queries whose recall or rank a tie leaves open.
    """
    ks = checked_cutoffs(ks)
    values = {name: each for name, each in ranking.per_query(ks).items() if name != "ap"}
    rank, reciprocal = values.pop("rank"), values.pop("reciprocal_rank")
    means = {name: float(each.mean()) for name, each in values.items()}
    best = ranking.best()
    result = {
        **{name: means.pop(name) for name in list(means) if name.startswith("recall")},
        "median_rank": float(np.median(rank.numpy())),
        "mean_rank": float(rank.mean()),
        "mrr": float(reciprocal.mean()),
        **means,
    }
    for word in ("optimistic", "pessimistic"):
        ranks = ranking.resolved(optimistic=word == "optimistic").best()
        place = ranks.expected()
        result |= {f"{word}_recall@{k}": float(ranks.hits(k).mean()) for k in ks}
        result |= {
            f"{word}_median_rank": float(np.median(place.numpy())),
            f"{word}_mean_rank": float(place.mean()),
        }
    return {**result, "tied_queries": int((best.tied > best.right).sum())}


def chance(image_of_text: Any, images: int, ks: Sequence[int] = (1, 5, 10)) -> dict[str, dict[str, float]]:
    """What ranking at random would score on the same pairs.

    Args:
        image_of_text: `(texts,)` integers.
        images: Number of images.
        ks: Cut-offs.

    Returns:
        As `retrieval_metrics`, without what ties leave open: the expectation of each number, and as
        `median_rank` the smallest rank that at least half of the queries are expected to reach.

    Raises:
        ValueError: An index out of range, an image without a text, a cut-off below 1.

    Example:
        >>> chance([0, 1, 2, 3], images=4, ks=[1])["text_to_image"]["recall@1"]
        0.25
    """
    ks = checked_cutoffs(ks)
    owner = checked_owner(image_of_text, images, len(image_of_text))
    sizes, queries = torch.bincount(owner, minlength=images).unique(return_counts=True)
    one = torch.ones(1, dtype=torch.int64)
    return dict(
        zip(
            DIRECTIONS,
            [chance_of(sizes, queries, len(owner), ks), chance_of(one, one, images, ks)],
            strict=True,
        )
    )


def chance_of(right: torch.Tensor, weight: torch.Tensor, gallery: int, ks: Sequence[int]) -> dict[str, float]:
    """Chance for queries with `right` right answers each, `weight` of them, among `gallery` candidates."""
    share = weight.double() / weight.sum()
    query = torch.arange(len(right))
    constant = Ranking(query, torch.zeros_like(right), gallery - right, right, len(right), gallery)
    values = constant.per_query(ks)
    means = {name: float((each * share).sum()) for name, each in values.items() if name != "ap"}
    best, low, high = constant.best(), 1, gallery  # the median lies in here
    while low < high:
        middle = (low + high) // 2
        reached = float((best.hits(middle) * share).sum()) >= 0.5 - 1e-12
        low, high = (low, middle) if reached else (middle + 1, high)
    rank, reciprocal = means.pop("rank"), means.pop("reciprocal_rank")
    return {
        **{name: means.pop(name) for name in list(means) if name.startswith("recall")},
        "median_rank": float(low),
        "mean_rank": rank,
        "mrr": reciprocal,
        **means,
    }
