"""Numbers of a classifier, from its probabilities: accuracy, F1, AUROC, calibration, confusion.

Our own small functions rather than scikit-learn's, which nothing else here needs; they are tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def classification_metrics(
    probabilities: np.ndarray, labels: Sequence[int] | np.ndarray, names: Sequence[str], *, bins: int = 15
) -> dict[str, Any]:
    """Judge predicted probabilities, one class a sample.

    Args:
        probabilities: Float `(n, classes)`, rows that sum to one.
        labels: int `(n,)`, the true class of each.
        names: The classes.
        bins: Of the calibration error.

    Returns:
        `accuracy`, `macro_f1`, `weighted_f1`, `auroc` (mean of one class against the rest over the classes that have
        both; null when none has), `ece`, `by_class` (`precision`, `recall`, `f1`, `samples`), `confusion` (rows: truth,
        columns: prediction), `labels`, `samples`, and `reliability`: mean confidence, accuracy and samples
        of each bin that has some.
        Shares are from 0 to 1.

    Raises:
        ValueError: Shapes differ, no samples, a label out of range, probabilities that are none.

    Reference:
        Guo et al. 2017 for the expected calibration error: equal-width bins, weighted by their samples.
    """
    probabilities, truth = check(np.asarray(probabilities, np.float64), np.asarray(labels), names)
    classes, guess = len(names), probabilities.argmax(axis=1)
    confusion = np.bincount(truth * classes + guess, minlength=classes**2).reshape(classes, classes)
    right, written, there = confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)
    precision, recall = share(right, written), share(right, there)
    f1 = share(2 * right, written + there)
    scores = [auroc(probabilities[:, number], truth == number) for number in range(classes)]
    known = [score for score in scores if score is not None]
    present = (written + there) > 0  # a class that neither occurs nor is predicted says nothing
    return {
        "accuracy": float(right.sum() / len(truth)),
        "macro_f1": float(f1[present].mean()),
        "weighted_f1": float((f1 * there).sum() / len(truth)),
        "auroc": sum(known) / len(known) if known else None,
        "ece": calibration_error(probabilities, truth, bins=bins),
        "reliability": binned(probabilities.max(axis=1), guess == truth, bins)[1],
        "by_class": {
            name: {
                "precision": float(precision[number]),
                "recall": float(recall[number]),
                "f1": float(f1[number]),
                "auroc": scores[number],
                "samples": int(there[number]),
            }
            for number, name in enumerate(names)
        },
        "confusion": confusion.tolist(),
        "labels": list(names),
        "samples": len(truth),
    }


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a positive's score is above a negative's, ties counting one half.

    Returns:
        From 0 to 1; None when there are no positives or no negatives.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    _, number, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[number.reshape(-1)]  # the mean rank of equal scores
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> float:
    """Expected calibration error: how far confidence is from accuracy, averaged over bins of confidence.

    Example:
        >>> calibration_error(np.array([[0.8, 0.2]] * 5), np.array([0, 0, 0, 0, 1]))
        0.0
    """
    return binned(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, bins)[0]


def binned(confidence: np.ndarray, right: np.ndarray, bins: int) -> tuple[float, list[list[float]]]:
    """The calibration error of single judgements, and mean confidence, share right and number of each bin."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    number = np.bincount(place, minlength=bins)
    sure, good = np.bincount(place, confidence, bins), np.bincount(place, right.astype(np.float64), bins)
    error = float(np.abs(sure - good).sum() / len(confidence))
    rows = [[float(a / n), float(b / n), int(n)] for a, b, n in zip(sure, good, number, strict=True) if n]
    return (0.0 if error < 1e-12 else error), rows


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, 0 where there is nothing."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def check(
    probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    if probabilities.ndim != 2 or probabilities.shape[1] != len(names):
        raise ValueError(
            f"expected probabilities (n, {len(names)}) for {len(names)} classes, got {probabilities.shape}"
        )
    if labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"got {labels.size} labels for {len(probabilities)} predictions: each needs exactly one"
        )
    if not len(labels):
        raise ValueError("no samples to judge: expected at least one")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels must be numbers of classes, 0 to {len(names) - 1}")
    if not np.isfinite(probabilities).all() or (probabilities < 0).any():
        raise ValueError("probabilities must be finite and at least 0")
    if not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise ValueError("each row of probabilities must sum to 1")
    return probabilities, labels
