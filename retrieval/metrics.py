"""Image-text retrieval: exact ranks of the right answers, streamed in blocks, and the numbers made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DIRECTIONS = ("image_to_text", "text_to_image")
# An exact score: unit rows rounded to multiples of 2^-26 and multiplied as whole numbers in float64. Every
# partial sum of a dot product is then a whole number below 2^53, so nothing is rounded: the score depends on
# its two rows alone, not on block size, position, threads or device, and equal rows tie exactly. The grid
# moves a score by about 4e-9, a float32 product by about 1e-7.
GRID = 2.0**26


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
        return 1 + self.above + (self.tied - self.right) / (self.right + 1).double()

    def hits(self, k: int) -> torch.Tensor:
        """Probability `(queries,)` float64 that a right answer is among the first `k`."""
        slots = (min(k, self.gallery) - self.above).clamp(min=0)  # places left for the tied candidates
        return 1 - misses(self.tied, self.right, slots)

    def summary(self, ks: Sequence[int]) -> dict[str, float]:
        """The numbers that are reported."""
        expected = self.expected()
        return {
            **{f"recall@{k}": float(self.hits(k).mean()) for k in ks},
            "median_rank": float(np.median(expected.numpy())),
            "mean_rank": float(expected.mean()),
            "tied_queries": int((self.tied > self.right).sum()),
        }


def retrieval_metrics(
    image_embeddings: Any,
    text_embeddings: Any,
    image_of_text: Any,
    ks: Sequence[int] = (1, 5, 10),
    *,
    block: int = 1024,
) -> dict[str, dict[str, float]]:
    """Recall@k and ranks of cosine retrieval in both directions.

    recall@k is the CLIP paper's: the share of queries with at least one right answer among the first k, not
    the share of right answers found. Ties are counted by expectation, so a model that scores everything
    alike gets exactly `chance` in recall and mean rank. The result depends neither on the order of the
    gallery nor on `block`. Time is O(images x texts x dim); memory beside the arguments is
    about `40 * block**2 + 16 * block * dim` bytes.

    Args:
        image_embeddings: `(images, dim)` floats, numpy or torch on any device; normalised here.
        text_embeddings: `(texts, dim)` floats.
        image_of_text: `(texts,)` integers: the image that each text describes; each image has one or more.
        ks: Cut-offs; one above the size of the gallery counts as the whole gallery.
        block: Rows of both sides in one product.

    Returns:
        `{"image_to_text": {...}, "text_to_image": {...}}`, each with `recall@K` for every K, `median_rank`
        and `mean_rank` of the first right answer (1-based; the median of an even number of queries is the
        mean of the middle two) and `tied_queries`, the number of queries whose result a tie leaves open.

    Raises:
        ValueError: Shapes that do not fit, an empty side, NaN, infinity or a row of zeros, an index out of
            range, an image without a text, a cut-off below 1.
        TypeError: Embeddings that are not real numbers, or indices that are not integers.

    Reference:
        Radford et al. 2021, table 13 (protocol); ties: hypergeometric expectation of a hit.

    Example:
        >>> retrieval_metrics(np.eye(2), np.eye(2)[[0, 1, 1]], [0, 1, 1])["image_to_text"]["recall@1"]
        1.0
    """
    ks = checked_cutoffs(ks)
    ranks = retrieval_ranks(image_embeddings, text_embeddings, image_of_text, block=block)
    return {name: each.summary(ks) for name, each in zip(DIRECTIONS, ranks, strict=True)}


def retrieval_ranks(
    image_embeddings: Any, text_embeddings: Any, image_of_text: Any, *, block: int = 1024
) -> tuple[Ranks, Ranks]:
    """The ranks behind `retrieval_metrics`, query by query.

    Args:
        image_embeddings: `(images, dim)` floats.
        text_embeddings: `(texts, dim)` floats.
        image_of_text: `(texts,)` integers.
        block: Rows of both sides in one product.

    Returns:
        Ranks of the images as queries for texts, and of the texts as queries for images (on the CPU).

    Raises:
        ValueError: As `retrieval_metrics`.
        TypeError: As `retrieval_metrics`.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1 row, got {block}")
    images = Rows(image_embeddings, "image_embeddings", block)
    texts = Rows(text_embeddings, "text_embeddings", block)
    if images.dim != texts.dim:
        raise ValueError(
            f"image_embeddings have {images.dim} dimensions, text_embeddings {texts.dim}: "
            "expected both from the same model"
        )
    owner = checked_owner(image_of_text, len(images), len(texts)).to(images.device)

    right = torch.empty(len(texts), dtype=torch.float64, device=images.device)  # score of each text's image
    for part in texts.parts():
        right[part] = (texts.take(part) * images.take(owner[part])).sum(1)
    best = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)
    best.scatter_reduce_(0, owner, right, "amax")
    best_right = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    best_right.index_add_(0, owner, (right == best[owner]).long())

    above_image, tied_image = (torch.zeros_like(best_right) for _ in range(2))
    above_text, tied_text = (torch.zeros_like(owner) for _ in range(2))
    numbers = torch.arange(len(images), device=images.device)
    with plain_float32(images.device):
        for rows in images.parts():
            image_rows = images.take(rows)
            image_rough = rough(image_rows)
            for columns in texts.parts():
                text_rows = texts.take(columns)
                scores = image_rough @ rough(text_rows).T  # (image block, text block), float32
                mine, yours = owner[columns], numbers[rows]
                here = ((mine >= rows.start) & (mine < rows.stop)).nonzero()[:, 0]
                scores[mine[here] - rows.start, here] = -2.0  # only wrong candidates are counted below
                above, tied = tally(scores, best[rows], image_rows, text_rows, yours, mine)
                above_image[rows] += above
                tied_image[rows] += tied
                above, tied = tally(scores.T, right[columns], text_rows, image_rows, mine, yours)
                above_text[columns] += above
                tied_text[columns] += tied
    one = torch.ones_like(owner)
    return (
        Ranks(above_image.cpu(), (tied_image + best_right).cpu(), best_right.cpu(), len(texts)),
        Ranks(above_text.cpu(), (tied_text + one).cpu(), one.cpu(), len(images)),
    )


