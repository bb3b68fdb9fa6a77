"""Classification numbers of zero-shot classifiers and probes: streamed, exact, ties by expectation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from retrieval import ties
from retrieval.bootstrap import bootstrap_intervals
from retrieval.ranking import rank_pairs
from retrieval.rows import Rows, exact_scores, plain_float32

SHOWN = 5  # predictions that are kept of each picture
EXAMPLES = 5  # pictures that are named of each confusion
MATRIX = 40  # classes whose confusions are all listed


@dataclass
class ClassificationCount:
    """Counts pictures of one class each, batch by batch; nothing of size pictures x classes is kept.

    The class of a picture is the class row with the highest cosine. Scores are exact (see `retrieval.rows`), so
    the counts do not depend on the batches, and where classes tie a picture counts by expectation: a classifier
    that scores all C classes alike gets exactly 1 / C.

    Args:
        weights: `(classes, dim)` floats; normalised here.
        names: The classes' names.

    Raises:
        ValueError: As `retrieval.rows.Rows`, or another number of names than of rows.

    Example:
        >>> count = ClassificationCount(np.eye(2), ["cat", "dog"])
        >>> count.add(np.eye(2), [0, 1])
        >>> count.result()["acc1"]
        1.0
    """

    weights: Any
    names: Sequence[str]
    hits: dict[int, list[torch.Tensor]] = field(default_factory=lambda: {1: [], 5: []}, init=False)
    labels: list[torch.Tensor] = field(default_factory=list, init=False)
    predicted: list[torch.Tensor] = field(default_factory=list, init=False)
    bounds: list[torch.Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.rows = Rows(self.weights, "classifier", 1024)
        if len(self.rows) != len(self.names):
            raise ValueError(f"expected a name for each of {len(self.rows)} classes, got {len(self.names)}")

    def add(self, image_embeddings: Any, labels: Sequence[int] | torch.Tensor | np.ndarray) -> None:
        """Count one batch.

        Args:
            image_embeddings: `(b, dim)` floats.
            labels: `(b,)` numbers of the right classes.

        Raises:
            ValueError: A label outside the classes, another number of labels than of rows, and as `Rows`.
        """
        images = Rows(image_embeddings, "image_embeddings", 1024)
        label = checked_labels(labels, len(self.rows), len(images))
        ranking, _ = rank_pairs(images, self.rows, torch.arange(len(images)), label, directions=(True, False))
        best = ranking.best()
        for k, kept in self.hits.items():
            kept.append(best.hits(k))
        self.bounds.append(torch.stack([best.above == 0, best.above + best.tied == 1], 1))
        self.labels.append(label)
        with torch.no_grad(), plain_float32(images.device):
            source = torch.as_tensor(images.take(slice(0, len(images)))).float()
            weights = self.rows.take(slice(0, len(self.rows))).float().to(source.device)
            shown = min(SHOWN, len(self.rows))
            self.predicted.append((source @ weights.T).topk(shown, dim=1).indices.cpu().int())

    def result(self, *, resamples: int = 1000, confusions: int = 20) -> dict[str, Any]:
        """The numbers.

        Args:
            resamples: Bootstrap samples over pictures for the intervals.
            confusions: Pairs of classes that are listed.

        Returns:
            `acc1`; `acc5` (None for fewer than five classes); `mean_per_class_recall` (over the classes that
            have pictures); `optimistic_acc1` and `pessimistic_acc1`; `tied_pictures`; `pictures`, `classes`,
            `classes_without_pictures`; `chance_acc1`; `intervals`; `confusions`: how often a class was taken for
            another, most often first, with the numbers of some pictures (`examples`); and `confusion`, the counts
            of all classes (rows: right, columns: taken for), for at most 40 of them.

        Raises:
            ValueError: Nothing was added.
        """
        if not self.labels:
            raise ValueError("no pictures were counted")
        label, classes = torch.cat(self.labels), len(self.names)
        first, five = (torch.cat(self.hits[k]) for k in (1, 5))
        optimistic, pessimistic = torch.cat(self.bounds).double().unbind(1)
        counts = torch.bincount(label, minlength=classes)
        recall = torch.bincount(label, first, classes)[counts > 0] / counts[counts > 0]
        values = {"acc1": first.numpy(), **({"acc5": five.numpy()} if classes >= 5 else {})}
        intervals = bootstrap_intervals(values, np.arange(len(label)), resamples=resamples)
        return {
            "acc1": float(first.mean()),
            "acc5": float(five.mean()) if classes >= 5 else None,
            "mean_per_class_recall": float(recall.mean()),
            "optimistic_acc1": float(optimistic.mean()),
            "pessimistic_acc1": float(pessimistic.mean()),
            "tied_pictures": int((optimistic != pessimistic).sum()),
            "chance_acc1": 1 / classes,
            "pictures": len(label),
            "classes": classes,
            "classes_without_pictures": int((counts == 0).sum()),
            "intervals": {name: [each.low, each.high] for name, each in intervals.items()},
            "confusions": self.confusions(confusions),
            "confusion": self.confusion() if classes <= MATRIX else None,
        }

    def confusion(self) -> list[list[int]]:
        """Pictures of each class by what they were taken for."""
        label, taken = torch.cat(self.labels), torch.cat(self.predicted)[:, 0].long()
        classes = len(self.names)
        return torch.bincount(label * classes + taken, minlength=classes**2).view(classes, classes).tolist()

    def confusions(self, count: int) -> list[dict[str, Any]]:
        """The pairs of classes that were confused most often."""
        label, taken = torch.cat(self.labels), torch.cat(self.predicted)[:, 0].long()
        wrong = label != taken
        pairs, counts = torch.stack([label[wrong], taken[wrong]], 1).unique(dim=0, return_counts=True)
        order = torch.argsort(counts, descending=True, stable=True)[:count]
        total = torch.bincount(label, minlength=len(self.names))
        return [
            {
                "class": self.names[right],
                "taken_for": self.names[other],
                "pictures": int(number),
                "share": float(number / total[right]),
                "examples": ((label == right) & (taken == other)).nonzero()[:EXAMPLES, 0].tolist(),
            }
            for (right, other), number in zip(pairs[order].tolist(), counts[order], strict=True)
        ]


def multilabel_map(
    image_embeddings: Any, weights: Any, labels: Sequence[Sequence[int]], *, block: int = 1024
) -> dict[str, Any]:
    """Mean average precision of pictures that show several classes: VOC's, precision at each right picture.

    Each class ranks all pictures, so the pictures' rows are kept, and one class's scores at a time.

    Args:
        image_embeddings: `(n, dim)` floats.
        weights: `(classes, dim)` floats.
        labels: The classes of each picture; may be none.
        block: Pictures at a time.

    Returns:
        `mean_average_precision` over the classes that have pictures, `average_precision` by class number
        (None for a class without pictures), `chance` (the mean under random order), `pictures`.

    Raises:
        ValueError: A label outside the classes or given twice, no labels at all, and as `Rows`.

    Reference:
        Everingham et al. 2010 in the form without interpolation that clip-benchmark and torchnet use; equal
        scores by expectation.
    """
    images, classes = Rows(image_embeddings, "image_embeddings", block), Rows(weights, "classifier", block)
    if len(labels) != len(images):
        raise ValueError(f"expected the classes of each of {len(images)} pictures, got {len(labels)}")
    target = torch.zeros((len(images), len(classes)), dtype=torch.bool)
    for row, each in enumerate(labels):
        if len(each):
            numbers = checked_labels(each, len(classes), len(each))
            if len(set(numbers.tolist())) < len(numbers):
                raise ValueError(f"picture {row} has a class twice: {list(each)}")
            target[row, numbers] = True
    if not target.any():
        raise ValueError("no picture has a label")
    n = len(images)
    harmonic = torch.zeros(n + 1, dtype=torch.float64)
    harmonic[1:] = (1 / torch.arange(1, n + 1, dtype=torch.float64)).cumsum(0)
    everyone = torch.arange(n, device=images.device)
    found: list[float | None] = []
    by_chance = []
    for number in range(len(classes)):
        right = target[:, number]
        if not right.any():
            found.append(None)
            continue
        score = exact_scores(images, classes, everyone, torch.full_like(everyone, number)).cpu()
        found.append(average_precision(score, right, harmonic))
        by_chance.append(average_precision(torch.zeros(n), right, harmonic))
    known = [each for each in found if each is not None]
    return {
        "mean_average_precision": float(np.mean(known)),
        "average_precision": found,
        "chance": float(np.mean(by_chance)),
        "pictures": n,
        "classes": len(classes),
    }


def average_precision(
    scores: torch.Tensor, right: torch.Tensor, harmonic: torch.Tensor | None = None
) -> float:
    """Average precision of one ranking, equal scores by expectation.

    Args:
        scores: `(n,)`.
        right: bool `(n,)`, at least one True.
        harmonic: Harmonic numbers 0 to n, where they are at hand.
    """
    if harmonic is None:
        harmonic = torch.zeros(len(scores) + 1, dtype=torch.float64)
        harmonic[1:] = (1 / torch.arange(1, len(scores) + 1, dtype=torch.float64)).cumsum(0)
    _, level, tied = (-scores.double()).unique(return_inverse=True, return_counts=True)
    hit = torch.bincount(level, right.double(), len(tied)).long()
    start, before = tied.cumsum(0) - tied, hit.cumsum(0) - hit
    has = hit > 0
    k = torch.full_like(start[has], len(scores))
    each = ties.expected_precision(start[has], tied[has], hit[has], before[has], k, harmonic)
    return float(each.sum() / right.sum())


def checked_labels(labels: Any, classes: int, rows: int) -> torch.Tensor:
    """Labels as int64 `(rows,)`.

    Raises:
        ValueError: Another number of them, or one outside the classes.
        TypeError: They are not whole numbers.
    """
    array = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"labels: expected whole numbers of classes, got {array.dtype}")
    label = torch.as_tensor(array.astype(np.int64)).reshape(-1)
    if len(label) != rows:
        raise ValueError(f"expected a label for each of {rows} pictures, got {len(label)}")
    outside = ((label < 0) | (label >= classes)).nonzero()[:, 0]
    if len(outside):
        raise ValueError(
            f"label {int(label[outside[0]])} is outside the {classes} classes (0 to {classes - 1}); "
            f"{len(outside)} labels are: is this the right list of classes?"
        )
    return label
