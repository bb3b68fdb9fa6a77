"""Balancing by counts of metadata, after MetaCLIP (Xu et al., arXiv:2309.16671).

Which words and phrases of a list the captions have, how many samples have each, and which samples are drawn. The draw
of a sample depends on the seed, its key and its captions alone, and so not on the order of shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.curate.filters import read_list

WORD = re.compile(r"\w+(?:['’]\w+)?")


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return WORD.findall(text.casefold())


class Entries:
    """A list of words and phrases, which are found in texts as whole words.

    MetaCLIP looks for ` entry ` as a substring of the spaced text; looking up each run of words finds the same in time
    that does not grow with the list: about 10 us a caption for 500,000 entries.

    Args:
        lines: The entries; those that are the same words count as one.

    Example:
        >>> Entries(["dog", "hot dog", "cat"]).find(["A hot dog."])
        [0, 1]
    """

    def __init__(self, lines: Iterable[str]):
        self.names: list[str] = []
        self.numbers: dict[tuple[str, ...], int] = {}
        for line in lines:
            words = tuple(words_of(line))
            if words and words not in self.numbers:
                self.numbers[words] = len(self.names)
                self.names.append(line)
        self.longest = max(map(len, self.numbers), default=0)

    @classmethod
    def read(cls, path: Path) -> Entries:
        """The entries of a file, one a line.

        Raises:
            ValueError: It cannot be read, or holds nothing.
        """
        return cls(read_list(path, "balance.entries"))

    def find(self, texts: Iterable[str]) -> list[int]:
        """Numbers of the entries that any of some texts has, ascending."""
        found = set()
        for text in texts:
            words = words_of(text)
            for first in range(len(words)):
                for last in range(first + 1, min(first + self.longest, len(words)) + 1):
                    number = self.numbers.get(tuple(words[first:last]))
                    if number is not None:
                        found.add(number)
        return sorted(found)


def keep_probabilities(starts: np.ndarray, entries: np.ndarray, alive: np.ndarray, cap: int) -> np.ndarray:
    """The probability with which each sample stays.

    An entry with c samples is drawn with p = min(1, cap / c); a sample stays with 1 - prod(1 - p) over its entries.

    Args:
        starts: Sample i has entries `starts[i]:starts[i + 1]`; int64 (n + 1,).
        entries: Their numbers.
        alive: Samples that are counted; bool (n,).
        cap: Samples of an entry that are all kept.

    Returns:
        float64 (n,); 0 for samples without entries.

    Reference:
        MetaCLIP, algorithm 1, part 2; the paper draws entry by entry, which comes to the same.
    """
    owners = np.repeat(np.arange(len(alive)), np.diff(starts))
    counts = np.bincount(entries[alive[owners]], minlength=int(entries.max(initial=-1)) + 1)
    draws = np.minimum(1.0, cap / np.maximum(counts, 1))
    missed = np.ones(len(alive))
    np.multiply.at(missed, owners, 1.0 - draws[entries])
    return 1.0 - missed


def uniform(text: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each 64-bit digest, another one for each seed (SplitMix64's finaliser).

    Args:
        text: uint64 (n,).
        seed: Any integer.
    """
    with np.errstate(over="ignore"):
        mixed = text + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53
