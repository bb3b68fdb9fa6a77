"""Contrastive losses: pure functions of unit-norm features. They never hold the model."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.collectives import gather_counts, gather_rows


def info_nce(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over the pairs of one process.

    Row i of both inputs is one pair; every other row is a negative. The whole `(b, b)` matrix of logits is
    held for the backward pass, 4 b^2 bytes and its gradient.

    Args:
        image_features: `(b, d)`, rows of length one.
        text_features: `(b, d)`, rows of length one.
        logit_scale: Scalar, already exponentiated (1 / temperature).

    Returns:
        Scalar: the mean of the image-to-text and text-to-image cross-entropies, in nats. ln b is chance.

    Raises:
        ValueError: Shapes differ.

    Reference:
        Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, figure 3.

    Example:
        >>> features = F.normalize(torch.eye(4), dim=-1)
        >>> round(float(info_nce(features, features, torch.tensor(100.0))), 4)
        0.0
    """
    check_features(image_features, text_features)
    logits = logit_scale * image_features @ text_features.T  # (b, b)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def distributed_info_nce(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """InfoNCE over the pairs of all ranks, exact under gradient averaging.

    Each rank scores its own rows against everybody's, so logits cost `b x N` and not `N x N`. Features are
    gathered with their gradients, and the local part is scaled by world / N: after the mean over ranks that
    DistributedDataParallel takes, every parameter (both towers and logit_scale) has the gradient that one
    process would have for the whole batch. Ranks may hold different numbers of rows.

    Args:
        image_features: This rank's `(b_r, d)`, rows of length one; at least one row on each rank.
        text_features: This rank's `(b_r, d)`.
        logit_scale: Scalar, already exponentiated, equal on all ranks.

    Returns:
        Scalar; its mean over the ranks is `info_nce` of the whole batch.

    Raises:
        ValueError: Shapes differ.

    Reference:
        `info_nce` on the concatenated rows, which the tests compare with, value and gradient.
    """
    check_features(image_features, text_features)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return info_nce(image_features, text_features, logit_scale)
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = gather_counts(len(image_features), image_features.device)
    all_images = gather_rows(image_features, counts)  # (N, d)
    all_texts = gather_rows(text_features, counts)  # (N, d)
    first = sum(counts[:rank])
    target = torch.arange(first, first + counts[rank], device=image_features.device)
    by_image = F.cross_entropy(logit_scale * image_features @ all_texts.T, target, reduction="sum")
    by_text = F.cross_entropy(logit_scale * text_features @ all_images.T, target, reduction="sum")
    return (by_image + by_text) * (world / (2 * sum(counts)))


def check_features(image_features: Tensor, text_features: Tensor) -> None:
    """Raise unless both are `(b, d)` of the same shape."""
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "expected image and text features of the same shape (b, d), "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
