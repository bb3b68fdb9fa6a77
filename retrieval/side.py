"""One side of an index, pictures or texts: segments that are searched together, less what was deleted."""

from __future__ import annotations

import bisect
import json
import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np

FAISS: Any = faiss  # its stubs lack much of it
EXACT_ROWS = 20_000  # a filter that leaves so few rows is answered by looking at each


@dataclass
class Segment:
    """Rows that were indexed together.

    Attributes:
        index: The FAISS index; its ids are the rows 0, 1, ...
        effort: Cells or graph nodes that a search looks at; 0 where there is no choice.
        candidates: Candidates a result that are re-ranked with `rows`; 0 for none.
        rows: float `(n, dim)`, mapped; None where the index itself has them.
        report: What the builder measured.
        name: Stem of its files; empty in memory.
    """

    index: faiss.Index
    effort: int = 0
    candidates: int = 0
    rows: np.ndarray | None = None
    report: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        """float32 rows by number."""
        if self.rows is not None:
            return np.asarray(self.rows[numbers], dtype=np.float32)
        return self.index.reconstruct_batch(np.ascontiguousarray(numbers, dtype=np.int64))  # pyright: ignore

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        allowed: np.ndarray | None = None,
        effort: int | None = None,
        candidates: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best rows; all parameters travel with the call, so that threads may search at once.

        Args:
            queries: float32 `(q, dim)`.
            k: Results wanted.
            allowed: bool `(n,)`; None for all rows.
            effort: Instead of the tuned one.
            candidates: Instead of the tuned number.

        Returns:
            Scores float32 and rows int64 `(q, k)`, best first; -inf and -1 where there are no more.
        """
        count = len(self) if allowed is None else int(allowed.sum())
        if not count:
            return np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        if allowed is not None and count <= EXACT_ROWS:
            return self._exact(queries, k, np.flatnonzero(allowed))
        effort = self.effort if effort is None else effort
        candidates = self.candidates if candidates is None else candidates
        share = count / len(self)
        effort = int(np.ceil(effort / max(share, 0.05)))  # filtered rows are sparser in each cell
        wanted = min(k * max(candidates, 1), len(self))
        while True:
            scores, rows = self.index.search(  # pyright: ignore[reportCallIssue]
                queries, wanted, params=parameters(self.index, effort, selector(allowed))
            )
            missing = (rows[:, : min(k, count)] < 0).any()
            if not missing or not effort or effort >= most_effort(self.index):
                break
            effort = min(4 * effort, most_effort(self.index))  # too few cells hold k rows
        if candidates:
            return self._rerank(queries, rows, k)
        short = k - scores.shape[1]
        scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
        if short > 0:
            scores = np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf)
            rows = np.pad(rows, ((0, 0), (0, short)), constant_values=-1)
        return scores[:, :k], rows[:, :k]

    def _rerank(self, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full((len(rows), k), -np.inf, np.float32)
        found = np.full((len(rows), k), -1, np.int64)
        for number, (query, mine) in enumerate(zip(queries, rows, strict=True)):
            mine = np.sort(mine[mine >= 0])  # rows of one region of the file are read together
            best = self.vectors(mine) @ query
            order = np.argsort(-best, kind="stable")[:k]
            scores[number, : len(order)], found[number, : len(order)] = best[order], mine[order]
        return scores, found

    def _exact(self, queries: np.ndarray, k: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        products = queries @ self.vectors(numbers).T  # (q, allowed)
        order = np.argsort(-products, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(products, order, 1), numbers[order]
        short = ((0, 0), (0, k - rows.shape[1]))
        return np.pad(scores, short, constant_values=-np.inf), np.pad(rows, short, constant_values=-1)

    def __len__(self) -> int:
        return self.index.ntotal


def parameters(
    index: faiss.Index, effort: int, sel: faiss.IDSelector | None
) -> faiss.SearchParameters | None:
    """Search parameters for one call, whatever the index."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        return FAISS.SearchParametersPreTransform(index_params=parameters(inner.index, effort, sel))
    if isinstance(inner, faiss.IndexIVF):
        more: dict[str, Any] = {}
        if isinstance(faiss.downcast_index(inner.quantizer), faiss.IndexHNSW):
            more["quantizer_params"] = FAISS.SearchParametersHNSW(efSearch=2 * effort + 16)
        more |= {} if sel is None else {"sel": sel}
        return FAISS.SearchParametersIVF(nprobe=min(effort, inner.nlist), **more)
    more = {} if sel is None else {"sel": sel}
    if isinstance(inner, faiss.IndexHNSW):
        return FAISS.SearchParametersHNSW(efSearch=effort, **more)
    return FAISS.SearchParameters(**more)


