"""Exact places of all right answers, counted in blocks from one float32 product for both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist

from retrieval import ties
from retrieval.rows import GRID, Rows, exact_scores, plain_float32, rough, same_width

RIGHT = -2.0  # in the place of a right candidate's score: below every cosine
GATHER = 64  # one exact product of a gathered pair costs about as much as this many inside a matrix product


@dataclass(frozen=True)
class Ranks:
    """Where the best right answer of each query stands; all int64 of shape `(queries,)`.

    Attributes:
        above: Wrong candidates that score higher than the best right one.
        tied: Candidates with exactly its score, itself included.
        right: The right ones among `tied`.
        gallery: Number of candidates.
    """

    above: torch.Tensor
    tied: torch.Tensor
    right: torch.Tensor
    gallery: int

    def expected(self) -> torch.Tensor:
        """Rank of the first right answer, 1-based, in expectation over the orders of tied candidates."""
        return ties.expected_rank(self.above, self.tied, self.right)

    def hits(self, k: int) -> torch.Tensor:
        """Probability `(queries,)` float64 that a right answer is among the first `k`."""
        slots = (min(k, self.gallery) - self.above).clamp(min=0)  # places left for the tied candidates
        return 1 - ties.misses(self.tied, self.right, slots)


class Groups(NamedTuple):
    """Right answers of equal score, with the wrong candidates of that score; int64 `(groups,)` each."""

    query: torch.Tensor
    start: torch.Tensor
    """Candidates that score higher, right or wrong."""
    tied: torch.Tensor
    right: torch.Tensor
    before: torch.Tensor
    """Right answers that score higher."""


@dataclass(frozen=True)
class Ranking:
    """Where every right answer of every query stands, in one direction.

    One entry for each group of a query's right answers with equal score, int64 `(groups,)`, ordered by query
    and from the best score to the worst.

    Attributes:
        query: Number of the query; each query has at least one group.
        above: Wrong candidates that score higher.
        level: Wrong candidates with exactly that score.
        right: Right candidates with that score.
        queries: Number of queries.
        gallery: Number of candidates.
    """

    query: torch.Tensor
    above: torch.Tensor
    level: torch.Tensor
    right: torch.Tensor
    queries: int
    gallery: int

    @cached_property
    def groups(self) -> Groups:
        """The groups as `retrieval.ties` wants them."""
        before = self.right.cumsum(0) - self.right
        before = before - before[self.first][self.query]  # from the query's own first group
        return Groups(self.query, self.above + before, self.level + self.right, self.right, before)

    @cached_property
    def first(self) -> torch.Tensor:
        """Number of each query's best group; int64 `(queries,)`."""
        return torch.searchsorted(self.query, torch.arange(self.queries))

    @cached_property
    def positives(self) -> torch.Tensor:
        """Number of right answers of each query; int64 `(queries,)`."""
        return self.sum(self.right)

    def best(self) -> Ranks:
        """The best right answers alone."""
        above, right = self.above[self.first], self.right[self.first]
        return Ranks(above, self.level[self.first] + right, right, self.gallery)

    def resolved(self, *, optimistic: bool) -> Ranking:
        """The same ranking with every right answer before, or behind, the wrong ones of its score."""
        above = self.above if optimistic else self.above + self.level
        return Ranking(
            self.query, above, torch.zeros_like(self.level), self.right, self.queries, self.gallery
        )

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Values of groups summed by query; `(queries,)`."""
        return torch.zeros(self.queries, dtype=values.dtype).index_add_(0, self.query, values)

    def per_query(self, ks: Sequence[int]) -> dict[str, torch.Tensor]:
        """Every number of every query, in expectation over the orders of tied candidates.

        Args:
            ks: Cut-offs; one above the size of the gallery counts as the whole gallery.

        Returns:
            float64 `(queries,)`: `recall@K` (a right answer among the first K), `true_recall@K` (share of the
            right answers that is among them), `ndcg@K`, `rank` and `reciprocal_rank` of the first right
            answer, `map@r` and `r_precision` (R being the query's number of right answers), `ap` (average
            precision over the whole gallery).
        """
        query, start, tied, right, before = self.groups
        best, total = self.best(), self.positives
        places = torch.arange(1, self.gallery + 1, dtype=torch.float64)
        harmonic = torch.cat([torch.zeros(1, dtype=torch.float64), (1 / places).cumsum(0)])
        longest = min(max(ks), self.gallery)
        gains = torch.zeros(longest + 1, dtype=torch.float64)
        gains[1:] = (1 / torch.log2(places[:longest] + 1)).cumsum(0)
        result = {f"recall@{k}": best.hits(k) for k in ks}
        for k in ks:
            result[f"true_recall@{k}"] = self.sum(ties.expected_found(start, tied, right, k)) / total
        for k in ks:
            gained = self.sum(ties.expected_gain(start, tied, right, k, gains))
            result[f"ndcg@{k}"] = gained / gains[total.clamp(max=min(k, longest))]
        r = total[query]
        everything = torch.full_like(r, self.gallery)
        return {
            **result,
            "rank": best.expected(),
            "reciprocal_rank": ties.expected_reciprocal(best.above, best.tied, best.right),
            "map@r": self.sum(ties.expected_precision(start, tied, right, before, r, harmonic)) / total,
            "r_precision": self.sum(ties.expected_found(start, tied, right, r)) / total,
            "ap": self.sum(ties.expected_precision(start, tied, right, before, everything, harmonic)) / total,
        }


class Side:
    """One side's queries while they are counted: levels of their right answers, best first."""

    def __init__(self, query: torch.Tensor, score: torch.Tensor, rows: int):
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
        self.rows = rows

    def count(
        self, part: slice, scores: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor
    ) -> None:
        """Add the wrong candidates of one block.

        Args:
            part: Rows of this side.
            scores: `(q, c)` float32 products, right candidates at `RIGHT`.
            queries: `(q, dim)` rows on the grid.
            candidates: `(c, dim)` rows on the grid.
        """
        first = self.offset[part]
        counts = self.offset[part.start + 1 : part.stop + 1] - first
        for number in range(int(counts.max())):
            has = (counts > number).nonzero()[:, 0]
            whole = len(has) == len(counts)
            group = (first if whole else first[has]) + number
            above, tied = tally(
                scores if whole else scores[has],
                self.level[group],
                queries if whole else queries[has],
                candidates,
            )
            self.above[group] += above
            self.tied[group] += tied

    def ranking(self, gallery: int) -> Ranking:
        """What was counted, on the CPU; rows that have no right answer are no queries."""
        has = self.offset[1:] > self.offset[:-1]
        query = (has.cumsum(0) - 1)[self.query]
        counted = [each.cpu() for each in (query, self.above, self.tied, self.right)]
        return Ranking(*counted, queries=int(has.sum()), gallery=gallery)