def tally(
    scores: torch.Tensor,
    level: torch.Tensor,
    queries: torch.Tensor,
    candidates: torch.Tensor,
    query_owner: torch.Tensor,
    candidate_owner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count wrong candidates above a level and level with it: in float32 where that is safe, else exactly.

    Args:
        scores: `(q, c)` float32 products of the unit rows, right candidates at -2.
        level: `(q,)` exact score of each query's best right candidate.
        queries: `(q, dim)` rows on the grid.
        candidates: `(c, dim)` rows on the grid.
        query_owner: `(q,)` image of each query.
        candidate_owner: `(c,)` image of each candidate.

    Returns:
        Two int64 tensors of shape `(q,)`.
    """
    # Bound on a float32 product of unit rows: dim roundings of a sum whose terms add up to at most 1 in
    # absolute value, and the rounding of the rows.
    doubt = (1.5 * queries.shape[1] + 16) * 2.0**-24
    rough_level = (level / GRID**2)[:, None]
    flags = torch.empty_like(scores)  # counting floats is several times faster than counting booleans
    above = torch.gt(scores, (rough_level + doubt).float(), out=flags).sum(1).long()
    close = torch.ge(scores, (rough_level - doubt).float(), out=flags).sum(1).long() - above
    tied = torch.zeros_like(above)
    doubtful = close.nonzero()[:, 0]
    if len(doubtful):
        exact = queries[doubtful] @ candidates.T
        exact[query_owner[doubtful, None] == candidate_owner] = -torch.inf
        above[doubtful] = (exact > level[doubtful, None]).sum(1)
        tied[doubtful] = (exact == level[doubtful, None]).sum(1)
    return above, tied


def rough(rows: torch.Tensor) -> torch.Tensor:
    """Rows on the grid as float32 unit rows."""
    return (rows * (1 / GRID)).float()


@contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """Products in true float32, whatever autocast or TF32 setting surrounds the evaluation."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def chance(image_of_text: Any, images: int, ks: Sequence[int] = (1, 5, 10)) -> dict[str, dict[str, float]]:
    """What ranking at random would score on the same pairs.

    Args:
        image_of_text: `(texts,)` integers.
        images: Number of images.
        ks: Cut-offs.

    Returns:
        As `retrieval_metrics`, without `tied_queries`: expected recall@k and mean rank, and the smallest rank
        that at least half of the queries are expected to reach.

    Raises:
        ValueError: An index out of range, an image without a text, a cut-off below 1.

    Example:
        >>> chance([0, 1, 2, 3], images=4, ks=[1])["text_to_image"]["recall@1"]
        0.25
    """
    ks = checked_cutoffs(ks)
    owner = checked_owner(image_of_text, images, len(image_of_text))
    sizes, queries = torch.bincount(owner, minlength=images).unique(return_counts=True)

    def one(right: torch.Tensor, weight: torch.Tensor, gallery: int) -> dict[str, float]:
        share = weight.double() / weight.sum()
        ranks = Ranks(torch.zeros_like(right), torch.full_like(right, gallery), right, gallery)
        low, high = 1, gallery  # the median lies in here
        while low < high:
            middle = (low + high) // 2
            reached = float((ranks.hits(middle) * share).sum()) >= 0.5 - 1e-12
            low, high = (low, middle) if reached else (middle + 1, high)
        return {
            **{f"recall@{k}": float((ranks.hits(k) * share).sum()) for k in ks},
            "median_rank": float(low),
            "mean_rank": float((ranks.expected() * share).sum()),
        }

    one_image = torch.ones(1, dtype=torch.int64)
    return dict(
        zip(DIRECTIONS, [one(sizes, queries, len(owner)), one(one_image, one_image, images)], strict=True)
    )


def misses(tied: torch.Tensor, right: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Probability that `slots` draws from `tied` candidates find none of the `right` ones: C(t-p,m)/C(t,m)."""
    wrong, slots = tied - right, torch.minimum(slots, tied)
    if len(slots) and slots.max() > right.max():  # C(t-p,m)/C(t,m) = C(t-m,p)/C(t,p): the shorter product
        wrong, slots = tied - slots, right
    result = torch.ones(tied.shape, dtype=torch.float64)
    for draw in range(int(slots.max()) if len(slots) else 0):
        factor = (wrong - draw).clamp(min=0) / (tied - draw).clamp(min=1).double()
        result = torch.where(draw < slots, result * factor, result)
    return result


class Rows:
    """Embeddings read block by block as whole numbers on the grid; checked once, copied never as a whole."""

    def __init__(self, embeddings: Any, name: str, block: int):
        self.source = embeddings if isinstance(embeddings, torch.Tensor) else np.asarray(embeddings)
        self.name, self.block = name, block
        self.device = embeddings.device if isinstance(embeddings, torch.Tensor) else torch.device("cpu")
        shape = tuple(self.source.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{name}: expected (rows, dimensions), both at least 1, got shape {shape}")
        kind = str(self.source.dtype).removeprefix("torch.")
        if not kind.startswith(("float", "bfloat", "int", "uint")):
            raise TypeError(f"{name}: expected real numbers, got {kind}")
        self.rows, self.dim = shape
        self.norms = torch.empty(self.rows, dtype=torch.float64, device=self.device)
        for part in self.parts():
            self.norms[part] = row_norms(self.read(part))
        if not torch.isfinite(self.norms).all():
            row = int((~torch.isfinite(self.norms)).nonzero()[0])
            raise ValueError(
                f"{name}: row {row} has NaN or infinite values; a ranking of it would mean nothing. "
                "Look for an overflow in the model (half precision?) or a damaged checkpoint."
            )
        if not self.norms.all():
            row = int((self.norms == 0).nonzero()[0])
            raise ValueError(f"{name}: row {row} is all zeros and has no direction")
        self.scales = GRID / self.norms

    def __len__(self) -> int:
        return self.rows

    def parts(self) -> list[slice]:
        return [slice(start, min(start + self.block, self.rows)) for start in range(0, self.rows, self.block)]

    def read(self, which: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(self.source, torch.Tensor):
            return self.source[which].detach().double()
        index = which if isinstance(which, slice) else which.cpu().numpy()
        return torch.from_numpy(np.array(self.source[index], dtype=np.float64))

    def take(self, which: slice | torch.Tensor) -> torch.Tensor:
        """Unit rows as whole multiples of 2^-26, float64."""
        return (self.read(which) * self.scales[which, None]).round_()


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean norms by folding halves onto each other: elementwise steps, so equal rows give equal bits.

    A library's reduction may add in another order at another place in memory.
    """
    scale = rows.abs().amax(1, keepdim=True)  # squares of huge or tiny rows must not leave float64's range
    squares = (rows / torch.where(scale > 0, scale, 1.0)).square()
    while (width := squares.shape[1]) > 1:
        half = width // 2
        folded = squares[:, :half] + squares[:, half : 2 * half]
        squares = torch.cat([folded, squares[:, 2 * half :]], 1)  # an odd width keeps its last column
    return squares[:, 0].sqrt() * scale[:, 0]


def checked_cutoffs(ks: Sequence[int]) -> list[int]:
    if not len(ks) or any(int(k) != k or k < 1 for k in ks):
        raise ValueError(f"ks: expected one or more whole numbers of at least 1, got {list(ks)}")
    return [int(k) for k in ks]


def checked_owner(image_of_text: Any, images: int, texts: int) -> torch.Tensor:
    """`image_of_text` as int64 `(texts,)` on the CPU."""
    if isinstance(image_of_text, torch.Tensor):
        image_of_text = image_of_text.cpu().numpy()
    owner = np.array(image_of_text)
    if owner.shape != (texts,):
        raise ValueError(
            f"image_of_text: expected one entry for each of {texts} texts, got shape {owner.shape}"
        )
    if owner.dtype.kind not in "iu":
        raise TypeError(f"image_of_text: expected integers, got {owner.dtype}")
    outside = np.flatnonzero((owner < 0) | (owner >= images))
    if len(outside):
        raise ValueError(
            f"image_of_text: text {outside[0]} names image {owner[outside[0]]}, "
            f"expected 0 to {images - 1} ({len(outside)} texts are out of range)"
        )
    lonely = np.flatnonzero(np.bincount(owner.astype(np.int64), minlength=images) == 0)
    if len(lonely):
        raise ValueError(
            f"image_of_text: image {lonely[0]} has no text, so it has no right answer "
            f"({len(lonely)} of {images} images; leave them out of the images)"
        )
    return torch.from_numpy(owner.astype(np.int64))
