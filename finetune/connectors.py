"""Connectors: from the image tower's tokens to what the language model sees of a picture.

A connector is one configuration and one `Connector` module. Those of this file put the picture into the sequence, as a
prefix in the language model's embedding space; `finetune.cross_attention` lets its layers look at the picture instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from finetune.recipe_model import CrossAttention, Linear, Mlp, Resampler


class Connector(nn.Module):
    """What all connectors have: `(b, n, token_dim)` becomes `(b, p, width)`, for the sequence or for the layers.

    Attributes:
        length: Positions that a picture takes in the sequence.
    """

    length: int

    def prefix(self, seen: Tensor) -> Tensor:
        """What of a picture stands in the sequence: `(b, p, width)` to `(b, length, width)`."""
        return seen

    def look(self, seen: Tensor | None, owner: Tensor | None = None) -> None:
        """Tell layers that look at pictures which ones are meant from now on; None for no picture any more.

        Args:
            seen: Of each row all its pictures side by side, `(rows, pictures * p, width)`.
            owner: int64 `(rows, length)`, the picture that each position looks at, counted from 1, 0 for none; the last
                one's holds for what follows. None: the only picture everywhere.
        """

    def detach(self) -> None:
        """Let go of the language model, which another connector will be attached to."""


class Projection(Connector):
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


class Resampling(Connector):
    """Learnt queries that look at the image tokens and at each other, layer by layer.

    Args:
        config: Queries, width, layers and heads.
        grid: Rows and columns of the image tokens.
        token_dim: Width of an image token.
        width: Width of what comes out.

    Reference:
        Jaegle et al. 2021 (Perceiver), Alayrac et al. 2022 (Flamingo's resampler), Li et al. 2023 (Q-Former). Tokens
        get learnt positions of their own, since towers differ in whether their last tokens still hold theirs.
    """

    def __init__(self, config: Resampler, *, grid: tuple[int, int], token_dim: int, width: int):
        super().__init__()
        self.length, inner = config.queries, config.width
        self.norm = nn.LayerNorm(token_dim)
        self.input = nn.Linear(token_dim, inner)
        self.places = nn.Parameter(torch.randn(grid[0] * grid[1], inner) * 0.02)
        self.queries = nn.Parameter(torch.randn(config.queries, inner) * inner**-0.5)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                inner,
                config.heads,
                4 * inner,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.output = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Float `(b, n, token_dim)` to `(b, queries, width)`."""
        memory = self.input(self.norm(tokens)) + self.places
        found = self.queries.expand(len(tokens), -1, -1)
        for layer in self.layers:
            found = layer(found, memory)
        return self.output(found)


def build_connector(
    config: Linear | Mlp | Resampler | CrossAttention,
    *,
    grid: tuple[int, int],
    token_dim: int,
    width: int,
    language_model: Any = None,
) -> Connector:
    """The module that a recipe's `connector` describes.

    Args:
        config: Its configuration.
        grid: Rows and columns of the image tokens.
        token_dim: Width of an image token.
        width: Width of the language model's embeddings.
        language_model: Whose layers a `cross_attention` stands between.

    Raises:
        ValueError: It does not fit the tokens or the language model.
    """
    if isinstance(config, CrossAttention):
        from finetune.cross_attention import Looking

        return Looking(config, grid=grid, token_dim=token_dim, width=width, language_model=language_model)
    kind = Resampling if isinstance(config, Resampler) else Projection
    return kind(config, grid=grid, token_dim=token_dim, width=width)  # pyright: ignore
