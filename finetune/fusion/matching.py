"""What image-text matching asks of the trainer: does this text belong to this picture?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from finetune.classification import classification_metrics
from finetune.fusion.model import FusionClassifier
from finetune.fusion.recipe import MatchTask
from finetune.fusion.samples import MATCHES, wrong_captions
from pairstream.report import Card

Row = dict[str, Any]


class Matching:
    """Right and wrong captions, one to one, judged by accuracy and AUROC.

    Each held-out picture is shown with its first caption and with that of the next picture of its batch that is none of
    its own; half of the judgements are right by chance.
    """

    main = "accuracy"
    labels = MATCHES
    class_weights = (1.0, 1.0)

    def __init__(self, task: MatchTask):
        self.task = task

    def learn(self, texts: Iterable[list[str]]) -> None:
        """Make sure that there are wrong captions at all.

        Raises:
            ValueError: All captions are the same.
        """
        if len({caption for row in texts for caption in row}) < 2:
            raise ValueError(
                "all training captions are the same: matching needs some that are wrong for a picture"
            )

    def corpus(self, row: list[str]) -> Iterator[str]:
        yield from row

    def write(self, model: FusionClassifier, images: Tensor, rows: list[Row]) -> None:
        own = [(row["judged_by"][0], frozenset(row["judged_by"])) for row in rows]
        others = wrong_captions(own, 1)
        pairs = [(place, own[place][0]) for place in range(len(rows))]
        pairs += [(place, own[other[0]][0]) for place, other in enumerate(others) if other]
        found = model.scores(images, [text for _, text in pairs], [place for place, _ in pairs]).numpy()
        for row in rows:
            row["written"] = []
        for number, ((place, text), scores) in enumerate(zip(pairs, found, strict=True)):
            rows[place]["written"].append((text, number < len(rows), float(scores[1])))

    def score(self, rows: Sequence[Row]) -> dict[str, Any]:
        judged = [entry for row in rows for entry in row["written"]]
        matching = np.array([probability for _, _, probability in judged])
        truth = np.array([int(right) for _, right, _ in judged])
        shares = np.stack([1 - matching, matching], axis=1)
        return {
            **classification_metrics(shares, truth, MATCHES),
            "majority_baseline": float(max(truth.mean(), 1 - truth.mean())),
            "majority_label": MATCHES[int(truth.mean() >= 0.5)],
            "images": len(rows),
            "unlabelled": 0,
        }

    def predictions(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [
            {"image_id": row["image_id"], "text": text, "match": probability}
            for row in rows
            for text, _, probability in row["written"]
        ]

    def cards(self, rows: Sequence[Row]) -> list[Card]:
        from finetune.tasks import shrink

        cards = []
        for number, row in enumerate(rows):
            if not row["file"]:
                continue
            text, right, probability = row["written"][number % len(row["written"])]
            lines = [f"{'match' if probability >= 0.5 else 'no match'} ({probability:.2f})"]
            mark = "right" if (probability >= 0.5) == right else "wrong"
            cards.append(Card(shrink(row["file"]), text, lines, mark))
        return cards
