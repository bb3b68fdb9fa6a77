"""Exact places of all right answers, counted in blocks from one float32 product for both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist

from retrieval import ties
from retrieval.counting import RIGHT, Part, Side
from retrieval.rows import Rows, exact_scores, plain_float32, same_width


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
    by_image = Side(pair_image, score, len(images), images.dim)
    by_text = Side(pair_text, score, len(texts), images.dim)
    shared = over_ranks and dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    # Blocks are made in the same memory again: new memory for each would cost more than counting in it.
    kept = torch.empty(min(images.block, len(images)) * min(texts.block, len(texts)), device=device)
    with torch.no_grad(), plain_float32(device):
        for rows in images.parts()[rank::world]:
            image_part, image_rough = Part(images, rows), images.rough(rows)
            mine = (pair_image >= rows.start) & (pair_image < rows.stop)
            mine_image, mine_text = pair_image[mine] - rows.start, pair_text[mine]  # still ordered by text
            for columns in texts.parts():
                text_part, text_rough = Part(texts, columns), texts.rough(columns)
                scores = kept[: len(image_part) * len(text_part)].view(len(image_part), len(text_part))
                torch.mm(image_rough, text_rough.T, out=scores)
                low, high = torch.searchsorted(
                    mine_text, torch.tensor([columns.start, columns.stop], device=device)
                ).tolist()
                scores[mine_image[low:high], mine_text[low:high] - columns.start] = RIGHT
                if directions[0]:
                    by_image.count(scores, image_part, text_part)
                if directions[1]:
                    by_text.count(scores.T, text_part, image_part)
    by_image.settle_waiting(images, texts)
    by_text.settle_waiting(texts, images)
    if shared:
        for counts in (by_image.above, by_image.tied, by_text.above, by_text.tied):
            add_up(counts)
    return ranking_of(by_image, len(texts)), ranking_of(by_text, len(images))


def ranking_of(side: Side, gallery: int) -> Ranking:
    """What was counted, on the CPU; rows that have no right answer are no queries."""
    has = side.offset[1:] > side.offset[:-1]
    query = (has.cumsum(0) - 1)[side.query]
    counted = [each.cpu() for each in (query, side.above, side.tied, side.right)]
    return Ranking(*counted, queries=int(has.sum()), gallery=gallery)


def add_up(counts: torch.Tensor) -> None:
    """Sum over the processes, in place; NCCL takes only what lies on a GPU."""
    if dist.get_backend() == "nccl" and not counts.is_cuda:
        there = counts.cuda()
        dist.all_reduce(there)
        counts.copy_(there)
    else:
        dist.all_reduce(counts)
