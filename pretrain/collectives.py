"""Sums and gathers over ranks through which gradients flow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_alone: ContextVar[bool] = ContextVar("alone", default=False)


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks; each rank's input has a part in every rank's result."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return SumOverRanks.forward(ctx, gradient)


class StackOverRanks(torch.autograd.Function):
    """The tensors of all ranks, of one shape, under each other in rank order."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [
            torch.empty_like(value, memory_format=torch.contiguous_format)
            for _ in range(dist.get_world_size())
        ]
        dist.all_gather(parts, value.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # A reduce-scatter would send half as much, but not every backend has one; these are features, not logits.
        return SumOverRanks.forward(ctx, gradient)[dist.get_rank()]


def several_ranks() -> bool:
    """Whether there are other ranks than this one, and they count (see `as_one_process`)."""
    return not _alone.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def as_one_process() -> Iterator[None]:
    """Let losses and sums of this rank forget the others, for a reference that each computes by itself."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, with gradients: torch's own differentiable one is deprecated."""
    if not several_ranks():
        return value
    return SumOverRanks.apply(value)  # pyright: ignore[reportReturnType]


def gather_numbers(values: list[int], device: torch.device) -> list[list[int]]:
    """A few whole numbers of each rank, in rank order; it waits for the device."""
    mine = torch.tensor(values, device=device)
    found = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return torch.stack(found).tolist()


def gather_counts(rows: int, device: torch.device) -> list[int]:
    """How many rows each rank has, in rank order."""
    return [count for (count,) in gather_numbers([rows], device)]


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Concatenate the rows of all ranks in rank order; gradients flow back to where the rows came from.

    Args:
        rows: This rank's `(b_r, d)`.
        counts: Rows of each rank.

    Returns:
        `(sum(counts), d)`, the same on every rank.
    """
    longest = max(counts)
    padded = F.pad(rows, (0, 0, 0, longest - len(rows)))  # collectives want equal shapes
    stacked: Any = StackOverRanks.apply(padded)  # (world, longest, d)
    return torch.cat([part[:count] for part, count in zip(stacked, counts, strict=True)])
