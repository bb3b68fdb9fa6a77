"""Memory for batches that is used again: rows are put where they will lie, by one process or by several at once.

A batch of pictures is larger than what the C library keeps between two allocations, and memory fresh from the kernel
costs a sixth of the time that a 256 px picture takes. So the batches of an iteration take turns in a few slots. Loader
processes share these and fill one batch together; no pixel is copied on its way to the training process.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

# One that the consumer still holds while it asks for the next, and three that are being made: torch's loaders work two
# batches ahead, and are given the third as the parts of the first come in.
KEPT = 4
ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Column:
    """Something of which every row of a batch has as much.

    Attributes:
        shape: Of one row.
        dtype: One that numpy knows.
        channels_last: Whether the first dimension of a row lies innermost in memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False

    def bytes(self, rows: int) -> int:
        return rows * int(np.prod(self.shape)) * self.dtype.itemsize

    def array(self, memory: np.ndarray, rows: int) -> np.ndarray:
        """The column's view (rows, *shape) of memory of its own; uint8 (bytes,)."""
        lying = memory.view(torch.empty(0, dtype=self.dtype).numpy().dtype)
        if not self.channels_last:
            return lying.reshape(rows, *self.shape)
        return np.moveaxis(lying.reshape(rows, *self.shape[1:], self.shape[0]), -1, 1)


Columns = Mapping[str, Column]


class Placing(Protocol):
    """A collate that names columns of fixed size, which are put in place row by row as they are loaded.

    `load` is then called as `load(sample, rng, places)`: `places` has that row's tensors by column, to be filled, or is
    None. `collate(rows, placed)` gets the filled columns of all its rows, or None, to make them from the rows itself.

    Several workers make a batch together, and each calls `collate` for its own rows. What that returns besides the
    columns is put end to end: lists, or tensors whose first dimension goes by the rows.
    """

    @property
    def columns(self) -> Columns: ...

    def __call__(
        self, rows: list[Any], placed: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, Any]: ...


def columns_of(collate: Callable[..., Any]) -> Columns:
    """The columns that a collate names; none where it is not `Placing`."""
    return getattr(collate, "columns", {})


@dataclass(frozen=True)
class Slot:
    """Memory for one batch of at most `rows` rows; a copy that another process is sent sees the same."""

    columns: Columns
    rows: int
    memory: torch.Tensor
    """uint8 `(bytes,)`"""

    @classmethod
    def make(cls, columns: Columns, rows: int, *, shared: bool) -> Slot:
        memory = torch.empty(sum(map(_room, columns.values(), [rows] * len(columns))), dtype=torch.uint8)
        return cls(columns, rows, memory.share_memory_() if shared else memory)

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns, (rows, *shape) each."""
        found, start, memory = {}, 0, self.memory.numpy()
        for name, column in self.columns.items():
            found[name] = column.array(memory[start : start + column.bytes(self.rows)], self.rows)
            start += _room(column, self.rows)
        return found

    def tensors(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Rows `[start, stop)` of the columns, to be filled."""
        return {name: torch.from_numpy(array[start:stop]) for name, array in self.arrays().items()}


def _room(column: Column, rows: int) -> int:
    return -(-column.bytes(rows) // ALIGNMENT) * ALIGNMENT


class Slots:
    """The slots of one iteration, and which of them are free.

    A slot is free again when nothing refers to its batch any more, be it the batch's tensors, views of them, or arrays
    that share their memory. A consumer may therefore hold batches for as long as it likes: when it holds too many,
    the next ones come in memory of their own, which takes longer.

    Args:
        columns: What each row has; without any there are no slots.
        rows: The most that a batch has.
        shared: Whether processes that start later are to fill them.
    """

    def __init__(self, columns: Columns, rows: int, *, shared: bool):
        self.columns, self.rows, self.shared = columns, rows, shared
        self.slots: list[Slot] = []
        self.lent: list[list[weakref.ref[np.ndarray]]] = []
        self.taken: set[int] = set()
        while shared and columns and len(self.slots) < KEPT:
            self._add()

    def _add(self) -> None:
        self.slots.append(Slot.make(self.columns, self.rows, shared=self.shared))
        self.lent.append([])

    def take(self) -> int | None:
        """The number of a free slot, which is then to be filled; None when there is none."""
        for number in range(KEPT if self.columns else 0):
            if number == len(self.slots):
                if self.shared:
                    break
                self._add()
            if number not in self.taken and all(view() is None for view in self.lent[number]):
                self.taken.add(number)
                return number
        return None

    def lend(self, number: int, parts: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """The columns of a batch that has been filled.

        Args:
            number: Its slot.
            parts: First row and rows of each part, by place. Between them may be gaps, which are closed.

        Returns:
            Tensors (b, *shape) that lie in the slot.
        """
        arrays, end = self.slots[number].arrays(), 0
        for start, count in parts:
            if start != end:
                for array in arrays.values():
                    array[end : end + count] = array[start : start + count]
            end += count
        views = {name: array[:end] for name, array in arrays.items()}
        self.lent[number] = [weakref.ref(view) for view in views.values()]
        self.taken.discard(number)
        return {
            name: torch.from_numpy(view) for name, view in views.items()
        }  # a tensor keeps its array alive


def join(parts: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Put what `collate` made of the parts of a batch end to end.

    Args:
        parts: Rows of each, and what was made of them.

    Raises:
        TypeError: Something that has no end: neither a tensor nor a list.
    """
    if len(parts) == 1:
        return parts[0][1]
    filled = [data for rows, data in parts if rows] or [parts[0][1]]  # nobody knows the shape of no rows
    joined: dict[str, Any] = {}
    for name, first in filled[0].items():
        values = [data[name] for data in filled]
        if isinstance(first, torch.Tensor):
            joined[name] = torch.cat(values)
        elif isinstance(first, list):
            joined[name] = [entry for value in values for entry in value]
        else:
            raise TypeError(
                f"collate gave {name!r} as {type(first).__name__}: several workers make a batch together when "
                "collate names columns, and only tensors and lists can be put end to end"
            )
    return joined
