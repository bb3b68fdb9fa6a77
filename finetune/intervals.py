"""How sure a score is: bootstrap intervals over images, and a paired test of two models on the same images.

Every metric here is a function of sums over images (the mean is; so is BLEU, of its counts). Resampling images is then
a product of a matrix of how often each image was drawn with the matrix of the images' sums: a thousand resamples of a
thousand images take milliseconds, and questions about one picture stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Statistic = Callable[[np.ndarray], float]


def mean_of(sums: np.ndarray) -> float:
    """The usual statistic: column 0 holds the scores' sums, column 1 how many there are."""
    return float(sums[0] / sums[1])


def per_image(scores: Sequence[float], images: Sequence[Any] | None = None) -> np.ndarray:
    """Sums and counts of scores by image, for `mean_of`: float64 `(images, 2)`.

    Args:
        scores: One for each image, or for each question.
        images: The image of each score; None when every score is an image's own.

    Raises:
        ValueError: Numbers of rows differ.
    """
    values = np.asarray(scores, np.float64)
    if images is None:
        return np.stack([values, np.ones_like(values)], axis=1)
    if len(images) != len(values):
        raise ValueError(f"got {len(values)} scores for {len(images)} images: each score needs its image")
    numbers: dict[Any, int] = {}
    rows = np.array([numbers.setdefault(image, len(numbers)) for image in images], np.int64)
    return np.stack(
        [np.bincount(rows, values, len(numbers)), np.bincount(rows, minlength=len(numbers))], axis=1
    ).astype(np.float64)


def bootstrap_interval(
    sums: np.ndarray,
    statistic: Statistic = mean_of,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """A percentile interval of a metric, over resampled images.

    It says how far the number would move with other images of the same kind, not with other seeds of training.

    Args:
        sums: What each image adds, float `(images, k)`; see `per_image` and `metrics.bleu_sums`.
        statistic: From the sum over images, `(k,)`, to the metric.
        resamples: How often.
        level: Share of the resamples inside the interval.
        seed: Of the draws.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: No images, or a level outside (0, 1).

    Reference:
        Efron and Tibshirani 1993, percentile method.

    Example:
        >>> low, high = bootstrap_interval(per_image([0.0, 1.0] * 50))
        >>> low < 0.5 < high
        True
    """
    sums = checked(sums)
    if not 0 < level < 1:
        raise ValueError(f"level {level}: expected a share between 0 and 1, such as 0.95")
    values = [statistic(row) for row in resample(sums, resamples, seed)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resample(sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums over images drawn with replacement, `(resamples, k)`."""
    rng, images = np.random.default_rng(seed), len(sums)
    rows = []
    for start in range(0, resamples, 100):  # a matrix of 100 x images at a time
        drawn = rng.multinomial(images, np.full(images, 1 / images), min(100, resamples - start))
        rows.append(drawn @ sums)
    return np.concatenate(rows)


def paired_test(
    first: np.ndarray,
    second: np.ndarray,
    statistic: Statistic = mean_of,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Are two models, judged on the same images, really different?

    An approximate randomisation test: were they not, each image's two results could be exchanged. The interval of the
    difference is a paired bootstrap.

    Args:
        first: What each image adds for one model, float `(images, k)`.
        second: The same for the other model, images in the same order.
        statistic: As for `bootstrap_interval`.
        resamples: How often.
        seed: Of the draws.

    Returns:
        `difference` (first minus second), its `low` and `high` end at 95 %, and the two-sided `p_value`.

    Raises:
        ValueError: The shapes differ, or no images.

    Reference:
        Noreen 1989; Koehn 2004 for the paired bootstrap.
    """
    first, second = checked(first), checked(second)
    if first.shape != second.shape:
        raise ValueError(
            f"a paired test needs both models on the same images: got {first.shape} and {second.shape}"
        )
    difference = statistic(first.sum(axis=0)) - statistic(second.sum(axis=0))
    rng, gap, both = np.random.default_rng(seed), first - second, first.sum(axis=0) + second.sum(axis=0)
    extreme = 0
    for _ in range(resamples):
        signs = rng.integers(0, 2, len(gap)) * 2 - 1
        half = (signs @ gap) / 2
        extreme += abs(statistic(both / 2 + half) - statistic(both / 2 - half)) >= abs(difference) - 1e-12
    width = first.shape[1]
    drawn = resample(np.concatenate([first, second], axis=1), resamples, seed)
    gaps = [statistic(row[:width]) - statistic(row[width:]) for row in drawn]
    low, high = np.quantile(gaps, [0.025, 0.975])
    p_value = (extreme + 1) / (resamples + 1)
    return {"difference": difference, "low": float(low), "high": float(high), "p_value": p_value}


def checked(sums: np.ndarray) -> np.ndarray:
    sums = np.asarray(sums, np.float64)
    if sums.ndim != 2 or not len(sums):
        raise ValueError(f"expected sums of at least one image, (images, k), got shape {sums.shape}")
    return sums
