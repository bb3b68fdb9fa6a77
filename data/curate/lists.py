"""Rows of a large set that are close to each other, at a cost per row that does not grow with the set.

The rows are dealt to lists by their nearest centre, one list to every 1,000 rows. A row is compared with the rows of
its eight nearest lists only, and all rows that ask for the same list are compared with it at once, as one product of
matrices (FAISS's range search). Up to 20,000 rows there is one list, and the search is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import faiss
import numpy as np

FAISS: Any = faiss
Pairs: TypeAlias = tuple[np.ndarray, np.ndarray]  # int64 (pairs,) each
EXHAUSTIVE = 20_000  # rows up to which every row is compared with every other one
PER_LIST = 1000  # rows of a list above that
PROBES = 8  # lists that are looked into for a row
FLAT = 4096  # centres up to which a row is compared with all of them; beyond, they lie in cells themselves
ROUNDS, SHARE = 2, 16  # rounds of k-means, over so many rows for each centre
BLOCK = 1 << 20  # rows that are searched for at a time: enough of them ask for each list
NONE: Pairs = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


class Lists:
    """Unit rows in inverted lists, which are searched by cosine.

    Args:
        vectors: Rows of length one; float32 (n, dimensions). They are not copied.
        exact: One list whatever the number of rows: every pair is compared.
    """

    def __init__(self, vectors: np.ndarray, *, exact: bool = False):
        self.vectors = vectors
        self.count = 1 if exact or len(vectors) <= EXHAUSTIVE else max(len(vectors) // PER_LIST, 1)
        if self.count == 1:
            self.members = [np.arange(len(vectors))]
            return
        self.centres = _index(self._train())
        home = self._nearest(vectors)
        order = np.argsort(home, kind="stable")
        self.members = np.split(order, np.searchsorted(home[order], np.arange(1, self.count)))

    def search(self, vectors: np.ndarray, min_similarity: float) -> Pairs:
        """All `(row of vectors, row of the lists)` with at least this cosine, as far as the lists lie near.

        Args:
            vectors: Rows of length one; float32 (m, dimensions).
            min_similarity: The smallest cosine.

        Returns:
            Pairs, each once, in no order.
        """
        least = float(np.nextafter(np.float32(min_similarity), np.float32(0)))
        found = [NONE]
        for first in range(0, len(vectors), BLOCK):
            block = vectors[first : first + BLOCK]
            for members, askers in self._askers(block):
                index = FAISS.IndexFlatIP(self.vectors.shape[1])
                index.add(self.vectors[members] if self.count > 1 else self.vectors)
                limits, _, places = index.range_search(block[askers], least)
                counts = np.diff(limits.astype(np.int64))
                found.append((first + np.repeat(askers, counts), members[places]))
        return np.concatenate([one for one, _ in found]), np.concatenate([other for _, other in found])

    def _askers(self, block: np.ndarray) -> Iterator[Pairs]:
        """Each list's rows, with the rows of the block that look into it."""
        if self.count == 1:
            yield self.members[0], np.arange(len(block))
            return
        width = min(PROBES, self.count)
        probes = self.centres.search(block, width)[1].ravel()  # -1 where the cells hold fewer than that
        order = np.argsort(probes, kind="stable")
        ends = np.searchsorted(probes[order], np.arange(self.count + 1))
        for number, members in enumerate(self.members):
            askers = order[ends[number] : ends[number + 1]] // width
            if len(members) and len(askers):
                yield members, askers

    def _train(self) -> np.ndarray:
        """Centres: rows that lie evenly over the set, moved into the middle of those around them."""
        rows = np.linspace(0, len(self.vectors) - 1, self.count * SHARE).astype(np.int64)
        sample = self.vectors[np.unique(rows)]
        centres = sample[:: max(len(sample) // self.count, 1)][: self.count].copy()
        for _ in range(ROUNDS):
            self.centres = _index(centres)
            home = self._nearest(sample)
            order = np.argsort(home, kind="stable")
            held, first = np.unique(home[order], return_index=True)
            centres[held] = unit(np.add.reduceat(sample[order], first))
        return centres

    def _nearest(self, vectors: np.ndarray) -> np.ndarray:
        """The nearest list of each row; int64 (n,)."""
        return np.maximum(self.centres.search(vectors, 1)[1][:, 0], 0)


def _index(centres: np.ndarray) -> Any:
    """The centres to search in: all of them, or, when they are many, the nearest of their own cells."""
    dimensions = centres.shape[1]
    if len(centres) <= FLAT:
        index = FAISS.IndexFlatIP(dimensions)
    else:
        cells = int(len(centres) ** 0.5)
        index = FAISS.IndexIVFFlat(
            FAISS.IndexFlatIP(dimensions), dimensions, cells, FAISS.METRIC_INNER_PRODUCT
        )
        index.own_fields, index.cp.niter, index.cp.seed = False, 4, 1
        index.nprobe = min(2 * PROBES, cells)
        index.train(centres)
    index.add(centres)
    return index


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows as float32 of length one; halves have lost a little of it."""
    vectors = vectors.astype(np.float32)
    return np.ascontiguousarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
