"""Contrastive losses block by block: what is done with one rectangle of logits while it is in the cache.

Each function takes the rows of one side and the columns of the other, goes through their logits in blocks of
`tile` and adds what it finds to tensors of the caller. Nothing of the size rows x columns is ever held. `first`
is the column that is row 0's own pair, None where no pair of these rows is among these columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tile = tuple[int, int]
# Sides of a block when the caller leaves the choice to us. On a CPU two blocks fit the second-level cache's
# neighbourhood and matrix products run at full speed; a GPU wants more work per kernel.
CPU_TILE: Tile = (1024, 1024)
GPU_TILE: Tile = (4096, 8192)


def block_sides(tile: int | None, device: torch.device) -> Tile:
    """Rows and columns of a block.

    Raises:
        ValueError: A side below 1.
    """
    if tile is None:
        return CPU_TILE if device.type == "cpu" else GPU_TILE
    if tile < 1:
        raise ValueError(f"expected a tile of at least 1 row, or None to leave the choice to us, got {tile}")
    return tile, tile


class Block(NamedTuple):
    """One rectangle of the logits."""

    rows: slice
    columns: slice
    scaled: Tensor
    """The block's rows times the scale, `(r, d)`."""
    logits: Tensor
    """`(r, c)`; the caller may overwrite it."""
    spare: Tensor
    """Room for another `(r, c)`."""
    own: int | None
    """The diagonal of the logits on which pairs lie, as `Tensor.diagonal` counts; None where there is none."""


def blocks(rows: Tensor, columns: Tensor, scale: Tensor, first: int | None, tile: Tile) -> Iterator[Block]:
    """Go through `scale * rows @ columns.T` in blocks; one block is valid until the next is asked for."""
    height, width = min(tile[0], len(rows)), min(tile[1], len(columns))
    room = rows.new_empty(2, height * width)
    for top in range(0, len(rows), height):
        across = slice(top, min(top + height, len(rows)))
        scaled = rows[across] * scale  # (r, d)
        for left in range(0, len(columns), width):
            down = slice(left, min(left + width, len(columns)))
            shape = (across.stop - top, down.stop - left)
            logits, spare = (part[: shape[0] * shape[1]].view(shape) for part in room)
            torch.mm(scaled, columns[down].T, out=logits)
            own = None if first is None else top + first - left
            if own is not None and not -shape[0] < own < shape[1]:
                own = None
            yield Block(across, down, scaled, logits, spare, own)


def no_sums(like: Tensor) -> Tensor:
    """An empty log-sum-exp for each row of `like`: `(n, 2)` with a running maximum and a sum of exponentials."""
    state = like.new_zeros(len(like), 2)
    state[:, 0] = -torch.inf
    return state


def log_sums(state: Tensor) -> Tensor:
    """The finished log-sum-exp `(n,)` of a state."""
    return state[:, 0] + state[:, 1].log()


def add_log_sums(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_state: Tensor,
    column_state: Tensor,
    own: Tensor,
    first: int | None,
    tile: Tile,
) -> None:
    """Fold the logits into the log-sum-exp of rows and of columns: one matrix product for both.

    The shift is the maximum so far of each row and each column. A shift that is fixed beforehand is no
    alternative: at scale 100, exp overflows or all of a row underflows in float32.

    Args:
        rows: `(n, d)`.
        columns: `(m, d)`.
        scale: Scalar.
        row_state: `(n, 2)`, changed in place; see `no_sums`.
        column_state: `(m, 2)`, changed in place.
        own: `(n,)`, gets the logits of the pairs met.
        first: The column of row 0's pair.
        tile: Sides of a block.
    """
    for block in blocks(rows, columns, scale, first, tile):
        if block.own is not None:
            # From the same product as the sums, so that rounding cancels in their difference.
            found = block.logits.diagonal(block.own)
            start = block.rows.start + max(-block.own, 0)
            own[start : start + len(found)] = found
        fold(block.logits, block.spare, row_state[block.rows], 1)
        fold(block.logits, block.logits, column_state[block.columns], 0)


def fold(logits: Tensor, room: Tensor, state: Tensor, dim: int) -> None:
    """Add the exponentials along one dimension to a state."""
    high = torch.maximum(logits.amax(dim), state[:, 0])
    torch.sub(logits, high.unsqueeze(dim), out=room).exp_()
    state[:, 1] = state[:, 1] * (state[:, 0] - high).exp() + room.sum(dim)
    state[:, 0] = high


def add_info_nce_gradients(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_state: Tensor,
    column_state: Tensor,
    row_gradient: Tensor,
    column_gradient: Tensor,
    first: int | None,
    tile: Tile,
) -> None:
    """Recompute the logits and add the gradient of sum_i (lse_j z_ij + lse_j z_ji - 2 z_ii).

    The probabilities of both directions come from one block, so that each side costs one more matrix product.

    Args:
        rows: `(n, d)`.
        columns: `(m, d)`.
        scale: Scalar.
        row_state: Finished `(n, 2)` of `add_log_sums`.
        column_state: Finished `(m, 2)`.
        row_gradient: `(n, d)`, gets the gradient divided by the scale.
        column_gradient: `(m, d)`, gets the gradient.
        first: The column of row 0's pair.
        tile: Sides of a block.
    """
    row_share, column_share = 1 / row_state[:, 1], 1 / column_state[:, 1]
    row_high, column_high = row_state[:, 0].contiguous(), column_state[:, 0].contiguous()
    for block in blocks(rows, columns, scale, first, tile):
        gradient = torch.sub(block.logits, row_high[block.rows, None], out=block.spare)
        gradient.exp_().mul_(row_share[block.rows, None])
        other = block.logits.sub_(column_high[block.columns]).exp_()
        gradient.addcmul_(other, column_share[block.columns].expand_as(other))
        if block.own is not None:
            gradient.diagonal(block.own).sub_(2)
        row_gradient[block.rows].addmm_(gradient, columns[block.columns])
        column_gradient[block.columns].addmm_(gradient.T, block.scaled)


def add_sigmoid(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    totals: Tensor,
    row_gradient: Tensor | None,
    column_gradient: Tensor | None,
    first: int | None,
    tile: Tile,
) -> None:
    """Add -sum_ij log sigmoid(y_ij (z_ij + bias)), y = 1 for pairs and -1 else, and its gradient.

    Args:
        rows: `(n, d)`.
        columns: `(m, d)`.
        scale: Scalar.
        bias: Scalar.
        totals: float64 `(2,)`, gets the loss and its gradient by the bias.
        row_gradient: `(n, d)`, gets the gradient divided by the scale; None to leave gradients out.
        column_gradient: `(m, d)`, gets the gradient.
        first: The column of row 0's pair.
        tile: Sides of a block.
    """
    for block in blocks(rows, columns, scale, first, tile):
        wrong = block.logits.add_(bias)  # what should be very negative: -y z
        if block.own is not None:
            wrong.diagonal(block.own).neg_()
        if row_gradient is not None and column_gradient is not None:
            gradient = torch.sigmoid(wrong, out=block.spare)
            if block.own is not None:
                gradient.diagonal(block.own).neg_()
            totals[1] += gradient.sum(dtype=torch.float64)
            row_gradient[block.rows].addmm_(gradient, columns[block.columns])
            column_gradient[block.columns].addmm_(gradient.T, block.scaled)
        # Not softplus, which cuts at 20 and has nine digits there.
        totals[0] -= F.logsigmoid(wrong.neg_()).sum(dtype=torch.float64)
