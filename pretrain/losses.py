"""Contrastive losses: pure functions of unit-norm features. They never hold the model."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import blocks
from pretrain.collectives import sum_over_ranks
from pretrain.exchange import Alone, Exchange, open_exchange

DENSE_LOGITS = 1 << 20
"""With `tile=None`, matrices up to this size are held whole: 4 MiB in float32."""


def info_nce(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, tile: int | None = None
) -> Tensor:
    """Symmetric InfoNCE over the pairs of one process, exact at any size.

    Row i of both inputs is one pair; every other row is a negative. Large batches are taken in blocks of
    logits, which are recomputed for the gradient: memory for the features and their gradients only, and four
    matrix products of b^2 d where a dense symmetric loss takes six.

    Args:
        image_features: `(b, d)`, rows of length one; half precision is computed in float32.
        text_features: `(b, d)`, rows of length one.
        logit_scale: Scalar, already exponentiated (1 / temperature).
        tile: Side of a block of logits, in rows; None holds up to 1024 x 1024 logits whole (then the result
            can be differentiated twice) and chooses the blocks of larger ones.

    Returns:
        Scalar: the mean of the image-to-text and text-to-image cross-entropies, in nats. ln b is chance.

    Raises:
        ValueError: Shapes differ, or a tile below 1.

    Reference:
        Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, figure 3;
        blocks and online sums as in Cheng et al. 2024, Breaking the Memory Barrier (Inf-CL), but with a running
        maximum for both directions and both gradients from one block.

    Example:
        >>> features = F.normalize(torch.eye(4), dim=-1)
        >>> round(float(info_nce(features, features, torch.tensor(100.0))), 4)
        0.0
    """
    check_features(image_features, text_features)
    images, texts, scale = widen(image_features, text_features, logit_scale)
    if tile is None and len(images) ** 2 <= DENSE_LOGITS:
        logits = scale * images @ texts.T  # (b, b)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return InfoNCE.apply(images, texts, scale, tile, Alone(len(images)))  # pyright: ignore[reportReturnType]


def distributed_info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    tile: int | None = None,
    exchange: Literal["gather", "ring"] = "gather",
) -> Tensor:
    """InfoNCE over the pairs of all ranks, exact under gradient averaging.

    Each rank scores its own images against everybody's texts, once; the sums of a text's column and its
    gradient come back to the rank that owns it. The result is scaled by world / N: after the mean over ranks
    that DistributedDataParallel takes, every parameter (both towers and logit_scale) has the gradient that one
    process would have for the whole batch. Ranks may hold different numbers of rows.

    Args:
        image_features: This rank's `(b_r, d)`, rows of length one; at least one row on each rank.
        text_features: This rank's `(b_r, d)`.
        logit_scale: Scalar, already exponentiated, equal on all ranks.
        tile: Side of a block of logits; see `info_nce`.
        exchange: `gather` holds the texts of all ranks on each (fewest messages); `ring` passes them on, so
            that memory does not grow with the number of ranks.

    Returns:
        Scalar; its mean over the ranks is `info_nce` of the whole batch. The gradient that it is given must be
        the same on all ranks.

    Raises:
        ValueError: Shapes differ, a tile below 1, another exchange, or a rank without rows.

    Reference:
        `info_nce` on the concatenated rows, which the tests compare with, value and gradient.
    """
    check_features(image_features, text_features)
    way = open_exchange(exchange, len(image_features), image_features.device)
    if isinstance(way, Alone):
        return info_nce(image_features, text_features, logit_scale, tile=tile)
    images, texts, scale = widen(image_features, text_features, logit_scale)
    return InfoNCE.apply(images, texts, scale, tile, way)  # pyright: ignore[reportReturnType]


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    tile: int | None = None,
) -> Tensor:
    """SigLIP's loss over the pairs of one process: each image-text combination is a yes-or-no question.

    No sum runs over a row or column, so that the gradient is found while the loss is: three matrix products of
    b^2 d in blocks, nothing recomputed, memory for the features and their gradients only.

    Args:
        image_features: `(b, d)`, rows of length one; half precision is computed in float32.
        text_features: `(b, d)`, rows of length one.
        logit_scale: Scalar, already exponentiated; SigLIP starts at 10.
        logit_bias: Scalar, added to all logits; SigLIP starts at -10, since all but one in b answers are no.
        tile: Side of a block of logits, in rows; None chooses.

    Returns:
        Scalar: the sum over all combinations divided by b, in nats.

    Raises:
        ValueError: Shapes differ, or a tile below 1.

    Reference:
        Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, algorithm 1.

    Example:
        >>> features = F.normalize(torch.eye(4), dim=-1)
        >>> round(float(sigmoid_loss(features, features, torch.tensor(100.0), torch.tensor(-50.0))), 4)
        0.0
    """
    check_features(image_features, text_features)
    return apply_sigmoid(
        image_features, text_features, logit_scale, logit_bias, tile, Alone(len(image_features))
    )


def distributed_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    tile: int | None = None,
    exchange: Literal["gather", "ring"] = "ring",
) -> Tensor:
    """`sigmoid_loss` over the pairs of all ranks, exact under gradient averaging; see `distributed_info_nce`.

    Args:
        image_features: This rank's `(b_r, d)`, rows of length one; at least one row on each rank.
        text_features: This rank's `(b_r, d)`.
        logit_scale: Scalar, already exponentiated, equal on all ranks.
        logit_bias: Scalar, equal on all ranks.
        tile: Side of a block of logits; None chooses.
        exchange: How texts reach all ranks; by default in SigLIP's ring.

    Returns:
        Scalar; its mean over the ranks is `sigmoid_loss` of the whole batch. The gradient that it is given must
        be the same on all ranks.

    Raises:
        ValueError: Shapes differ, a tile below 1, another exchange, or a rank without rows.
    """
    check_features(image_features, text_features)
    way = open_exchange(exchange, len(image_features), image_features.device)
    return apply_sigmoid(image_features, text_features, logit_scale, logit_bias, tile, way)


def smoothing_term(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """What label smoothing adds to InfoNCE: `info_nce + epsilon * smoothing_term` is InfoNCE with smoothed labels.

    A label that gives epsilon / N to each of the N columns changes a cross-entropy by epsilon times the pair's
    logit less the row's mean logit, and the mean over all logits is the product of two mean features: no
    matrix of logits, whatever the batch, and so it goes with any tile and any exchange. Under several ranks
    every one must call it; the mean over ranks is that of the whole batch, gradients as in
    `distributed_info_nce`.

    Args:
        image_features: This rank's `(b_r, d)`.
        text_features: This rank's `(b_r, d)`.
        logit_scale: Scalar, already exponentiated.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes differ.

    Reference:
        `torch.nn.functional.cross_entropy(..., label_smoothing=epsilon)` in both directions.
    """
    check_features(image_features, text_features)
    images, texts, scale = widen(image_features, text_features, logit_scale)
    pairs = (images * texts).sum()[None]
    count = torch.full_like(pairs, len(images))
    sums = sum_over_ranks(torch.cat([images.sum(0), texts.sum(0), pairs, count]))
    mean_image, mean_text, mean_pair = (sums[:-1] / sums[-1].detach()).split([images.shape[1]] * 2 + [1])
    return scale * (mean_pair[0] - mean_image @ mean_text)


class InfoNCE(torch.autograd.Function):
    """InfoNCE in blocks over an exchange; keeps features and log-sum-exps for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, tile: int | None, exchange: Exchange
    ) -> Tensor:
        sides = blocks.block_sides(tile, images.device)
        row_state, own = blocks.no_sums(images), images.new_empty(len(images))

        def visit(first: int | None, luggage: tuple[Tensor, ...], carried: Tensor) -> None:
            blocks.add_log_sums(images, luggage[0], scale, row_state, carried, own, first, sides)

        column_state = exchange.tour((texts,), blocks.no_sums(texts), visit, "log_sum")
        ctx.save_for_backward(images, texts, scale, row_state, column_state)
        ctx.sides, ctx.exchange = sides, exchange
        ctx.weight = exchange.world / (2 * exchange.total)
        # Maximum less own logit first: at scale 100 their difference would drown in the sum's rounding.
        entropies = sum((state[:, 0] - own) + state[:, 1].log() for state in (row_state, column_state))
        return entropies.sum() * ctx.weight  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        images, texts, scale, row_state, column_state = ctx.saved_tensors
        by_image = torch.zeros_like(images)

        def visit(first: int | None, luggage: tuple[Tensor, ...], carried: Tensor) -> None:
            columns, state = luggage
            blocks.add_info_nce_gradients(
                images, columns, scale, row_state, state, by_image, carried, first, ctx.sides
            )

        by_text = ctx.exchange.tour((texts, column_state), torch.zeros_like(texts), visit, "sum")
        weight = gradient * ctx.weight
        by_scale = weight * torch.linalg.vecdot(by_image, images).sum()
        return by_image.mul_(weight * scale), by_text.mul_(weight), by_scale, None, None


