"""Posts: a picture, its text and its label, as rows and batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.faults import Fault
from data.samples import RawSample
from data.transforms import EvalTransform, TrainTransform, decode_image
from finetune.fusion.model import IGNORED
from finetune.fusion.recipe import ClassifyTask
from finetune.samples import stack


class Post(NamedTuple):
    """A sample's text and label, None where it has none."""

    text: str | None
    label: str | None


def read_post(task: ClassifyTask, sample: RawSample) -> Post:
    """The text and label of a sample.

    Raises:
        Fault: `bad_text` or `bad_label`: there, but no text; or `unknown_label`: not one of `task.labels`.
    """
    text, label = sample.record.get(task.text_key), sample.record.get(task.label_key)
    if text is not None and not isinstance(text, str):
        raise Fault("bad_text", f"{task.text_key} should be a text, got {text!r}"[:200])
    if isinstance(label, int):  # a csv's class numbers, and true and false
        label = str(label)
    if label is not None and (not isinstance(label, str) or not label.strip()):
        raise Fault("bad_label", f"{task.label_key} should be a text or a whole number, got {label!r}"[:200])
    if label is not None and task.labels and label not in task.labels:
        raise Fault("unknown_label", f"{label!r} is none of {', '.join(task.labels)}"[:200])
    return Post(text.strip() if text and text.strip() else None, label)


@dataclass(frozen=True)
class PostLoad:
    """A picture, the tokens of its text, and the number of its label.

    Attributes:
        task: With the labels filled in.
        tokenize: Texts to int64 `(n, m)`.
        transform: Of the picture; None where its features are kept, so that nothing is decoded.
    """

    task: ClassifyTask
    tokenize: Any
    transform: EvalTransform | TrainTransform | None

    def __call__(
        self, sample: RawSample, rng: np.random.Generator
    ) -> tuple[Tensor | None, Tensor, bool, int]:
        post = read_post(self.task, sample)
        image = None if self.transform is None else self.transform(decode_image(sample.image), rng)
        label = IGNORED if post.label is None else self.task.labels.index(post.label)
        return image, self.tokenize([post.text or ""])[0], post.text is None, label


@dataclass(frozen=True)
class PostCollate:
    """Stack a batch: `text` int64 `(b, m)`, `text_missing` bool `(b,)`, `labels` int64 `(b,)`, and `images`."""

    size: tuple[int, int]
    pictures: bool = True

    def __call__(self, rows: list[tuple[Tensor | None, Tensor, bool, int]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "text": torch.stack([row[1] for row in rows]) if rows else torch.zeros((0, 1), dtype=torch.int64),
            "text_missing": torch.tensor([row[2] for row in rows], dtype=torch.bool),
            "labels": torch.tensor([row[3] for row in rows], dtype=torch.int64),
        }
        if self.pictures:
            batch["images"] = stack([row[0] for row in rows if row[0] is not None], self.size)
        return batch
