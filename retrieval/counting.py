"""Counting the wrong candidates above, and level with, every right answer, one block of products at a time."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from retrieval.rows import GRID, Rows, exact_scores

RIGHT = -2.0  # in the place of a right candidate's score: below every cosine
GATHER = 64  # one exact product of a gathered pair costs about as much as this many inside a matrix product
WAITING = 1 << 16  # pairs in doubt that are decided together
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
        self.waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.waits = 0
        self.flags = np.empty(0, dtype=bool)

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
        least = self.low[(last - 1).clamp(min=0)]
        if not bool((counts > 0).all()):
            least = torch.where(counts > 0, least, torch.inf)  # no queries: nothing reaches it
        reached = self.reached(scores, least)
        if count_true(reached) * PICK <= reached.numel() * most:
            self.pick(scores, reached, mine, other)
            return
        for number in range(most):
            has = (counts > number).nonzero()[:, 0]
            whole = len(has) == len(counts)
            group = (first if whole else first[has]) + number
            self.sweep(scores if whole else scores[has], group, has, mine, other)

    def reached(self, scores: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
        """Which scores are at least their query's `least`; bool, in the layout of `scores`."""
        if scores.is_cuda:
            return scores >= least[:, None]
        # numpy compares several times faster than torch, and into memory that is there already.
        if len(self.flags) < scores.numel():
            self.flags = np.empty(scores.numel(), dtype=bool)
        flags = self.flags[: scores.numel()]
        turned = not scores.is_contiguous()
        flags = flags.reshape(scores.T.shape).T if turned else flags.reshape(scores.shape)
        return torch.from_numpy(np.greater_equal(scores.numpy(), least.numpy()[:, None], out=flags))

    def pick(self, scores: torch.Tensor, reached: torch.Tensor, mine: Part, other: Part) -> None:
        """Count the candidates that reached their query's worst level, from that to the best."""
        base, stop = (int(self.offset[place]) for place in (mine.which.start, mine.which.stop))
        tables: list[Any] = [
            self.offset[mine.which] - base,
            self.offset[mine.which.start + 1 : mine.which.stop + 1] - base,
            self.high[base:stop],
            self.low[base:stop],
        ]
        score, query, candidate = places(reached, scores)
        # The same words are arithmetic of torch on a GPU and of numpy, which is faster at it, on a CPU.
        first, last, high, low = tables if scores.is_cuda else [each.numpy() for each in tables]
        bincount: Any = torch.bincount if scores.is_cuda else np.bincount
        group, end = last[query] - 1, first[query]
        while len(query):
            sure: Any = score > high[group]
            self.above[base:stop] += torch.as_tensor(bincount(group[sure], minlength=stop - base))
            close = ~sure
            if close.any():
                which = [each[close] for each in (group, query, candidate)]
                which = [torch.as_tensor(each) for each in which]
                self.doubt(which[0] + base, which[1], which[2], mine, other)
            group = group - 1
            on = (group >= end) & (score >= low[group])
            score, query, candidate, group, end = (each[on] for each in (score, query, candidate, group, end))

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
        row, candidate = near.nonzero(as_tuple=True)
        self.doubt(group[row], query[row], candidate, mine, other)

    def doubt(
        self, group: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor, mine: Part, other: Part
    ) -> None:
        """Decide pairs by their exact scores: many at once by a product, few when some have come together.

        Args:
            group: int64 `(pairs,)`.
            query: int64 `(pairs,)` within `mine`.
            candidate: int64 `(pairs,)` within `other`.
            mine: The queries' rows.
            other: The candidates' rows.
        """
        if len(query) * GATHER > len(mine) * len(other):
            asked, row = query.unique(return_inverse=True)
            self.settle(group, (mine.some(asked) @ other.exact.T)[row, candidate])
            return
        self.waiting.append((group, query + mine.which.start, candidate + other.which.start))
        self.waits += len(group)
        if self.waits >= WAITING:
            self.settle_waiting(mine.rows, other.rows)

    def settle_waiting(self, mine: Rows, other: Rows) -> None:
        """Decide the pairs that wait for it; the counts are whole only after that."""
        if self.waiting:
            group, query, candidate = (torch.cat(each) for each in zip(*self.waiting, strict=True))
            self.waiting, self.waits = [], 0
            self.settle(group, exact_scores(mine, other, query, candidate))

    def settle(self, group: torch.Tensor, exact: torch.Tensor) -> None:
        """Count pairs by their exact scores, float64 `(pairs,)`."""
        level, one = self.level[group], torch.ones_like(group)
        self.above.index_add_(0, group, one * (exact > level))
        self.tied.index_add_(0, group, one * (exact == level))


def count_true(flags: torch.Tensor) -> int:
    """How many are True; numpy does it several times faster than torch on a CPU."""
    return int(flags.sum()) if flags.is_cuda else int(np.count_nonzero(flags.numpy()))


def places(flags: torch.Tensor, scores: torch.Tensor) -> tuple[Any, Any, Any]:
    """Scores, rows and columns of what is True; numpy's on a CPU, where it finds few among many fastest.

    Args:
        flags: bool `(q, c)`, and
        scores: float32 `(q, c)`, both contiguous or the transpose of what is.
    """
    turned = not flags.is_contiguous()
    flat, values = ((each.T if turned else each).reshape(-1) for each in (flags, scores))
    if flags.is_cuda:
        found = flat.nonzero()[:, 0]
    else:
        found, values = np.flatnonzero(flat.numpy()), values.numpy()
    width = flags.shape[0] if turned else flags.shape[1]
    row = found // width
    column = found - row * width
    return (values[found], column, row) if turned else (values[found], row, column)
