"""How one rank's rows meet the columns of all ranks: alone, round a ring, or gathered.

A tour takes `luggage` (what every rank needs to see of a rank's columns) and `carried` (what every rank adds to,
which begins as its neutral element), calls `visit(first, luggage, carried)` for the columns of every rank, and
returns this rank's own carried part with everybody's additions. `first` is the column of this rank's row 0, None
where it is not among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.collectives import gather_counts, several_ranks

Visit = Callable[["int | None", "tuple[Tensor, ...]", Tensor], None]
Merge = Literal["sum", "log_sum"]
"""How parts that ranks have found are put together; `log_sum` is for the states of `pretrain.blocks`."""


class Exchange(Protocol):
    """A way for columns to reach all ranks."""

    total: int
    """Rows of all ranks together."""
    world: int

    def tour(self, luggage: tuple[Tensor, ...], carried: Tensor, visit: Visit, merge: Merge) -> Tensor:
        """See the module."""
        ...


class Alone:
    """One process: its columns are all there are."""

    world = 1

    def __init__(self, rows: int):
        self.total = rows

    def tour(self, luggage: tuple[Tensor, ...], carried: Tensor, visit: Visit, merge: Merge) -> Tensor:
        visit(0, luggage, carried)
        return carried


class Ring:
    """Columns travel from rank to rank, so that a rank holds two ranks' columns at most, however many there are.

    World - 1 exchanges of the luggage, each under way while the block that is there is worked on, and world
    exchanges of what is carried.
    """

    def __init__(self, counts: list[int]):
        self.counts, self.total = counts, sum(counts)
        self.rank, self.world = dist.get_rank(), len(counts)

    def tour(self, luggage: tuple[Tensor, ...], carried: Tensor, visit: Visit, merge: Merge) -> Tensor:
        for hop in range(self.world):
            owner, following = ((self.rank - hop - step) % self.world for step in (0, 1))
            last = hop == self.world - 1
            coming, under_way = luggage, []
            if not last:
                coming, under_way = self.pass_on(luggage, self.counts[following])
            visit(0 if owner == self.rank else None, luggage, carried)
            for transfer in under_way:
                transfer.wait()
            (arrived,), under_way = self.pass_on((carried,), self.counts[following])
            for transfer in under_way:
                transfer.wait()
            luggage, carried = coming, arrived
        return carried

    def pass_on(self, tensors: tuple[Tensor, ...], rows: int) -> tuple[tuple[Tensor, ...], list[dist.Work]]:
        """Start sending to the right and receiving `rows` rows from the left."""
        left, right = (self.rank - 1) % self.world, (self.rank + 1) % self.world
        arriving = tuple(tensor.new_empty(rows, *tensor.shape[1:]) for tensor in tensors)
        transfers = [dist.P2POp(dist.isend, tensor.contiguous(), right) for tensor in tensors]
        transfers += [dist.P2POp(dist.irecv, tensor, left) for tensor in arriving]
        return arriving, dist.batch_isend_irecv(transfers)


class Gather:
    """All columns at once on every rank: two or three collectives instead of a chain of messages, memory of all."""

    def __init__(self, counts: list[int]):
        self.counts, self.total = counts, sum(counts)
        self.rank, self.world = dist.get_rank(), len(counts)

    def tour(self, luggage: tuple[Tensor, ...], carried: Tensor, visit: Visit, merge: Merge) -> Tensor:
        everything = tuple(self.collect(tensor) for tensor in luggage)  # (total, ...)
        found = carried[:1].repeat(self.total, *[1] * (carried.ndim - 1))  # nothing yet
        first = sum(self.counts[: self.rank])
        visit(first, everything, found)
        if merge == "log_sum":
            high, total = found.T.contiguous()
            common = high.clone()
            dist.all_reduce(common, dist.ReduceOp.MAX)
            total = total * (high - common).exp()
            dist.all_reduce(total)
            found = torch.stack([common, total], dim=1)
        else:
            dist.all_reduce(found)
        return found[first : first + self.counts[self.rank]].contiguous()

    def collect(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks, in rank order."""
        longest = max(self.counts)
        padded = F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, longest - len(tensor)))
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])


def open_exchange(kind: Literal["gather", "ring"], rows: int, device: torch.device) -> Exchange:
    """The exchange of a loss on this rank; every rank must call it.

    Args:
        kind: `gather` or `ring`.
        rows: This rank's rows.
        device: Where they lie.

    Raises:
        ValueError: Another kind, or a rank without rows (told on every rank).
    """
    if kind not in EXCHANGES:
        raise ValueError(f"expected exchange 'gather' or 'ring', got {kind!r}")
    if not several_ranks():
        return Alone(rows)
    counts = gather_counts(rows, device)
    if min(counts) == 0:
        raise ValueError(
            f"expected at least one pair on each rank, got {counts}: leave such a batch out on all ranks"
        )
    return EXCHANGES[kind](counts)


EXCHANGES = {"gather": Gather, "ring": Ring}
