"""How well the pairs of each source of a mixture are told apart."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from data.mixture import Mixture
from pretrain.collectives import gather_counts, gather_rows, several_ranks, sum_over_ranks

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


def source_records(
    mixture: Mixture, before: int, after: int, seconds: float, losses: Tensor | None
) -> dict[str, dict[str, float | None]]:
    """What the log says of a mixture's sources: samples and epochs so far, samples/s, the last step's loss.

    Args:
        mixture: Of the stream.
        before: Step of the line before.
        after: Step of this line.
        seconds: Time between them.
        losses: As `source_losses` has them, NaN for a source without rows; None when there was no step.

    Returns:
        Numbers by source name.
    """
    told = [None] * len(mixture.names) if losses is None else losses.tolist()
    epochs, counts = mixture.epochs_seen(after), zip(mixture.drawn(before), mixture.drawn(after), strict=True)
    return {
        name: {
            "samples": drawn,
            "epochs": epochs[name],
            "samples_per_s": (drawn - earlier) / seconds,
            "loss": None if loss is None or math.isnan(loss) else loss,
        }
        for name, (earlier, drawn), loss in zip(mixture.names, counts, told, strict=True)
    }
