"""Global contrastive estimators: gradients of the whole set's loss from small batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pretrain.collectives import several_ranks
from pretrain.losses import check_features, widen
from pretrain.soft_targets import everyone


class SampleMeans(nn.Module):
    """What each sample's denominators have been so far, by its index in the set; belongs into the checkpoint.

    Two float32 logarithms a sample; NaN for one that was never seen.

    Args:
        samples: Samples in the set.
    """

    image: Tensor
    text: Tensor

    def __init__(self, samples: int):
        super().__init__()
        self.register_buffer("image", torch.full((samples,), torch.nan))
        self.register_buffer("text", torch.full((samples,), torch.nan))

    def resize(self, samples: int, device: torch.device) -> None:
        """Begin anew for a set of so many samples."""
        self.image, self.text = (torch.full((samples,), torch.nan, device=device) for _ in range(2))

    def exchange(self, indices: Tensor) -> None:
        """Let all ranks have what each found of its own samples, which another rank may draw in the next epoch.

        Args:
            indices: int64 `(b,)`: this rank's samples of the step.
        """
        if several_ranks():
            everyones = everyone(indices).rows
            for values in (self.image, self.text):
                values[everyones] = everyone(values[indices]).rows


def global_info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    indices: Tensor,
    means: SampleMeans,
    *,
    gamma: float,
    floor: float | None = None,
) -> Tensor:
    """InfoNCE against a moving average of each sample's denominator instead of the batch's own.

    A small batch underestimates how many negatives a sample has to be told from, and its gradient is biased.
    Here g_i = 1/(N-1) sum_{j != i} exp(z_ij - z_ii) moves u_i <- (1 - gamma) u_i + gamma g_i, and the gradient
    is that of sum_i g_i / (u_i + floor). All in logarithms: exp(200) overflows.

    Args:
        image_features: This rank's `(b, d)`, rows of length one.
        text_features: This rank's `(b, d)`.
        logit_scale: Scalar, already exponentiated.
        indices: int64 `(b,)`: each sample's index in the set, the same in every epoch.
        means: The averages; those of `indices` are updated, on this rank (`SampleMeans.exchange` tells the others). A
            sample's first g_i is taken as it is.
        gamma: Share of the new value, above 0 and at most 1. With 1 the gradient is that of InfoNCE over the
            batch.
        floor: Added to the average; None is 1 / (N - 1), with which gamma = 1 is InfoNCE exactly.

    Returns:
        Scalar: the loss with the averages in it, in nats; its gradient is the estimator's, which is not the
        derivative of that value.

    Raises:
        ValueError: Shapes or indices that do not fit, fewer than two pairs, or gamma out of range.

    Reference:
        Yuan et al. 2022, SogCLR, algorithm 1; Wei et al. 2024, FastCLIP, v1 (one temperature, here inside the
        logarithm's factor as in InfoNCE: no multiplication by tau).
    """
    check_features(image_features, text_features)
    if not 0 < gamma <= 1:
        raise ValueError(f"expected 0 < gamma <= 1, got {gamma}")
    if indices.shape != image_features.shape[:1] or bool(
        ((indices < 0) | (indices >= len(means.image))).any()
    ):
        raise ValueError(
            f"expected one index below {len(means.image)} for each of {len(image_features)} pairs, "
            f"got {tuple(indices.shape)} from {indices.min()} to {indices.max()}"
        )
    images, texts, scale = widen(image_features, text_features, logit_scale)
    all_images, all_texts = everyone(images), everyone(texts)
    count = len(all_images.rows)
    if count < 2:
        raise ValueError("a single pair has nothing to be contrasted with")
    log_floor = math.log(1 / (count - 1) if floor is None else floor) if floor != 0 else -math.inf
    own = torch.arange(len(images), device=images.device) + all_images.first
    total = images.new_zeros(())
    for rows, columns, past in ((images, all_texts.rows, means.image), (texts, all_images.rows, means.text)):
        logits = scale * rows @ columns.T  # (b, N)
        pair = logits.gather(1, own[:, None])
        is_own = own[:, None] == torch.arange(count, device=own.device)
        log_g = (logits - pair).masked_fill(is_own, -torch.inf).logsumexp(1) - math.log(count - 1)
        with torch.no_grad():
            before = past[indices].to(log_g.dtype)
            moved = (
                torch.logaddexp(before + math.log1p(-gamma), log_g + math.log(gamma)) if gamma < 1 else log_g
            )
            now = torch.where(before.isnan(), log_g, moved)
            past[indices] = now.to(past.dtype)
            bottom = torch.logaddexp(now, torch.full_like(now, log_floor))
        estimate = (log_g - bottom).exp()  # g / (u + floor)
        value = bottom + math.log(count - 1)
        total = total + (value + estimate - estimate.detach()).sum()
    return total * (all_images.weight / 2)
