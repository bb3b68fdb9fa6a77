"""Relevance by attention and its gradients (Chefer), and attention rollout, as pure functions of recorded weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def chefer_relevance(weights: Sequence[Tensor], gradients: Sequence[Tensor], start: Tensor) -> Tensor:
    """How much each input token matters for a score, propagated through the attention of all layers.

    A layer's relevance is `C = mean over heads of relu(gradient * weights)`, and tokens mix as `R <- R + C R`. Only the
    read-out row of R is wanted, so that it is carried from the last layer to the first: O(n^2) a layer, not O(n^3).
    A layer with other queries than keys (attention pooling) has no path around it: `R <- C R`.

    Args:
        weights: Attention of each layer, first to last, `(b, heads, queries, keys)`.
        gradients: Of the score by each of them.
        start: The read-out row over the last layer's queries, `(b, queries)`, such as 1 at the class token.

    Returns:
        float `(b, n)`, not negative, over the first layer's keys.

    Reference:
        Chefer et al. 2021, Generic Attention-model Explainability, equations 5 and 6 (self-attention).
    """
    row = start
    for attention, gradient in zip(reversed(weights), reversed(gradients), strict=True):
        mixed = (attention * gradient).clamp(min=0).mean(1)  # (b, queries, keys)
        step = torch.einsum("bq,bqk->bk", row, mixed)
        row = row + step if mixed.shape[1] == mixed.shape[2] else step
    return row


def rollout(weights: Sequence[Tensor], start: Tensor) -> Tensor:
    """Attention rollout: `(A + I) / 2` of all layers multiplied. It does not depend on what is asked for.

    Args:
        weights: As for `chefer_relevance`.
        start: As for `chefer_relevance`.

    Returns:
        float `(b, n)`; rows sum to what `start` sums to.

    Reference:
        Abnar and Zuidema 2020.
    """
    row = start
    for attention in reversed(weights):
        mean = attention.mean(1)
        step = torch.einsum("bq,bqk->bk", row, mean)
        row = (row + step) / 2 if mean.shape[1] == mean.shape[2] else step
    return row
