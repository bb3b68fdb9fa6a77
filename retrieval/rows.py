"""Embedding rows on a grid on which a cosine is exact, read block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# An exact score: unit rows rounded to multiples of 2^-26 and multiplied as whole numbers in float64. Every
# partial sum of a dot product is then a whole number below 2^53, so nothing is rounded: the score depends on
# its two rows alone, not on block size, position, threads or device, and equal rows tie exactly. The grid
# moves a score by about 4e-9, a float32 product by about 1e-7.
GRID = 2.0**26


class Rows:
    """Embeddings read block by block as whole numbers on the grid; checked once, copied never as a whole.

    Args:
        embeddings: `(rows, dim)` real numbers, numpy (memory-mapped, too) or torch on any device.
        name: What they are, for messages.
        block: Rows of a block.

    Raises:
        ValueError: Not two dimensions, an empty side, NaN, infinity or a row of zeros.
        TypeError: Not real numbers.
    """

    def __init__(self, embeddings: Any, name: str, block: int):
        if block < 1:
            raise ValueError(f"block must be at least 1 row, got {block}")
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


def same_width(first: Rows, second: Rows) -> None:
    """Make sure that two sides can be multiplied.

    Raises:
        ValueError: They have different widths.
    """
    if first.dim != second.dim:
        raise ValueError(
            f"{first.name} have {first.dim} dimensions, {second.name} {second.dim}: "
            "expected both from the same model"
        )


def exact_scores(
    first: Rows, second: Rows, first_rows: torch.Tensor, second_rows: torch.Tensor
) -> torch.Tensor:
    """Exact scores of chosen pairs, in units of 2^-52.

    Args:
        first: One side.
        second: The other side.
        first_rows: int64 `(n,)`.
        second_rows: int64 `(n,)`.

    Returns:
        float64 `(n,)` whole numbers.
    """
    result = torch.empty(len(first_rows), dtype=torch.float64, device=first.device)
    for start in range(0, len(first_rows), first.block):
        part = slice(start, start + first.block)
        result[part] = (first.take(first_rows[part]) * second.take(second_rows[part])).sum(1)
    return result


def rough(rows: torch.Tensor) -> torch.Tensor:
    """Rows on the grid as float32 unit rows."""
    return (rows * (1 / GRID)).float()


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
