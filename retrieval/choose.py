"""Which FAISS index suits so many rows, so much memory, and this recall."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("auto", "flat", "hnsw", "ivf", "ivf_fp16", "ivf_sq8", "ivf_pq")
FLAT_ROWS = 20_000  # up to here looking at every row takes under a millisecond a query
HNSW_LINKS = 32
LEAST_TRAINED = 64  # rows: cells and codes of fewer mean nothing, and FAISS refuses to train them
TRAIN_PER_CELL = 40  # k-means gains little from more, and warns below 39


@dataclass(frozen=True)
class Plan:
    """One way to index rows.

    Attributes:
        kind: `flat`, `hnsw`, `ivf` (cells with 4-bit codes, re-ranked), `ivf_fp16`, `ivf_sq8` or `ivf_pq`.
        factory: What `faiss.index_factory` takes.
        cells: Inverted lists; 0 for none.
        bytes_per_row: Memory of codes, links, ids and centroids, by the formats.
        exact_rows: Whether the rows themselves are kept on disk, mapped, to re-rank what the codes find.
        on_disk: Whether the lists can be merged into one mapped file.
    """

    kind: str
    factory: str
    cells: int
    bytes_per_row: float
    exact_rows: bool
    on_disk: bool

    @property
    def train_rows(self) -> int:
        """Rows that training takes: 256 codes of a quantiser want examples, too."""
        return max(TRAIN_PER_CELL * self.cells, TRAIN_PER_CELL * 256 if self.kind == "ivf_pq" else 1024)


def choose_plans(
    rows: int,
    dim: int,
    *,
    memory: int | None = None,
    recall: float = 0.95,
    kind: str = "auto",
    train_flops: float = 1e13,
) -> list[Plan]:
    """Plans worth trying, best first; the builder takes the first that is in time and reaches the recall.

    Up to 20,000 rows, or for a recall of 1, every row is looked at. Above, cells with 4-bit codes whose best 10 to 40
    candidates a result are re-ranked with the rows give the most recall for CPU time **on text queries**, which lie
    off the images' manifold and defeat graphs and codes that do well on queries like the rows. A graph (HNSW) is
    next, then cells with float16 or 8-bit rows, which have less to lose. With little memory the codes shrink:
    8 bits a dimension, then product quantisation behind a rotation, always re-ranked from disk.

    Args:
        rows: How many.
        dim: Their width.
        memory: Bytes that the index may take in memory; None for no limit. Rows that are re-ranked are mapped and
            count only for the first plan, which reads many of them.
        recall: Wanted recall@k against exact search.
        kind: One of `KINDS`, to take no other.
        train_flops: Floating-point operations that one iteration of k-means may take.

    Returns:
        Plans, at least one.

    Raises:
        ValueError: An empty gallery, a recall outside (0, 1], an unknown kind, or too little memory.

    Reference:
        FAISS wiki, "Guidelines to choose an index"; docs/retrieval.md has the measurements.
    """
    if rows < 1:
        raise ValueError("the gallery is empty, there is nothing to index")
    if not 0 < recall <= 1:
        raise ValueError(f"recall is a share in (0, 1], got {recall}")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    cells = choose_cells(rows, dim, train_flops)
    coarse = f"IVF{cells}_HNSW32" if cells >= 16_384 else f"IVF{cells}"
    ivf_extra = 8 + 4 * dim * cells / rows  # ids and centroids
    flat = Plan("flat", "Flat", 0, 4 * dim, False, False)
    plans = [
        Plan("hnsw", f"HNSW{HNSW_LINKS},Flat", 0, 4 * dim + 8.5 * HNSW_LINKS, False, False),
        Plan("ivf_fp16", f"{coarse},SQfp16", cells, 2 * dim + ivf_extra, True, True),
        Plan("ivf_sq8", f"{coarse},SQ8", cells, dim + ivf_extra, True, True),
    ]
    if dim % 2 == 0:
        plans.insert(0, Plan("ivf", f"{coarse},PQ{dim // 2}x4fs", cells, dim / 4 + ivf_extra, True, False))
    for share in (4, 8, 16):  # bytes: a quarter of the dimensions, an eighth, a sixteenth
        if dim % share == 0 and dim // share >= 4 and rows >= 256 * TRAIN_PER_CELL:
            codes = dim // share
            plans.append(
                Plan("ivf_pq", f"OPQ{codes}_{dim},{coarse},PQ{codes}", cells, codes + ivf_extra, True, True)
            )
    if kind != "auto":
        plans = [plan for plan in [flat, *plans] if plan.kind == kind]
        if not plans:
            raise ValueError(f"kind {kind!r} cannot hold {rows:,} rows of {dim} dimensions: take auto")
        if kind.startswith("ivf") and rows < LEAST_TRAINED:
            raise ValueError(
                f"kind {kind!r} needs at least {LEAST_TRAINED} rows to be trained on, got {rows}: take auto"
            )
    elif rows <= FLAT_ROWS or recall == 1:
        plans = [flat]
        if recall < 1:
            plans += [Plan("ivf_sq8", f"{coarse},SQ8", cells, dim + ivf_extra, True, True)]
    else:
        plans.append(flat)
    if memory is None:
        return plans
    fitting = [plan for plan in plans if memory_of(plan, rows, dim) <= memory]
    if not fitting:
        least = min(memory_of(plan, rows, dim) for plan in plans)
        raise ValueError(
            f"{rows:,} rows of {dim} dimensions need at least {least / 1e6:,.1f} MB, the limit is "
            f"{memory / 1e6:,.1f} MB: raise --memory, or index the set in pieces on several machines"
        )
    return fitting


def memory_of(plan: Plan, rows: int, dim: int) -> float:
    """Bytes that a plan wants in memory: for 4-bit codes also the float16 rows, of which many are read."""
    return rows * (plan.bytes_per_row + (2 * dim if plan.kind == "ivf" else 0))


def choose_cells(rows: int, dim: int, train_flops: float = math.inf) -> int:
    """Inverted lists: a power of two near `2 sqrt(rows)`; 65,536, 262,144 and 1,048,576 from 1, 10 and 100 million.

    Halved until an iteration of k-means, `2 * train * cells * dim` operations, is within `train_flops`, but not
    below `sqrt(rows)`; and so small that there are rows to train on.
    """
    usual = 2 ** max(2, round(math.log2(2 * math.sqrt(rows))))
    cells = next((size for least, size in ((1e8, 2**20), (1e7, 2**18), (1e6, 2**16)) if rows >= least), usual)
    while cells > 4 and (
        TRAIN_PER_CELL * cells > rows
        or (2 * TRAIN_PER_CELL * cells * cells * dim > train_flops and cells > math.sqrt(rows))
    ):
        cells //= 2
    return cells
