"""Contrastive losses with other targets than one pair a row: several positives, teachers, weighted negatives.

They compare this rank's rows with the columns of all ranks, whose features are gathered with their gradients,
and hold `(b, N)` logits for each direction. Each is exact under gradient averaging, as `distributed_info_nce`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.collectives import gather_counts, gather_rows, several_ranks
from pretrain.losses import check_features, widen


class Everyone(NamedTuple):
    """The rows of all ranks in rank order, and this rank's place among them."""

    rows: Tensor
    """`(N, ...)`"""
    first: int
    """Where this rank's begin."""
    weight: float
    """world / N: a sum over this rank's rows times it has the batch's mean as its mean over ranks."""


def everyone(rows: Tensor) -> Everyone:
    """Gather rows `(b_r, ...)` of all ranks, with gradients where they have any."""
    if not several_ranks():
        return Everyone(rows, 0, 1 / len(rows))
    counts = gather_counts(len(rows), rows.device)
    gathered = gather_rows(rows.reshape(len(rows), -1), counts).reshape(-1, *rows.shape[1:])
    return Everyone(gathered, sum(counts[: dist.get_rank()]), len(counts) / sum(counts))


def soft_targets(row_ids: Tensor, column_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Equal shares for all columns that share an id with a row.

    Args:
        row_ids: int64 `(n,)`, or `(n, r)` for rows with several ids.
        column_ids: int64 `(m,)` or `(m, s)`.
        dtype: Of the result.

    Returns:
        `(n, m)`, rows that sum to one.

    Raises:
        ValueError: A row without a column of its id.
    """
    rows, columns = row_ids.reshape(len(row_ids), -1), column_ids.reshape(len(column_ids), -1)
    same = torch.zeros((len(rows), len(columns)), dtype=torch.bool, device=rows.device)
    for own in rows.unbind(1):
        for other in columns.unbind(1):
            same |= own[:, None] == other[None, :]
    positives = same.to(dtype)  # (n, m)
    counts = positives.sum(1, keepdim=True)
    if not bool((counts > 0).all()):
        raise ValueError(
            f"{int((counts == 0).sum())} of {len(row_ids)} rows have no positive: every image needs a text of "
            "its id in the batch, and every text an image"
        )
    return positives / counts


def multi_positive_info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor,
    text_ids: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """InfoNCE in which all texts that share an id with an image are its positives, and the other way round.

    For several captions of an image, whose texts are then more than the images, and for batches in which
    captions repeat: to plain InfoNCE an equal caption is a negative that no model can tell from the positive.

    Args:
        image_features: This rank's `(b, d)`, rows of length one.
        text_features: This rank's `(m, d)`.
        logit_scale: Scalar, already exponentiated.
        image_ids: int64 `(b,)`, or `(b, r)` for images with several ids; comparable over ranks.
        text_ids: int64 `(m,)` or `(m, s)`; `image_ids` when left out.
        label_smoothing: Share of each row's target that is spread evenly over all columns.

    Returns:
        Scalar: the mean of both cross-entropies, in nats. Without a repeated id it is InfoNCE.

    Raises:
        ValueError: Features and ids that do not fit, or a row without a positive.

    Reference:
        Khosla et al. 2020, Supervised Contrastive Learning, equation 2 (L_out), over two modalities.
    """
    text_ids = image_ids if text_ids is None else text_ids
    for features, ids, name in ((image_features, image_ids, "image"), (text_features, text_ids, "text")):
        if features.ndim != 2 or ids.ndim not in (1, 2) or len(ids) != len(features):
            raise ValueError(
                f"expected {name} features (n, d) with ids (n,) or (n, r), got {tuple(features.shape)} "
                f"and ids {tuple(ids.shape)}"
            )
    images, texts, scale = widen(image_features, text_features, logit_scale)
    all_images, all_texts = everyone(images), everyone(texts)
    all_image_ids, all_text_ids = everyone(image_ids).rows, everyone(text_ids).rows
    total = images.new_zeros(())
    for rows, ids, columns, column_ids, weight in (
        (images, image_ids, all_texts.rows, all_text_ids, all_images.weight),
        (texts, text_ids, all_images.rows, all_image_ids, all_texts.weight),
    ):
        target = soft_targets(ids, column_ids, rows.dtype)
        logits = scale * rows @ columns.T
        entropy = F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)
        total = total + entropy * (weight / 2)
    return total


class Teacher(NamedTuple):
    """What a teacher says of this rank's pairs."""

    image_features: Tensor
    """`(b, d_teacher)`, rows of length one."""
    text_features: Tensor
    logit_scale: Tensor
    """Scalar, already exponentiated."""
    share: float = 1.0
    """What it counts beside other teachers."""


def distillation_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, teachers: Sequence[Teacher]
) -> Tensor:
    """How far the student's softmax over all pairs of the batch is from its teachers'.

    Several teachers are one: the mean of their probabilities, weighted by their shares (the mean of logits would be
    a product of experts, which one sure and wrong teacher spoils). Their features may have any width, and may be
    stored ones.

    Args:
        image_features: This rank's `(b, d)`, rows of length one.
        text_features: This rank's `(b, d)`.
        logit_scale: Scalar, already exponentiated.
        teachers: One or more; no gradient flows into them.

    Returns:
        Scalar: the mean over rows and both directions of KL(teacher || student), in nats; 0 for a student
        that agrees.

    Raises:
        ValueError: No teacher, or one with another number of rows.

    Reference:
        Vasu et al. 2024, MobileCLIP, equation 2 (without its temperature squared).
    """
    check_features(image_features, text_features)
    if not teachers:
        raise ValueError("distillation needs a teacher, got none")
    images, texts, scale = widen(image_features, text_features, logit_scale)
    all_images, all_texts = everyone(images), everyone(texts)
    targets = [images.new_zeros(len(images), len(all_images.rows)) for _ in range(2)]  # (b, N)
    with torch.no_grad():
        for teacher in teachers:
            check_features(teacher.image_features, teacher.text_features)
            if len(teacher.image_features) != len(images):
                raise ValueError(
                    f"expected a teacher's features for {len(images)} pairs, got {len(teacher.image_features)}"
                )
            by_image, by_text, sharp = widen(*teacher[:3])
            share = teacher.share / sum(other.share for other in teachers)
            for target, rows, columns in (
                (targets[0], by_image, everyone(by_text).rows),
                (targets[1], by_text, everyone(by_image).rows),
            ):
                target += (sharp * rows @ columns.T).softmax(1).to(target.dtype) * share
    total = images.new_zeros(())
    for target, rows, columns in (
        (targets[0], images, all_texts.rows),
        (targets[1], texts, all_images.rows),
    ):
        student = F.log_softmax(scale * rows @ columns.T, dim=1)
        total = total + F.kl_div(student, target, reduction="sum")
    return total * (all_images.weight / 2)


