"""Counting the wrong candidates above, and level with, every right answer, one block of products at a time."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from retrieval.rows import GRID, Rows

RIGHT = -2.0  # in the place of a right candidate's score: below every cosine
GATHER = 64  # one exact product of a gathered pair costs about as much as this many inside a matrix product
PICK = 32  # picking one candidate out costs about as much as counting this many against one level


class Part:
    """Neighbouring rows of one side; exact ones are made only when a score is in doubt.

    Args:
        rows: The side.
        which: Its rows.
    """

    def __init__(self, rows: Rows, which: slice):
        self.rows, self.which = rows, which

    def __len__(self) -> int:
        return self.which.stop - self.which.start

    @cached_property
    def exact(self) -> torch.Tensor:
        """All rows on the grid; float64 `(n, dim)`."""
        return self.rows.take(self.which)

    def some(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rows on the grid by their number within the part."""
        return self.rows.take(numbers + self.which.start)


class Side:
    """One side's queries while they are counted: levels of their right answers, best first.

    A float32 product decides where it is further from a level than its error can be; the exact score decides the rest.

    Args:
        query: int64 `(pairs,)`: the query of each right answer.
        score: float64 `(pairs,)`: its exact score.
        rows: Rows of the side, queries or not.
        dim: Width of the rows.

    Attributes:
        query: int64 `(groups,)`: a group is the right answers of one query that share a score.
        level: float64 `(groups,)`: that score.
        right: int64 `(groups,)`: right answers in the group.
        above: int64 `(groups,)`: wrong candidates that score higher, counted so far.
        tied: int64 `(groups,)`: wrong candidates of the same score, counted so far.
        offset: int64 `(rows + 1,)`: the first group of each row.
    """

    def __init__(self, query: torch.Tensor, score: torch.Tensor, rows: int, dim: int):
        order = torch.argsort(score, descending=True, stable=True)
        order = order[torch.argsort(query[order], stable=True)]
        query, score = query[order], score[order]
        new = torch.ones_like(query, dtype=torch.bool)
        new[1:] = (query[1:] != query[:-1]) | (score[1:] != score[:-1])
        number = new.cumsum(0) - 1
        self.query, self.level = query[new], score[new]
        self.right = torch.zeros_like(self.query).index_add_(0, number, torch.ones_like(query))
        self.above, self.tied = torch.zeros_like(self.query), torch.zeros_like(self.query)
        self.offset = torch.searchsorted(self.query, torch.arange(rows + 1, device=query.device))
        # Bound on a float32 product of unit rows: dim roundings of a sum whose terms add up to at most 1 in
        # absolute value, and the rounding of the rows.
        doubt = (1.5 * dim + 16) * 2.0**-24
        self.high = (self.level / GRID**2 + doubt).float()
        self.low = (self.level / GRID**2 - doubt).float()

    def count(self, scores: torch.Tensor, mine: Part, other: Part) -> None:
        """Add the wrong candidates of one block.

        Only candidates that reach a query's worst right answer matter to it. Of a good model they are few, and they
        are picked out after a single pass over the scores; otherwise every level is counted in passes of its own.

        Args:
            scores: float32 `(mine, other)`, contiguous or the transpose of what is; right candidates at `RIGHT`.
            mine: The queries' rows.
            other: The candidates' rows.
        """
        first = self.offset[mine.which]
        last = self.offset[mine.which.start + 1 : mine.which.stop + 1]
        counts = last - first
        most = int(counts.max())
        if not most:
            return
        least = torch.full_like(first, torch.inf, dtype=torch.float32)  # no queries: nothing reaches it
        least[counts > 0] = self.low[last[counts > 0] - 1]
        reached = scores >= least[:, None]
        if int(count_true(reached)) * PICK <= reached.numel() * most:
            query, candidate = places(reached)
            self.pick(scores[query, candidate], query, candidate, mine, other)
            return
        for number in range(most):
            has = (counts > number).nonzero()[:, 0]
            whole = len(has) == len(counts)
            group = (first if whole else first[has]) + number
            self.sweep(scores if whole else scores[has], group, has, mine, other)

    def pick(
        self,
        score: torch.Tensor,
        query: torch.Tensor,
        candidate: torch.Tensor,
        mine: Part,
        other: Part,
    ) -> None:
        """Count candidates that were picked out, from the worst level of their query to the best."""
        stop = self.offset[mine.which][query]
        group = self.offset[mine.which.start + 1 : mine.which.stop + 1][query] - 1
        while len(query):
            sure = score > self.high[group]
            self.add(self.above, group[sure])
            close = ~sure
            if close.any():
                self.settle(group[close], query[close], candidate[close], mine, other)
            group = group - 1
            on = (group >= stop) & (score >= self.low[group])
            if not on.all():
                score, query, candidate = score[on], query[on], candidate[on]
                group, stop = group[on], stop[on]

    def sweep(
        self, scores: torch.Tensor, group: torch.Tensor, query: torch.Tensor, mine: Part, other: Part
    ) -> None:
        """Count all candidates of some queries against one level of each.

        Args:
            scores: float32 `(q, other)`.
            group: int64 `(q,)`: whose level.
            query: int64 `(q,)`: the queries' numbers in `mine`.
            mine: The queries' rows.
            other: The candidates' rows.
        """
        low, high = self.low[group], self.high[group]
        flags = torch.empty_like(scores)  # counting floats is several times faster than counting booleans
        above = torch.gt(scores, high[:, None], out=flags).sum(1).long()
        close = torch.ge(scores, low[:, None], out=flags).sum(1).long() - above
        self.above[group] += above
        doubtful = close.nonzero()[:, 0]
        if not len(doubtful):
            return
        near = scores[doubtful]
        near = (near >= low[doubtful, None]) & (near <= high[doubtful, None])
        group, query = group[doubtful], query[doubtful]
        if int(close.sum()) * GATHER > near.numel():
            exact, level = mine.some(query) @ other.exact.T, self.level[group, None]
            self.above[group] += ((exact > level) & near).sum(1)
            self.tied[group] += ((exact == level) & near).sum(1)
            return
        row, candidate = places(near)
        self.settle(group[row], query[row], candidate, mine, other)

    def settle(
        self, group: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor, mine: Part, other: Part
    ) -> None:
        """Decide pairs by their exact scores; int64 `(pairs,)` each."""
        asked, row = query.unique(return_inverse=True)
        if len(query) * GATHER > len(asked) * len(other):
            exact = (mine.some(asked) @ other.exact.T)[row, candidate]
        else:
            pieces = zip(query.split(2048), candidate.split(2048), strict=True)
            exact = torch.cat([(mine.some(one) * other.some(two)).sum(1) for one, two in pieces])
        self.add(self.above, group[exact > self.level[group]])
        self.add(self.tied, group[exact == self.level[group]])

    def add(self, counts: torch.Tensor, group: torch.Tensor) -> None:
        """Add one for each entry of `group`."""
        if len(group):
            start, stop = int(group.min()), int(group.max()) + 1
            counts[start:stop] += torch.bincount(group - start, minlength=stop - start)


def count_true(flags: torch.Tensor) -> int:
    """How many are True; numpy does it several times faster than torch on a CPU."""
    return int(flags.sum()) if flags.is_cuda else int(np.count_nonzero(flags.numpy()))


def places(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of what is True, int64; few of many are found fastest by numpy on a CPU."""
    turned = not flags.is_contiguous()  # the transpose of what is
    flat = (flags.T if turned else flags).reshape(-1)
    found = flat.nonzero()[:, 0] if flags.is_cuda else torch.from_numpy(np.flatnonzero(flat.numpy()))
    width = flags.shape[0] if turned else flags.shape[1]
    row, column = found // width, found % width
    return (column, row) if turned else (row, column)
