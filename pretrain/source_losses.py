"""How well the pairs of each source of a mixture are told apart."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.mixture import Mixture
from pretrain.collectives import gather_counts, gather_rows, several_ranks, sum_over_ranks
from pretrain.objectives import Features

ROWS = 1024  # of the logits that are held at a time


@torch.no_grad()
def source_losses(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, sources: Tensor, count: int
) -> Tensor:
    """Mean InfoNCE of the pairs of each source, against the whole batch of all ranks.

    Their mean, weighted by pairs, is the InfoNCE of the batch. One matrix product of the batch with itself: for the
    steps that are logged. Every rank must call it.

    Args:
        image_features: This rank's `(b_r, d)`, rows of length one.
        text_features: This rank's `(b_r, d)`.
        logit_scale: Scalar, already exponentiated.
        sources: Number of each pair's source; int64 `(b_r,)`.
        count: Sources.

    Returns:
        float32 `(count,)` in nats, equal on all ranks; NaN for a source without pairs.
    """
    images, texts = image_features.float(), text_features.float()
    all_images, all_texts, first = images, texts, 0
    if several_ranks():
        counts = gather_counts(len(images), images.device)
        all_images, all_texts = gather_rows(images, counts), gather_rows(texts, counts)  # (b, d)
        first = sum(counts[: torch.distributed.get_rank()])
    target = torch.arange(first, first + len(images), device=images.device)
    scale = logit_scale.float()
    losses = torch.cat(
        [
            (
                F.cross_entropy(scale * images[part] @ all_texts.T, target[part], reduction="none")
                + F.cross_entropy(scale * texts[part] @ all_images.T, target[part], reduction="none")
            )
            / 2
            for part in (slice(start, start + ROWS) for start in range(0, len(images), ROWS))
        ]
    )  # (b_r,)
    sums = torch.zeros(2, count, device=images.device)
    owners = sources.to(images.device)
    sums[0].index_add_(0, owners, losses)
    sums[1].index_add_(0, owners, torch.ones_like(losses))
    total, pairs = sum_over_ranks(sums)
    return total / pairs


class SourceLosses:
    """The loss of each source of a mixture, taken in the steps that are logged; nothing where there is one source.

    Args:
        mixture: Of the stream.
    """

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self.rows: Tensor | None = None  # sources of the pairs of a step that is logged
        self.losses: Tensor | None = None  # as `source_losses` has them; None when there was no step

    def watch(self, sources: Tensor, *, logged: bool) -> None:
        """Begin a step with the number of each pair's source, int64 `(b_r,)`."""
        self.rows = sources if logged and len(self.mixture.names) > 1 else None

    def take(self, features: Features) -> None:
        """Keep the losses of a step that is logged; every rank must call it."""
        if self.rows is None:
            return
        images, texts, scale = features[:3]
        texts = texts.reshape(len(images), -1, texts.shape[-1])[
            :, 0
        ]  # of several captions the first one drawn
        self.losses = source_losses(images, texts, scale, self.rows, len(self.mixture.names))

    def record(self, before: int, after: int, seconds: float) -> dict[str, Any]:
        """What the log says of the sources: samples and epochs so far, samples/s, the last step's loss.

        Args:
            before: Step of the line before.
            after: Step of this line.
            seconds: Time between them.

        Returns:
            `sources`, with numbers by source name, a loss of None for a source without pairs; empty for one source.
        """
        mixture = self.mixture
        if len(mixture.names) < 2:
            return {}
        told = [None] * len(mixture.names) if self.losses is None else self.losses.tolist()
        self.losses = None
        epochs, counts = (
            mixture.epochs_seen(after),
            zip(mixture.drawn(before), mixture.drawn(after), strict=True),
        )
        return {
            "sources": {
                name: {
                    "samples": drawn,
                    "epochs": epochs[name],
                    "samples_per_s": (drawn - earlier) / seconds,
                    "loss": None if loss is None or math.isnan(loss) else loss,
                }
                for name, (earlier, drawn), loss in zip(mixture.names, counts, told, strict=True)
            }
        }
