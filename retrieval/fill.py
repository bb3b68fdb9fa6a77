"""Fill a FAISS index with rows that stream by, and stop when the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
from faiss.contrib.ondisk import merge_ondisk

from pairstream.progress import ProgressBar
from retrieval.choose import TRAIN_PER_CELL, Plan

BLOCK_ROWS = 1_000_000  # rows whose lists are in memory at once while an index on disk is made
FAISS: Any = faiss  # its stubs lack much of it


class OutOfTimeError(Exception):
    """A plan cannot be built within what is left of the time."""


class Source(Protocol):
    """Rows that can be read several times, in pieces."""

    count: int
    dim: int

    def blocks(self, *, records: bool = False) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
        """float32 rows, with their records when asked for."""
        ...


def fill(
    source: Source,
    plan: Plan,
    train: np.ndarray,
    stem: Path,
    left: Callable[[], float],
    *,
    show: bool = False,
) -> faiss.Index:
    """Train an index and add all rows; `stem.faiss` is written.

    Args:
        source: The rows.
        plan: What to build.
        train: Rows to train on.
        stem: Of the file names.
        left: Seconds that are left.
        show: Show progress.

    Raises:
        OutOfTimeError: It would take longer.
    """
    index = faiss.index_factory(source.dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    train_within_reason(index, plan, train)
    blocks: list[str] = []
    began, done, inside = time.perf_counter(), 0, 0
    try:
        with ProgressBar(f"add to {plan.factory}", source.count, show=show) as bar:
            for rows, _ in source.blocks():
                for start in range(0, len(rows), 10_000):
                    piece = rows[start : start + 10_000]
                    if plan.on_disk:
                        index.add_with_ids(piece, np.arange(done, done + len(piece)))  # pyright: ignore
                    else:
                        index.add(piece)  # pyright: ignore[reportCallIssue]
                    done, inside = done + len(piece), inside + len(piece)
                    bar.advance(len(piece))
                    spent = time.perf_counter() - began
                    if done >= 0.05 * source.count and spent * (source.count / done - 1) > left():
                        raise OutOfTimeError(f"{done:,} of {source.count:,} rows after {spent:.0f} s")
                if plan.on_disk and inside >= BLOCK_ROWS and done < source.count:
                    blocks.append(write_block(index, stem, len(blocks)))
                    index.reset()
                    inside = 0
        if blocks:
            blocks.append(write_block(index, stem, len(blocks)))
            index.reset()
            merge_ondisk(index, blocks, str(stem.with_suffix(".ivfdata")))
        faiss.write_index(index, str(stem.with_suffix(".faiss")))
    finally:
        for block in blocks:
            Path(block).unlink(missing_ok=True)
    return index


def write_block(index: faiss.Index, stem: Path, number: int) -> str:
    path = str(stem.with_suffix(f".block{number}"))
    faiss.write_index(index, path)
    return path


def train_within_reason(index: faiss.Index, plan: Plan, train: np.ndarray) -> None:
    """Few iterations of k-means: more gain nothing that a slightly larger search would not."""
    if index.is_trained:
        return
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.cp.niter = 8
    ivf.cp.max_points_per_centroid, ivf.cp.min_points_per_centroid = TRAIN_PER_CELL, 1
    if hasattr(ivf, "pq"):
        ivf.pq.cp.niter, ivf.pq.cp.min_points_per_centroid = 10, 1
    if isinstance(index, faiss.IndexPreTransform):
        rotation: Any = FAISS.downcast_VectorTransform(index.chain.at(0))  # pyright: ignore
        rotation.niter, rotation.niter_pq_0, rotation.niter_pq, rotation.max_train_points = 5, 8, 2, 20_000
    index.train(train[: plan.train_rows])  # pyright: ignore[reportCallIssue]


@contextmanager
def time_limit(deadline: float, *, armed: bool) -> Iterator[Callable[[], float]]:
    """Stop FAISS inside its own loops when the time is over.

    Args:
        deadline: On the clock of `time.perf_counter`.
        armed: False lets it go on.

    Yields:
        A function that gives the seconds left.

    Raises:
        OutOfTimeError: It was stopped.
    """

    def left() -> float:
        return deadline - time.perf_counter() if armed else float("inf")

    if left() <= 0:
        raise OutOfTimeError("none was left to begin")
    if armed:
        FAISS.TimeoutCallback.reset(left())
    try:
        yield left
    except RuntimeError as error:
        if armed and "interrupted" in str(error):
            raise OutOfTimeError("in training") from error
        raise
    finally:
        FAISS.InterruptCallback.clear_instance()


def measured_flops() -> float:
    """Operations a second of float32 matrix products here and now."""
    rows = np.ones((1024, 512), np.float32)
    began = time.perf_counter()
    for _ in range(4):
        np.matmul(rows, rows.T)
    return 4 * 2 * 1024 * 1024 * 512 / (time.perf_counter() - began)
