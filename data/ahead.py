"""Fetching beside the loading: shards that later batches will read are brought in before their turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

THREADS = 2
NAME = "fetch-ahead"  # of the threads
REMEMBERED = 4096  # shards that are not asked for again


class Ahead:
    """Asks for shards in threads of its own.

    Which shards a batch reads does not depend on who has fetched them, so that this changes times only. Loader workers
    share the work: each asks for its part of the shards, and waits for the others' where it reads them.

    Args:
        fetch: Brings one shard, by its number, into the cache.
        share: Number of this worker.
        shares: How many there are.
    """

    def __init__(self, fetch: Callable[[int], Any], share: int, shares: int):
        self.fetch, self.share, self.shares = fetch, share, shares
        self.asked: OrderedDict[int, None] = OrderedDict()
        self.pool: ThreadPoolExecutor | None = None

    def ask(self, shards: Iterable[int]) -> None:
        """Note shards that will be read; those that are new are fetched in the background."""
        for shard in shards:
            if shard % self.shares != self.share:
                continue
            if shard in self.asked:
                self.asked.move_to_end(shard)
                continue
            self.asked[shard] = None
            if len(self.asked) > REMEMBERED:
                self.asked.popitem(last=False)
            self.pool = self.pool or ThreadPoolExecutor(THREADS, NAME)
            self.pool.submit(self._try, shard)

    def _try(self, shard: int) -> None:
        with suppress(OSError, ValueError, ImportError):  # the reader meets and reports it
            self.fetch(shard)

    def close(self) -> None:
        """Forget what has not begun to be fetched."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
