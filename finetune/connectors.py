"""Connectors: from the image tower's tokens to a prefix in the language model's embedding space.

A connector is one function of the configuration and one module `(b, n, token_dim) -> (b, p, width)` with the
attribute `length` (p).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from finetune.recipe import Linear, Mlp


class Projection(nn.Module):
    """Layer norm, merging of neighbours, and one or two layers.

    Args:
        config: `Linear` or `Mlp`.
        grid: Rows and columns of the image tokens.
        token_dim: Width of an image token.
        width: Width of the language model's embeddings.

    Raises:
        ValueError: `merge` does not divide the grid.
    """

    def __init__(self, config: Linear | Mlp, *, grid: tuple[int, int], token_dim: int, width: int):
        super().__init__()
        rows, columns = grid
        if rows % config.merge or columns % config.merge:
            raise ValueError(
                f"connector.merge {config.merge} does not divide the image tower's {rows} x {columns} tokens"
            )
        self.grid, self.merge = grid, config.merge
        self.length = rows * columns // config.merge**2
        merged = token_dim * config.merge**2
        self.norm = nn.LayerNorm(token_dim)  # towers differ in scale by orders of magnitude
        self.layers = (
            nn.Linear(merged, width)
            if config.kind == "linear"
            else nn.Sequential(nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Float `(b, rows * columns, token_dim)` to `(b, length, width)`."""
        return self.layers(merge_neighbours(self.norm(tokens), self.grid, self.merge))


def merge_neighbours(tokens: Tensor, grid: tuple[int, int], merge: int) -> Tensor:
    """Put merge x merge neighbouring tokens side by side into one: `(b, n, d)` to `(b, n / m^2, m^2 d)`."""
    if merge == 1:
        return tokens
    rows, columns = grid
    batch, _, dim = tokens.shape
    blocks = tokens.reshape(batch, rows // merge, merge, columns // merge, merge, dim)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, merge * merge * dim)


def token_grid(count: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tower's tokens, from their number and the picture's shape.

    Tokens that are no grid (a class token among them, for instance) count as one row.
    """
    rows = round(math.sqrt(count * image_size[0] / image_size[1]))
    return (rows, count // rows) if rows and count % rows == 0 else (1, count)


CONNECTORS: dict[str, Any] = {"linear": Projection, "mlp": Projection}


def build_connector(config: Linear | Mlp, *, grid: tuple[int, int], token_dim: int, width: int) -> nn.Module:
    """The module that a recipe's `connector` describes."""
    return CONNECTORS[config.kind](config, grid=grid, token_dim=token_dim, width=width)
