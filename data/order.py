"""The order of an epoch: a pure function of the seed, the epoch and the shards' sample counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 65_536  # samples that are mixed with one another when nothing else is asked for

# Keeps the random streams apart that come from one seed.
SHARDS, SAMPLES, SAMPLE = 1, 2, 3


class EpochOrder:
    """Which sample stands at which position of an epoch, answered for any position without walking there.

    The shards are permuted and laid end to end. Then a shuffle buffer of references is filled and drained
    whole, window by window: positions `[k * window, (k + 1) * window)` are permuted among themselves. In
    contrast to a buffer that is refilled sample by sample, a window can be computed alone, so that resuming
    costs the same at any position (5 ms for the default window) and every reader needs only the windows it
    reads from. The price: a sample moves by less than one window within an epoch. Both permutations differ
    from epoch to epoch.

    Args:
        counts: Samples of each shard.
        seed: The run's seed.
        window: Samples that are mixed with one another; 0 keeps the shards and samples in their order.

    Raises:
        ValueError: A negative window.

    Example:
        >>> order = EpochOrder([2, 3], seed=0, window=0)
        >>> order.positions(0, 1, 4).tolist()
        [1, 2, 3]
    """

    def __init__(self, counts: Sequence[int], *, seed: int, window: int):
        if window < 0:
            raise ValueError(f"shuffle is a number of samples, at least 0, got {window}")
        self.counts = np.asarray(counts, dtype=np.int64)
        self.bases = np.concatenate(
            [[0], np.cumsum(self.counts)]
        )  # global index of each shard's first sample
        self.total = int(self.bases[-1])
        self.seed = seed
        self.window = window
        self.kept: dict[tuple[str, int, int], np.ndarray] = {}

    def positions(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Global sample indices at positions `[start, stop)` of an epoch; int64 (stop - start,)."""
        start, stop = max(start, 0), min(stop, self.total)
        if stop <= start:
            return np.zeros(0, dtype=np.int64)
        if not self.window:
            return np.arange(start, stop)
        parts = []
        for number in range(start // self.window, -(-stop // self.window)):
            first = number * self.window
            part = self._window(epoch, number)
            parts.append(part[max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def locate(self, index: int) -> tuple[int, int]:
        """Shard number and number within the shard of a global sample index."""
        shard = int(np.searchsorted(self.bases, index, side="right")) - 1
        return shard, index - int(self.bases[shard])

    def _window(self, epoch: int, number: int) -> np.ndarray:
        return self._keep(("window", epoch, number), lambda: self._make_window(epoch, number))

    def _make_window(self, epoch: int, number: int) -> np.ndarray:
        shards = self._keep(
            ("shards", epoch, 0),
            lambda: np.random.default_rng((self.seed, epoch, SHARDS)).permutation(len(self.counts)),
        )
        ends = np.cumsum(self.counts[shards])
        first = number * self.window
        linear = np.arange(first, min(first + self.window, self.total))
        place = np.searchsorted(ends, linear, side="right")
        shard = shards[place]
        samples = self.bases[shard] + linear - (ends[place] - self.counts[shard])
        return np.random.default_rng((self.seed, epoch, SAMPLES, number)).permutation(samples)

    def _keep(self, name: tuple[str, int, int], make) -> np.ndarray:
        """The last few results, since neighbouring batches ask for the same window."""
        if name not in self.kept:
            while len(self.kept) >= 4:
                del self.kept[next(iter(self.kept))]
            self.kept[name] = make()
        return self.kept[name]


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whoever loads it."""
    return np.random.default_rng((seed, epoch, SAMPLE, index))


def rank_slice(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rank's contiguous part of `count` samples, as even as possible: the first ranks take one more."""
    share, more = divmod(count, world_size)
    start = rank * share + min(rank, more)
    return start, start + share + (rank < more)