def rank_pairs(
    images: Rows,
    texts: Rows,
    pair_image: torch.Tensor,
    pair_text: torch.Tensor,
    *,
    directions: tuple[bool, bool] = (True, True),
    over_ranks: bool = False,
) -> tuple[Ranking, Ranking]:
    """Rank everything against everything and keep where the right answers stand.

    Each block of scores is used for both directions and forgotten. Counts are whole numbers, so their sum
    over blocks, or over processes, has no order.

    Args:
        images: One side.
        texts: The other side.
        pair_image: int64 `(pairs,)`: rows of `images`, and
        pair_text: int64 `(pairs,)`: the rows of `texts` that are right for them; each pair once.
        directions: Whether to count for images as queries, and for texts; what is not counted stays 0.
        over_ranks: Share the blocks among the processes of torch.distributed, where it is initialised. Every
            process holds all rows, and all get the result.

    Returns:
        Rankings of the texts for the images, and of the images for the texts. Rows without a right answer are
        candidates, but no queries.

    Raises:
        ValueError: The sides have different widths.
    """
    same_width(images, texts)
    device = images.device
    order = torch.argsort(pair_text.to(device), stable=True)
    pair_image, pair_text = pair_image.to(device)[order], pair_text.to(device)[order]
    score = exact_scores(images, texts, pair_image, pair_text)
    by_image, by_text = Side(pair_image, score, len(images)), Side(pair_text, score, len(texts))
    shared = over_ranks and dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    with torch.no_grad(), plain_float32(device):
        for rows in images.parts()[rank::world]:
            image_rows = images.take(rows)
            image_rough = rough(image_rows)
            mine = (pair_image >= rows.start) & (pair_image < rows.stop)
            mine_image, mine_text = pair_image[mine] - rows.start, pair_text[mine]  # still ordered by text
            for columns in texts.parts():
                text_rows = texts.take(columns)
                scores = image_rough @ rough(text_rows).T  # (image block, text block), float32
                low, high = torch.searchsorted(
                    mine_text, torch.tensor([columns.start, columns.stop], device=device)
                ).tolist()
                scores[mine_image[low:high], mine_text[low:high] - columns.start] = RIGHT
                if directions[0]:
                    by_image.count(rows, scores, image_rows, text_rows)
                if directions[1]:
                    by_text.count(columns, scores.T, text_rows, image_rows)
    if shared:
        for counts in (by_image.above, by_image.tied, by_text.above, by_text.tied):
            add_up(counts)
    return by_image.ranking(len(texts)), by_text.ranking(len(images))