def hard_negative_info_nce(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, beta: float
) -> Tensor:
    """InfoNCE in which a negative counts the more, the more it looks like a positive.

    Row i's negative j has the weight (N - 1) exp(beta z_ij) / sum_{k != i} exp(beta z_ik), held constant in the
    gradient; weights have the mean one. Unsuited to batches with repeated captions, which become the hardest.

    Args:
        image_features: This rank's `(b, d)`, rows of length one.
        text_features: This rank's `(b, d)`.
        logit_scale: Scalar, already exponentiated.
        beta: Sharpness; 0 is InfoNCE, the paper's best were 0.1 to 0.5 on logits.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: Shapes differ, or a negative beta.

    Reference:
        Radenovic et al. 2023, Filtering, Distillation, and Hard Negatives, equation 4 with alpha = 1.
    """
    check_features(image_features, text_features)
    if beta < 0:
        raise ValueError(f"expected beta >= 0, got {beta}")
    images, texts, scale = widen(image_features, text_features, logit_scale)
    all_images, all_texts = everyone(images), everyone(texts)
    total = images.new_zeros(())
    for rows, columns in ((images, all_texts.rows), (texts, all_images.rows)):
        logits = scale * rows @ columns.T  # (b, N)
        own = torch.arange(len(rows), device=rows.device) + all_images.first
        with torch.no_grad():
            is_own = F.one_hot(own, len(columns)).bool()
            sharp = (beta * logits).masked_fill(is_own, -torch.inf)
            weight = sharp.log_softmax(1) + math.log(max(len(columns) - 1, 1))
            weight = weight.masked_fill(is_own, 0)  # the pair itself counts once
        total = total + F.cross_entropy(logits + weight, own, reduction="sum")
    return total * (all_images.weight / 2)
