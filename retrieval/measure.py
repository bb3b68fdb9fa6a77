"""How well an index does: recall against exact search, CPU time, and the least effort for a recall."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from retrieval.side import Segment, most_effort

MARGIN = 0.25  # of what may be missed: what is tuned on one half of the queries must hold for the other


@dataclass
class ExactTopK:
    """The best rows for some queries over rows that stream by.

    Attributes:
        queries: float32 `(q, dim)`.
        k: Results a query.
    """

    queries: np.ndarray
    k: int

    def __post_init__(self) -> None:
        self.scores = np.full((len(self.queries), self.k), -np.inf, np.float32)
        self.rows = np.full((len(self.queries), self.k), -1, np.int64)
        self.seconds = 0.0

    def add(self, rows: np.ndarray, first: int) -> None:
        """Take a block into account whose first row has the number `first`."""
        if not len(self.queries) or not len(rows):
            return
        began = time.process_time()
        scores, found = faiss.knn(
            self.queries, rows, min(self.k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
        )
        scores = np.concatenate([self.scores, scores], axis=1)
        found = np.concatenate([self.rows, found + first], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.k]
        self.scores, self.rows = np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1)
        self.seconds += time.process_time() - began

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds a query, all asked at once."""
        return 1e3 * self.seconds / max(len(self.queries), 1)

    def __getitem__(self, part: slice) -> ExactTopK:
        result = ExactTopK(self.queries[part], self.k)
        result.scores, result.rows = self.scores[part], self.rows[part]
        return result

    def recall(self, scores: np.ndarray, rows: np.ndarray) -> float:
        """Share of the exact results that were found; a row that scores as the last of them counts as it."""
        k = self.k
        same = (rows[:, :k, None] == self.rows[:, None, :]).any(2)  # (q, k)
        tied = (rows[:, :k] >= 0) & (scores[:, :k] >= self.scores[:, -1:] - 1e-7)
        return float((same | tied).mean())


def tune(segment: Segment, queries: np.ndarray, exact: ExactTopK, k: int, recall: float) -> None:
    """Set the segment's effort and candidates to the cheapest that reach the recall, or else to the best.

    Args:
        segment: What is tuned.
        queries: float32 `(q, dim)`.
        exact: Their right answers.
        k: Results a query.
        recall: What is wanted; a quarter of the allowed misses is kept as margin.
    """
    goal = recall + MARGIN * (1 - recall)
    if segment.rows is None and not isinstance(faiss.downcast_index(segment.index), faiss.IndexHNSW):
        return  # exact
    most = most_effort(segment.index)
    found: list[tuple[bool, float, float, int, int]] = []
    for candidates in (0,) if segment.rows is None else (2, 5, 10, 20, 40):
        effort, before = 4 if candidates else 16, -1.0
        while effort <= 2 * most:
            began = time.process_time()
            reached = exact.recall(
                *segment.search(queries, k, effort=min(effort, most), candidates=candidates)
            )
            seconds = time.process_time() - began
            found.append((reached >= goal, reached, seconds, min(effort, most), candidates))
            if reached >= goal or (effort > 64 and reached - before < 0.001):
                break  # looking into more cells finds nothing more
            if any(one[0] and one[2] < seconds for one in found):
                break  # there is something cheaper already
            effort, before = 2 * effort, reached
    reaching = [one for one in found if one[0]]
    best = min(reaching, key=lambda one: one[2]) if reaching else max(found, key=lambda one: one[1])
    segment.effort, segment.candidates = best[3:]


def measure(segment: Segment, queries: np.ndarray, exact: ExactTopK, k: int) -> dict[str, Any]:
    """Recall and CPU time of a tuned segment.

    Returns:
        `recall` at `k`, `queries` (how many), `cpu_ms` a query asked together and `cpu_ms_single` asked alone.
    """
    began = time.process_time()
    scores, rows = segment.search(queries, k)
    together = time.process_time() - began
    alone = []
    for query in queries[:50]:
        began = time.process_time()
        segment.search(query[None], k)
        alone.append(time.process_time() - began)
    return {
        "k": k,
        "recall": round(exact.recall(scores, rows), 4),
        "queries": len(queries),
        "cpu_ms": round(1e3 * together / len(queries), 3),
        "cpu_ms_single": round(1e3 * float(np.median(alone)), 3),
    }
