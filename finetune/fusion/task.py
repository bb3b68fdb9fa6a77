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
from pairstream.report import Card

Row = dict[str, Any]


class Classification:
    """Labels, judged by accuracy beside the most frequent label and beside each modality alone.

    `written` of an evaluated row is its probabilities: of both, of the picture alone, and of the text alone. Rows
    without a label are left out of every number.
    """

    main = "accuracy"

    def __init__(self, task: ClassifyTask):
        self.task = task
        self.counts: Counter[str] = Counter()

    def learn(self, texts: Iterable[Post]) -> None:
        """Count the training labels.

        Raises:
            ValueError: Fewer than two, or none of one that the recipe names.
        """
        self.counts = Counter(post.label for post in texts if post.label is not None)
        if len(self.counts) < 2:
            raise ValueError(
                f"the training shards have {len(self.counts)} different values of {self.task.label_key!r} in their "
                "JSON: expected at least two labels"
            )
        absent = [label for label in self.task.labels if label not in self.counts]
        if absent:
            raise ValueError(f"no training sample has the label {absent[0]!r}, which task.labels names")

    @property
    def labels(self) -> tuple[str, ...]:
        return self.task.labels or tuple(sorted(self.counts))

    @property
    def class_weights(self) -> list[float]:
        """Of the loss, in the order of the labels; 1 on average over the training samples."""
        if self.task.class_weights == "none":
            return [1.0] * len(self.labels)
        total = sum(self.counts.values())
        return [total / (len(self.labels) * self.counts[label]) for label in self.labels]

    def corpus(self, row: Post) -> Iterator[str]:
        if row.text is not None:
            yield row.text

    def write(self, model: FusionClassifier, images: Tensor, rows: list[Row]) -> None:
        texts = [row["judged_by"].text for row in rows]
        both = model.classify(images, texts)
        image_only = model.classify(images, [None] * len(rows))
        text_only = iter(model.classify([None for text in texts if text], [text for text in texts if text]))
        for row, text, first, second in zip(rows, texts, both, image_only, strict=True):
            row["written"] = {"both": first, "image": second, "text": next(text_only) if text else None}

    def score(self, rows: Sequence[Row]) -> dict[str, Any]:
        labels = self.labels
        judged = [row for row in rows if row["judged_by"].label is not None]
        if not judged:
            raise ValueError(
                f"no validation sample has {self.task.label_key!r} in its JSON: nothing to judge"
            )
        unknown = sorted({row["judged_by"].label for row in judged} - set(labels))
        if unknown:
            raise ValueError(
                f"the validation label {unknown[0]!r} is none of the training's: {', '.join(labels)}"
            )
        truth = np.array([labels.index(row["judged_by"].label) for row in judged])

        def numbers(which: str) -> dict[str, Any]:
            known = [place for place, row in enumerate(judged) if row["written"][which]]
            if not known:
                return {"accuracy": None}
            found = np.array([[judged[place]["written"][which][name] for name in labels] for place in known])
            return classification_metrics(found, truth[known], labels)

        majority = self.counts.most_common(1)[0][0]
        return {
            **numbers("both"),
            "image_only": numbers("image")["accuracy"],
            "text_only": numbers("text")["accuracy"],
            "majority_baseline": float((truth == labels.index(majority)).mean()),
            "majority_label": majority,
            "images": len(judged),
            "unlabelled": len(rows) - len(judged),
        }

    def predictions(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [
            {
                "image_id": row["image_id"],
                "label": best(row["written"]["both"]),
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
            guess = best(row["written"]["both"])
            lines = [f"{guess} ({row['written']['both'][guess]:.2f})"]
            lines += [] if guess == label else [f"humans: {label}"]
            mark = "right" if guess == label else "wrong"
            cards.append(Card(shrink(row["file"]), text or "(no text)", lines, mark))
        return cards


def best(probabilities: dict[str, float]) -> str:
    """The likeliest label."""
    return max(probabilities, key=probabilities.__getitem__)
