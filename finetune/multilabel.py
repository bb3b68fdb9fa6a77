"""Numbers of a classifier whose samples may have several labels: F1, mean average precision, AUROC, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.classification import auroc, binned, share


def multilabel_metrics(
    probabilities: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    *,
    threshold: float = 0.5,
    bins: int = 15,
) -> dict[str, Any]:
    """Judge predicted probabilities, any number of labels a sample.

    Args:
        probabilities: Float `(n, labels)`, each from 0 to 1.
        truth: bool `(n, labels)`.
        names: The labels.
        threshold: From which probability on a label counts as given.
        bins: Of the calibration error.

    Returns:
        `accuracy` (samples whose labels are all right), `micro_f1`, `macro_f1`, `map` and `auroc` (means over the
        labels that occur, and do not always), `ece` (of all single judgements), `by_class` (`precision`, `recall`,
        `f1`, `average_precision`, `auroc`, `samples`), `labels`, `samples` and `reliability`. Shares are from 0 to 1.

    Raises:
        ValueError: Shapes differ, no samples, probabilities that are none.
    """
    probabilities, truth = np.asarray(probabilities, np.float64), np.asarray(truth, bool)
    if probabilities.shape != truth.shape or probabilities.ndim != 2 or probabilities.shape[1] != len(names):
        raise ValueError(
            f"expected probabilities and truth (n, {len(names)}) for {len(names)} labels, got {probabilities.shape} "
            f"and {truth.shape}"
        )
    if not len(truth):
        raise ValueError("no samples to judge: expected at least one")
    if not (np.isfinite(probabilities).all() and (probabilities >= 0).all() and (probabilities <= 1).all()):
        raise ValueError("probabilities must be finite and from 0 to 1")
    given = probabilities >= threshold
    right, written, there = (given & truth).sum(axis=0), given.sum(axis=0), truth.sum(axis=0)
    precision, recall, f1 = share(right, written), share(right, there), share(2 * right, written + there)
    areas = [auroc(probabilities[:, place], truth[:, place]) for place in range(len(names))]
    precisions = [average_precision(probabilities[:, place], truth[:, place]) for place in range(len(names))]
    present = (written + there) > 0
    ece, reliability = binned(probabilities.ravel(), truth.ravel(), bins)
    return {
        "accuracy": float((given == truth).all(axis=1).mean()),
        "micro_f1": float(share(2 * right.sum(), (written + there).sum())),
        "macro_f1": float(f1[present].mean()) if present.any() else 0.0,
        "map": mean_of(precisions),
        "auroc": mean_of(areas),
        "ece": ece,
        "reliability": reliability,
        "by_class": {
            name: {
                "precision": float(precision[place]),
                "recall": float(recall[place]),
                "f1": float(f1[place]),
                "average_precision": precisions[place],
                "auroc": areas[place],
                "samples": int(there[place]),
            }
            for place, name in enumerate(names)
        },
        "labels": list(names),
        "samples": len(truth),
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean over those that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the precision-recall curve as a sum of steps; equal scores are one step.

    Returns:
        From 0 to 1; None when there are no positives.

    Example:
        >>> average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]))
        0.8333333333333333
    """
    if not positive.any():
        return None
    order = np.argsort(-scores, kind="stable")
    hits, ends = np.cumsum(positive[order]), np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    hits = hits[ends]
    gained = np.diff(np.append(0, hits))
    return float((gained * hits / (ends + 1)).sum() / positive.sum())
