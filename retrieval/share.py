"""One process's share of an evaluation, and everybody's results in the order that one process alone would have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Share(NamedTuple):
    """Which part of the work is this process's: number `rank` of `world`; by default all of it.

    Work is cut between batches, never through one, so that every row is computed in the batch in which one process
    alone would compute it, and comes out the same to the last bit.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def of_processes(cls) -> Share:
        """This process's share among those of torch.distributed; all of it where that is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def of(self, count: int) -> range:
        """This process's numbers of `count`: neighbours, and as many as anybody's to within one."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items, as `of` numbers them."""
        mine = self.of(len(items))
        return items[mine.start : mine.stop]

    def together(self, mine: Iterable[T]) -> Iterator[T]:
        """The results of all processes, in the order of the work.

        Every process must call it and go through it. A process alone gets its results one by one as they are made;
        several get them when all are done, those of each held in memory by all.

        Args:
            mine: Results of this process's `part`; anything that can be pickled.

        Raises:
            RuntimeError: Another process failed; its message is in it. The one that failed raises its own error, so
                that nobody waits for it.
        """
        if self.world == 1:
            yield from mine
            return
        results, failure = [], None
        try:
            results = list(mine)
        except Exception as error:
            failure = error
        found: list[Any] = [None] * self.world
        dist.all_gather_object(
            found, (results, None if failure is None else f"{type(failure).__name__}: {failure}")
        )
        if failure is not None:
            raise failure
        for rank, (_, message) in enumerate(found):
            if message is not None:
                raise RuntimeError(
                    f"process {rank} of {self.world} failed in its share of an evaluation: {message}"
                )
        for part, _ in found:
            yield from part


ALONE = Share()
