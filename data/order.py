"""The order of an epoch: a pure function of the seed, the epoch and the shards' sample counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 65_536  # samples that are mixed with one another when nothing else is asked for

# Keeps the random streams apart that come from one seed.
SHARDS, SAMPLES = 1, 2  # and `data.seeds.SAMPLE`


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
        replacement: Draw the shards of an epoch with replacement, all equally likely, until it has as many
            samples as the set: some come more than once, others (about a third) not at all.

    Raises:
        ValueError: A negative window.

    Example:
        >>> order = EpochOrder([2, 3], seed=0, window=0)
        >>> order.positions(0, 1, 4).tolist()
        [1, 2, 3]
    """

    def __init__(self, counts: Sequence[int], *, seed: int, window: int, replacement: bool = False):
        if window < 0:
            raise ValueError(f"shuffle is a number of samples, at least 0, got {window}")
        self.counts = np.asarray(counts, dtype=np.int64)
        self.bases = np.concatenate(
            [[0], np.cumsum(self.counts)]
        )  # global index of each shard's first sample
        self.total = int(self.bases[-1])
        self.seed = seed
        self.window = window
        self.replacement = replacement
        self.kept: dict[tuple[str, int, int], np.ndarray] = {}

    def positions(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Global sample indices at positions `[start, stop)` of an epoch; int64 (stop - start,)."""
        start, stop = max(start, 0), min(stop, self.total)
        if stop <= start:
            return np.zeros(0, dtype=np.int64)
        if not self.window and not self.replacement:
            return np.arange(start, stop)
        if not self.window:
            return self._laid_out(epoch, start, stop)
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
        first = number * self.window
        samples = self._laid_out(epoch, first, min(first + self.window, self.total))
        return np.random.default_rng((self.seed, epoch, SAMPLES, number)).permutation(samples)

    def shards(self, epoch: int) -> np.ndarray:
        """The shards in the order of an epoch; int64 (shards,), or as many as fill it with replacement."""
        if not self.window and not self.replacement:
            return np.arange(len(self.counts))
        return self._keep(("shards", epoch, 0), lambda: self._make_shards(epoch))

    def _make_shards(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch, SHARDS))
        if not self.replacement:
            return rng.permutation(len(self.counts))
        filled = np.flatnonzero(self.counts)
        drawn = rng.choice(filled, size=len(filled))
        while self.counts[drawn].sum() < self.total:
            drawn = np.concatenate([drawn, rng.choice(filled, size=len(filled))])
        return drawn

    def _laid_out(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Samples `[start, stop)` of the epoch's shards laid end to end."""
        shards = self.shards(epoch)
        ends = np.cumsum(self.counts[shards])
        linear = np.arange(start, stop)
        place = np.searchsorted(ends, linear, side="right")
        shard = shards[place]
        return self.bases[shard] + linear - (ends[place] - self.counts[shard])

    def followers(self, epoch: int, index: int) -> list[int]:
        """For a sample, those at the same place of the shards that follow its own in an epoch's order."""
        shard, sample = self.locate(index)
        shards = [int(other) for other in self.shards(epoch) if self.counts[other]]
        place = shards.index(shard)
        others = [other for other in shards[place + 1 :] + shards[:place] if other != shard]
        return [int(self.bases[other]) + sample % int(self.counts[other]) for other in others]

    def _keep(self, name: tuple[str, int, int], make) -> np.ndarray:
        """The last few results, since neighbouring batches ask for the same window."""
        if name not in self.kept:
            while len(self.kept) >= 4:
                del self.kept[next(iter(self.kept))]
            self.kept[name] = make()
        return self.kept[name]


def source_seed(seed: int, source: int) -> int:
    """The seed of the order of a mixture's source; that of the first is the run's."""
    return (
        seed if source == 0 else int(np.random.SeedSequence((seed, source)).generate_state(1, np.uint64)[0])
    )


def rank_slice(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rank's contiguous part of `count` samples, as even as possible: the first ranks take one more."""
    share, more = divmod(count, world_size)
    start = rank * share + min(rank, more)
    return start, start + share + (rank < more)
