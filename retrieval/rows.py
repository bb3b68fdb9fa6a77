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
        # float64 has room for the squares of whatever these types hold.
        narrow = kind in ("float32", "float16", "bfloat16")
        for part in self.parts():
            self.norms[part] = row_norms(self.read(part), scaled=not narrow)
        if not torch.isfinite(self.norms).all():
            row = int((~torch.isfinite(self.norms)).nonzero()[0])
            raise ValueError(
                f"{name}: row {row} has NaN or infinite values; a ranking of it would mean nothing. "
                "Look for an overflow in the model (half precision?) or a damaged checkpoint."
            )
        if not self.norms.all():
            row = int((self.norms == 0).nonzero()[0])
            raise ValueError(f"{name}: row {row} is all zeros and has no direction")
        # Lengths that a float32 and its reciprocal hold.
        usual = bool((self.norms > 1e-30).all() and (self.norms < 1e30).all())
        self.lengths = (1 / self.norms).float() if narrow and usual else None

    def __len__(self) -> int:
        return self.rows

    def parts(self) -> list[slice]:
        return [slice(start, min(start + self.block, self.rows)) for start in range(0, self.rows, self.block)]

    def read(self, which: slice | torch.Tensor) -> torch.Tensor:
        """A float64 copy of some rows, as they are."""
        if isinstance(self.source, torch.Tensor):
            return self.source[which].detach().to(torch.float64, copy=True)
        index = which if isinstance(which, slice) else which.cpu().numpy()
        return torch.from_numpy(np.array(self.source[index], dtype=np.float64))

    def take(self, which: slice | torch.Tensor) -> torch.Tensor:
        """Unit rows as whole multiples of 2^-26, float64."""
        # Divided, since the reciprocal of a tiny length is infinite.
        return self.read(which).div_(self.norms[which, None]).mul_(GRID).round_()

    def rough(self, which: slice) -> torch.Tensor:
        """Unit rows in float32, each value within two roundings: what a first look at the scores takes."""
        if self.lengths is None:
            return (self.take(which) * (1 / GRID)).float()
        lengths = self.lengths[which, None]
        if isinstance(self.source, torch.Tensor):
            return self.source[which].detach().float() * lengths
        return torch.from_numpy(np.multiply(self.source[which], lengths.numpy()))


def same_width(first: Rows, second: Rows) -> None:
    """Make sure that two sides can be multiplied.

    Raises:
        ValueError: They have different widths, or are on different devices.
    """
    if first.dim != second.dim:
        raise ValueError(
            f"{first.name} have {first.dim} dimensions, {second.name} {second.dim}: "
            "expected both from the same model"
        )
    if first.device != second.device:
        raise ValueError(
            f"{first.name} are on {first.device}, {second.name} on {second.device}: expected both on one device"
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


def row_norms(rows: torch.Tensor, *, scaled: bool = True) -> torch.Tensor:
    """Euclidean norms by folding halves onto each other: elementwise steps, so equal rows give equal bits.

    A library's reduction may add in another order at another place in memory.

    Args:
        rows: float64 `(n, dim)`; may be overwritten.
        scaled: Keep the squares of huge and tiny rows within float64's range, by powers of two: where none is needed
            the result is the same to the last bit.
    """
    scale = None
    if scaled:
        largest = rows.abs().amax(1)
        power = largest / (2 * torch.frexp(largest).mantissa)  # exactly
        scale = torch.where((largest > 0) & torch.isfinite(largest), power, 1.0)
        rows = rows / scale[:, None]
    squares = rows.square_()
    while (width := squares.shape[1]) > 1:
        half = width // 2
        folded = squares[:, :half] + squares[:, half : 2 * half]
        # An odd width keeps its last column.
        squares = torch.cat([folded, squares[:, 2 * half :]], 1) if width % 2 else folded
    norms = squares[:, 0].sqrt()
    return norms if scale is None else norms * scale


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
