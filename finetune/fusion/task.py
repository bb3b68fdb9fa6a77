"""What classification asks of the trainer: labels to learn, how it is judged, shown and written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from finetune.classification import classification_metrics
from finetune.fusion.model import FusionClassifier
from finetune.fusion.recipe import ClassifyTask
from finetune.fusion.samples import Post
from finetune.multilabel import multilabel_metrics
from pairstream.report import Card

Row = dict[str, Any]


class Classification:
    """Labels, judged by accuracy beside the most frequent label and beside each modality alone.

    `written` of an evaluated row is its probabilities: of both, and of the picture and the text alone, as far as the
    model has trained with the other one missing; elsewhere it would answer from vectors that are still random. Rows
    without a label are left out of every number.
    """

    def __init__(self, task: ClassifyTask):
        self.task = task
        self.main = "macro_f1" if task.several else "accuracy"
        self.counts: Counter[str] = Counter()
        self.usual: tuple[str, ...] = ()
        self.samples = 0
        self.without_text = task.modality_dropout > 0

    def learn(self, texts: Iterable[Post]) -> None:
        """Count the training labels.

        Raises:
            ValueError: Too few, or none of one that the recipe names.
        """
        posts = [post for post in texts if post.label is not None]
        self.without_text |= any(post.text is None for post in posts)
        rows = [post.label for post in posts]
        self.samples = len(rows)
        self.counts = Counter(name for row in rows for name in (row if self.task.several else (row,)))
        if len(self.counts) < (1 if self.task.several else 2):
            raise ValueError(
                f"the training shards have {len(self.counts)} different values of {self.task.label_key!r} in their "
                "JSON: expected at least two labels"
            )
        absent = [label for label in self.task.labels if label not in self.counts]
        if absent:
            raise ValueError(f"no training sample has the label {absent[0]!r}, which task.labels names")
        if self.task.several:
            self.usual = Counter(tuple(sorted(row)) for row in rows).most_common(1)[0][0]

    @property
    def labels(self) -> tuple[str, ...]:
        return self.task.labels or tuple(sorted(self.counts))

    @property
    def class_weights(self) -> list[float]:
        """Of the loss, in the order of the labels: 1 on average over the training samples; or, where a sample may
        have several, how many samples have it not for one that has."""
        if self.task.class_weights == "none":
            return [1.0] * len(self.labels)
        if self.task.several:
            return [max(self.samples - self.counts[label], 1) / self.counts[label] for label in self.labels]
        total = sum(self.counts.values())
        return [total / (len(self.labels) * self.counts[label]) for label in self.labels]

    def corpus(self, row: Post) -> Iterator[str]:
        if row.text is not None:
            yield row.text

    def write(self, model: FusionClassifier, images: Tensor, rows: list[Row]) -> None:
        texts = [row["judged_by"].text for row in rows]
        both = model.classify(images, texts)
        for row, found in zip(rows, both, strict=True):
            row["written"] = {"both": found}
        if self.without_text:
            for row, found in zip(rows, model.classify(images, [None] * len(rows)), strict=True):
                row["written"]["image"] = found
        if self.task.modality_dropout:
            named = [(row, text) for row, text in zip(rows, texts, strict=True) if text]
            alone = model.classify([None] * len(named), [text for _, text in named])
            for (row, _), found in zip(named, alone, strict=True):
                row["written"]["text"] = found

    def score(self, rows: Sequence[Row]) -> dict[str, Any]:
        labels = self.labels
        judged = [row for row in rows if row["judged_by"].label is not None]
        if not judged:
            raise ValueError(
                f"no validation sample has {self.task.label_key!r} in its JSON: nothing to judge"
            )
        several = self.task.several
        given = [row["judged_by"].label if several else (row["judged_by"].label,) for row in judged]
        unknown = sorted({name for names in given for name in names} - set(labels))
        if unknown:
            raise ValueError(
                f"the validation label {unknown[0]!r} is none of the training's: {', '.join(labels)}"
            )
        truth = np.array([[name in names for name in labels] for names in given])  # (n, labels)

        def numbers(which: str) -> dict[str, Any]:
            known = [place for place, row in enumerate(judged) if which in row["written"]]
            if not known:
                return {}
            found = np.array([[judged[place]["written"][which][name] for name in labels] for place in known])
            if several:
                return multilabel_metrics(found, truth[known], labels)
            return classification_metrics(found, truth[known].argmax(axis=1), labels)

        majority = self.usual if several else (self.counts.most_common(1)[0][0],)
        guess = np.array([name in majority for name in labels])
        blind = multilabel_metrics(np.tile(guess, (len(truth), 1)).astype(float), truth, labels)
        return {
            **numbers("both"),
            **{f"{which}_only": alone[self.main] for which in ("image", "text") if (alone := numbers(which))},
            "majority_baseline": blind[self.main],
            "majority_label": self.task.separator.join(majority),
            "images": len(judged),
            "unlabelled": len(rows) - len(judged),
        }

    def predictions(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [
            {
                "image_id": row["image_id"],
                **said(row["written"]["both"], self.task.several),
                "probabilities": row["written"]["both"],
            }
            for row in rows
        ]

    def cards(self, rows: Sequence[Row]) -> list[Card]:
        from finetune.tasks import shrink

        cards = []
        for row in rows:
            text, label = row["judged_by"]
            if not row["file"] or label is None:
                continue
            probabilities = row["written"]["both"]
            truth = label if self.task.several else (label,)
            guess = given_labels(probabilities) if self.task.several else [best(probabilities)]
            right = set(guess) == set(truth)
            lines = [", ".join(f"{name} ({probabilities[name]:.2f})" for name in guess) or "(no label)"]
            lines += [] if right else [f"humans: {', '.join(truth) or '(no label)'}"]
            mark = "right" if right else "wrong"
            cards.append(Card(shrink(row["file"]), text or "(no text)", lines, mark))
        return cards


def best(probabilities: dict[str, float]) -> str:
    """The likeliest label."""
    return max(probabilities, key=probabilities.__getitem__)


def given_labels(probabilities: dict[str, float]) -> list[str]:
    """The labels that are likelier than not, likeliest first."""
    return sorted(
        (name for name, value in probabilities.items() if value >= 0.5), key=lambda n: -probabilities[n]
    )


def said(probabilities: dict[str, float], several: bool) -> dict[str, Any]:
    """What a result file says: `label`, or `labels` where there may be several."""
    return {"labels": given_labels(probabilities)} if several else {"label": best(probabilities)}