def add_up(counts: torch.Tensor) -> None:
    """Sum over the processes, in place; NCCL takes only what lies on a GPU."""
    if dist.get_backend() == "nccl" and not counts.is_cuda:
        there = counts.cuda()
        dist.all_reduce(there)
        counts.copy_(there)
    else:
        dist.all_reduce(counts)


def tally(
    scores: torch.Tensor, level: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count wrong candidates above a level and level with it: in float32 where that is safe, else exactly.

    Args:
        scores: `(q, c)` float32 products of the unit rows, right candidates at `RIGHT`.
        level: `(q,)` exact score of a right candidate of each query.
        queries: `(q, dim)` rows on the grid.
        candidates: `(c, dim)` rows on the grid.

    Returns:
        Two int64 tensors of shape `(q,)`.
    """
    # Bound on a float32 product of unit rows: dim roundings of a sum whose terms add up to at most 1 in
    # absolute value, and the rounding of the rows.
    doubt = (1.5 * queries.shape[1] + 16) * 2.0**-24
    unit_level = (level / GRID**2)[:, None]
    high, low = (unit_level + doubt).float(), (unit_level - doubt).float()
    flags = torch.empty_like(scores)  # counting floats is several times faster than counting booleans
    above = torch.gt(scores, high, out=flags).sum(1).long()
    close = torch.ge(scores, low, out=flags).sum(1).long() - above
    tied = torch.zeros_like(above)
    doubtful = close.nonzero()[:, 0]
    if not len(doubtful):
        return above, tied
    near = scores[doubtful]
    near = (near >= low[doubtful]) & (near <= high[doubtful])
    if int(close.sum()) * GATHER > near.numel():
        exact = queries[doubtful] @ candidates.T
        above[doubtful] += ((exact > level[doubtful, None]) & near).sum(1)
        tied[doubtful] = ((exact == level[doubtful, None]) & near).sum(1)
        return above, tied
    for which, candidate in zip(*(each.split(2048) for each in near.nonzero(as_tuple=True)), strict=True):
        query = doubtful[which]
        exact = (queries[query] * candidates[candidate]).sum(1)
        above.index_add_(0, query, (exact > level[query]).long())
        tied.index_add_(0, query, (exact == level[query]).long())
    return above, tied