class Sigmoid(torch.autograd.Function):
    """The sigmoid loss in blocks over an exchange; keeps the gradients for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        tile: int | None,
        exchange: Exchange,
    ) -> Tensor:
        sides = blocks.block_sides(tile, images.device)
        totals = images.new_zeros(2, dtype=torch.float64)
        wanted = any(ctx.needs_input_grad)
        by_image = torch.zeros_like(images) if wanted else None

        def visit(first: int | None, luggage: tuple[Tensor, ...], carried: Tensor) -> None:
            by_column = carried if wanted else None
            blocks.add_sigmoid(images, luggage[0], scale, bias, totals, by_image, by_column, first, sides)

        empty = torch.zeros_like(texts) if wanted else texts.new_zeros(len(texts), 1)
        by_text = exchange.tour((texts,), empty, visit, "sum")
        totals *= exchange.world / exchange.total
        if by_image is not None:
            weight = exchange.world / exchange.total
            by_scale = torch.linalg.vecdot(by_image, images).sum() * weight
            ctx.save_for_backward(by_image.mul_(scale * weight), by_text.mul_(weight), by_scale, totals[1])
        return totals[0].to(images.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        by_image, by_text, by_scale, by_bias = ctx.saved_tensors
        by_bias = (by_bias * gradient).to(gradient.dtype)
        return by_image * gradient, by_text * gradient, by_scale * gradient, by_bias, None, None


def apply_sigmoid(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    tile: int | None,
    exchange: Exchange,
) -> Tensor:
    """The sigmoid loss over an exchange."""
    images, texts, scale = widen(image_features, text_features, logit_scale)
    bias = logit_bias.to(images.dtype).reshape(())
    return Sigmoid.apply(images, texts, scale, bias, tile, exchange)  # pyright: ignore[reportReturnType]


def widen(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All in float32, or in float64 where the features are; the scale as a scalar (FSDP holds it as `(1,)`)."""
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    return image_features.to(dtype), text_features.to(dtype), logit_scale.to(dtype).reshape(())


def check_features(image_features: Tensor, text_features: Tensor) -> None:
    """Raise unless both are `(b, d)` of the same shape."""
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "expected image and text features of the same shape (b, d), "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
