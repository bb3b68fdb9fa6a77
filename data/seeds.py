"""The random numbers of samples, seeded for a whole batch at once.

Each sample has a generator of its own, `default_rng((seed, epoch, SAMPLE, index))`, so that it draws the same whoever
loads it. numpy's own seeding is many small steps, 40 us a sample between two decoded pictures; here the same integers
are computed for all samples of a batch together.

Reference:
    numpy.random.SeedSequence, whose numbers these are; the hash is that of M. E. O'Neill's `randutils::seed_seq_fe`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.random.bit_generator import ISeedSequence

SAMPLE = 3  # keeps the random numbers of samples apart from those of orders, which come from the same seed
POOL = 4  # words of 32 bits
ALL = 0xFFFFFFFF
# initial value and multiplier of the two running constants, and the two of a mix
TAKE = (0x43B0D7E5, 0x931E8875)
GIVE = (0x8B51F9DD, 0x58F38DED)
MIX_LEFT, MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
SHIFT = np.uint32(16)


class Seed(ISeedSequence):
    """Four words that have been computed before, as a bit generator asks for them."""

    def __init__(self, words: np.ndarray):
        self.words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert (n_words, dtype) == (len(self.words), self.words.dtype)
        return self.words


def sample_rngs(seed: int, epochs: np.ndarray, indices: np.ndarray) -> list[Generator]:
    """The random numbers of samples, each in one epoch: `default_rng((seed, epoch, SAMPLE, index))`.

    Args:
        seed: The run's; not negative.
        epochs: int64 (n,).
        indices: Global indices, int64 (n,).
    """
    if (
        max(seed, epochs.max(initial=0), indices.max(initial=0)) > ALL
    ):  # numpy takes two words for such a number
        places = zip(epochs.tolist(), indices.tolist(), strict=True)
        return [Generator(PCG64(SeedSequence((seed, epoch, SAMPLE, index)))) for epoch, index in places]
    entropy = [np.full(len(epochs), seed, np.uint32), epochs.astype(np.uint32)]
    entropy += [np.full(len(epochs), SAMPLE, np.uint32), indices.astype(np.uint32)]
    seeds: Any = map(Seed, states(entropy))  # numpy's stubs know its own class alone
    return [Generator(PCG64(words)) for words in seeds]


def sample_rng(seed: int, epoch: int, index: int) -> Generator:
    """The random numbers of one sample in one epoch."""
    return sample_rngs(seed, np.array([epoch]), np.array([index]))[0]


def states(entropy: list[np.ndarray]) -> np.ndarray:
    """What `SeedSequence(entropy).generate_state(4, np.uint64)` gives, for many at once.

    Args:
        entropy: Four words, uint32 (n,) each.

    Returns:
        uint64 (n, 4).
    """
    constants = running(*TAKE)

    def hashed(words: np.ndarray) -> np.ndarray:
        return scramble(words, next(constants))

    pool = [hashed(words) for words in entropy]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                mixed = MIX_LEFT * pool[target] - MIX_RIGHT * hashed(pool[source])
                pool[target] = mixed ^ (mixed >> SHIFT)
    constants = running(*GIVE)
    given = [scramble(pool[place % POOL], next(constants)) for place in range(2 * POOL)]
    return np.stack(given, axis=1).view(np.uint64)


def running(value: int, multiplier: int) -> Iterator[tuple[np.uint32, np.uint32]]:
    """The constant of each scramble, before and after it is multiplied."""
    while True:
        after = value * multiplier & ALL
        yield np.uint32(value), np.uint32(after)
        value = after


def scramble(words: np.ndarray, constant: tuple[np.uint32, np.uint32]) -> np.ndarray:
    words = (words ^ constant[0]) * constant[1]
    return words ^ (words >> SHIFT)