def most_effort(index: faiss.Index) -> int:
    """The effort past which nothing is gained: all cells, or a graph's rows."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        return most_effort(inner.index)
    return inner.nlist if isinstance(inner, faiss.IndexIVF) else inner.ntotal


def selector(allowed: np.ndarray | None) -> faiss.IDSelector | None:
    if allowed is None:
        return None
    return FAISS.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


class Records(Sequence):
    """The JSON lines of a file by number; the file stays mapped and only its line ends are in memory.

    Args:
        path: A file that `retrieval.artifact.write_lines` could have written.
    """

    def __init__(self, path: Path):
        self.ends = np.zeros(0, dtype=np.int64)
        if not path.stat().st_size:
            return
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        piece = 1 << 24
        self.ends = np.concatenate(
            [
                start + np.flatnonzero(np.frombuffer(self.map[start : start + piece], np.uint8) == 10)
                for start in range(0, len(self.map), piece)
            ]
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]  # negative numbers, and IndexError past the end
        start = int(self.ends[number - 1]) + 1 if number else 0
        return json.loads(self.map[start : int(self.ends[number])])


class Chain(Sequence):
    """Several sequences end to end."""

    def __init__(self, parts: Sequence[Sequence[Any]]):
        self.parts = [part for part in parts if len(part)]
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        part = bisect.bisect_right(self.starts, number) - 1
        return self.parts[part][number - self.starts[part]]


@dataclass
class Side:
    """What is searched as one: rows are numbered through the segments, and never again when one is deleted.

    Attributes:
        segments: At least one.
        records: One a row: `key`, for texts `text`, for pictures what filters use.
        deleted: bool `(rows,)`; None when nothing was deleted.
    """

    segments: list[Segment]
    records: Sequence[dict[str, Any]]
    deleted: np.ndarray | None = None

    @property
    def d(self) -> int:
        return self.segments[0].index.d

    @property
    def ntotal(self) -> int:
        """Rows, deleted ones included."""
        return sum(len(segment) for segment in self.segments)

    @cached_property
    def alive(self) -> int:
        """Rows that a search can find."""
        return self.ntotal - (0 if self.deleted is None else int(self.deleted.sum()))

    @cached_property
    def starts(self) -> list[int]:
        """Number of each segment's first row, and of the row past the last."""
        return np.cumsum([0, *(len(segment) for segment in self.segments)]).tolist()

    def search(
        self, queries: np.ndarray, k: int, *, allowed: np.ndarray | None = None, **effort: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best rows of all segments together; see `Segment.search` for arguments and result."""
        if self.deleted is not None:
            allowed = ~self.deleted if allowed is None else allowed & ~self.deleted
        found = [
            segment.search(
                queries,
                k,
                allowed=None if allowed is None else allowed[start : start + len(segment)],
                **effort,
            )
            for segment, start in zip(self.segments, self.starts, strict=False)
        ]
        if len(found) == 1:
            return found[0]
        scores = np.concatenate([one[0] for one in found], axis=1)
        rows = np.concatenate(
            [
                np.where(one[1] < 0, -1, one[1] + start)
                for one, start in zip(found, self.starts, strict=False)
            ],
            axis=1,
        )
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 `(n, dim)` rows by number."""
        rows = np.asarray(rows, dtype=np.int64)
        result = np.empty((len(rows), self.d), np.float32)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(owner):
            mine = owner == number
            result[mine] = self.segments[number].vectors(rows[mine] - self.starts[number])
        return result

    def where(self, conditions: Iterable[str]) -> np.ndarray:
        """Rows whose records fulfil all conditions.

        Args:
            conditions: Such as `width>=512`, `label=dog` or `url!=x`: a record's key, one of = != < <= > >=, a
                value. A record without the key fulfils only `!=`.

        Returns:
            bool `(rows,)`.

        Raises:
            ValueError: A condition that cannot be read, or a key that no record has.
        """
        allowed = np.ones(self.ntotal, dtype=bool)
        for condition in conditions:
            key, compare = read_condition(condition)
            column = self.column(key)
            allowed &= np.fromiter((compare(value) for value in column), dtype=bool, count=len(column))
        return allowed

    def column(self, key: str) -> list[Any]:
        """A key of all records; read once."""
        if key not in self._columns:
            column = [record.get(key) for record in self.records]
            if all(value is None for value in column):
                known = sorted(self.records[0])
                raise ValueError(f"no record has the key {key!r} of the filter; they have {', '.join(known)}")
            self._columns[key] = column
        return self._columns[key]

    @cached_property
    def _columns(self) -> dict[str, list[Any]]:
        return {}


OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "!=": lambda a, b: a != b,
    "<=": lambda a, b: a is not None and a <= b,
    ">=": lambda a, b: a is not None and a >= b,
    "=": lambda a, b: a is not None and a == b,
    "<": lambda a, b: a is not None and a < b,
    ">": lambda a, b: a is not None and a > b,
}


def read_condition(text: str) -> tuple[str, Callable[[Any], bool]]:
    """`KEY OP VALUE` as its key and a test of a value.

    Raises:
        ValueError: It is not of that form.
    """
    places = [(text.find(sign), -len(sign), sign) for sign in OPERATORS if text.find(sign) > 0]
    if not places:
        raise ValueError(f"filter {text!r}: expected KEY=VALUE, or !=, <, <=, >, >= in its place")
    place, _, sign = min(places)
    key, value = text[:place].strip(), text[place + len(sign) :].strip()
    try:
        number: float | None = float(value)
    except ValueError:
        number = None

    def fulfils(found: Any) -> bool:
        if number is not None and found is not None:
            try:  # some sets write numbers as text, whose order is another one
                return OPERATORS[sign](float(found), number)
            except (ValueError, TypeError):
                if sign not in ("=", "!="):
                    return False  # words have no place in an order of numbers
        return OPERATORS[sign](None if found is None else str(found), value)

    return key, fulfils
