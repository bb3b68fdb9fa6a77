"""The losses of a recipe's `terms`: pure functions of what the network put out, exact over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.collectives import gather_counts, several_ranks, sum_over_ranks
from pretrain.losses import check_features
from pretrain.soft_targets import everyone


class Reverse(torch.autograd.Function):
    """The identity, whose gradient comes back with the opposite sign and `weight` times as long."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.weight = weight
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -ctx.weight * gradient, None


def reverse_gradient(value: Tensor, weight: float) -> Tensor:
    """Let what comes after learn, and what comes before unlearn (Ganin & Lempitsky 2015, equation 4)."""
    return Reverse.apply(value, weight)  # pyright: ignore[reportReturnType]


def mean_of_batch(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """This rank's share of a mean over the rows of all ranks: the mean of the shares over ranks is that mean.

    Args:
        values: One for each row of this rank, or a sum of `counts` such values.
        counts: How many values each entry sums up; None for one. No gradient flows into it.

    Returns:
        Scalar.
    """
    if counts is None and not several_ranks():
        return values.mean()
    if counts is None:
        total = values.new_tensor(float(sum(gather_counts(values.numel(), values.device))))
    else:
        total = sum_over_ranks(counts.detach().sum().to(values.dtype))
    world = dist.get_world_size() if several_ranks() else 1
    return values.sum() * (world / total.clamp(min=1))


def adversarial_loss(image_logits: Tensor, text_logits: Tensor) -> Tensor:
    """How badly a critic tells pictures' embeddings from texts': its cross-entropy, with both sides at half.

    Args:
        image_logits: This rank's `(b,)`; above zero the critic says picture.
        text_logits: This rank's `(b,)` or `(b, k)`.

    Returns:
        Scalar, in nats; ln 2 for a critic that cannot tell them.

    Raises:
        ValueError: Other numbers of rows.

    Reference:
        Ganin & Lempitsky 2015, Unsupervised Domain Adaptation by Backpropagation, with the two modalities as domains.
    """
    if image_logits.ndim != 1 or text_logits.ndim not in (1, 2) or len(text_logits) != len(image_logits):
        raise ValueError(
            f"expected the critic's logits of pictures (b,) and of texts (b,) or (b, k), got "
            f"{tuple(image_logits.shape)} and {tuple(text_logits.shape)}"
        )
    return (mean_of_batch(F.softplus(-image_logits)) + mean_of_batch(F.softplus(text_logits))) / 2


def nt_xent(first: Tensor, second: Tensor, temperature: float | Tensor) -> Tensor:
    """SimCLR's loss: each view of a picture finds the other among all other views of all pictures.

    Args:
        first: This rank's `(b, d)`, rows of length one: a view of each picture.
        second: This rank's `(b, d)`: another view of each.
        temperature: Logits are cosines over it.

    Returns:
        Scalar: the mean over the 2 N views of all ranks, in nats; chance is ln(2 N - 1).

    Raises:
        ValueError: Shapes differ, or a temperature that is not above 0.

    Reference:
        Chen et al. 2020, SimCLR, equation 1; Mu et al. 2021, SLIP.
    """
    check_features(first, second)
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    firsts, seconds = everyone(first), everyone(second)
    own = torch.arange(len(first), device=first.device) + firsts.first
    total = first.new_zeros(())
    for rows, twins, others in ((first, seconds.rows, firsts.rows), (second, firsts.rows, seconds.rows)):
        alike = rows @ others.T / temperature  # (b, N)
        is_own = own[:, None] == torch.arange(len(others), device=own.device)
        logits = torch.cat([rows @ twins.T / temperature, alike.masked_fill(is_own, -torch.inf)], dim=1)
        total = total + F.cross_entropy(logits, own, reduction="sum")
    return total * (firsts.weight / 2)


def caption_entropies(logits: Tensor, tokens: Tensor, pad: int) -> Tensor:
    """Cross-entropy of each caption's tokens, given those before, summed over the caption.

    Args:
        logits: `(n, context - 1, vocabulary)`: entry t is of token t + 1.
        tokens: int64 `(n, context)`.
        pad: The token that stands for nothing and is not asked for.

    Returns:
        `(n,)`, in nats.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    entropies = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], ignore_index=pad, reduction="none")
    return entropies.sum(1)


def caption_loss(entropies: Tensor, tokens: Tensor, pad: int) -> Tensor:
    """Mean cross-entropy of a token over all captions of all ranks.

    A mean of the ranks' own means would give a token of a rank with short captions more weight.

    Args:
        entropies: `(b,)` or `(b, k)`, as `caption_entropies` has them.
        tokens: int64 `(b, context)` or `(b, k, context)`.
        pad: As there.

    Returns:
        Scalar, in nats.

    Reference:
        Yu et al. 2022, CoCa, equation 3; open_clip's CoCaLoss on one process.
    """
    return mean_of_batch(entropies, (tokens[..., 1:] != pad).sum(-1))
