"""Fusion heads: from image and text features to one vector.

A head is a module `(image (p, n, d_i), text (b, m, d_t), text_seen (b, m), picture_of (b,)) -> (b, head.width)`; for
pooled heads m and n are 1. A picture stands in `image` once, however many texts it has: `picture_of` is each text's.
Features may differ in scale by orders of magnitude between towers, so each head norms its inputs first, but for image
features that have been standardised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune.fusion.inputs import Grid, Inputs, layer
from finetune.fusion.looking import CrossAttentionFusion
from finetune.fusion.recipe import CoAttention, Fusion, Pooled, SingleStream


class PooledFusion(nn.Module):
    """Late fusion of two vectors.

    Args:
        config: Its kind and width.
        image_dim: Width of the image features.
        text_dim: Width of the text features.
        norm_image: Norm the image features.
        grid: Rows and columns of image tokens: one of each here.

    Reference:
        `gated`: Arevalo et al. 2017, Gated Multimodal Units. `product`: Kim et al. 2017, low-rank bilinear pooling.
    """

    def __init__(self, config: Pooled, *, image_dim: int, text_dim: int, norm_image: bool, grid: Grid):
        super().__init__()
        self.kind, self.width = config.kind, config.width
        self.image_norm = nn.LayerNorm(image_dim) if norm_image else nn.Identity()
        self.text_norm = nn.LayerNorm(text_dim)
        if config.kind == "concat":
            self.both = nn.Linear(image_dim + text_dim, config.width)
        else:
            self.image = nn.Linear(image_dim, config.width)
            self.text = nn.Linear(text_dim, config.width, bias=config.kind != "tanh")
        if config.kind == "gated":
            self.gate = nn.Linear(image_dim + text_dim, config.width)

    def forward(self, image: Tensor, text: Tensor, text_seen: Tensor, picture_of: Tensor) -> Tensor:
        """`(p, 1, d_i)` and `(b, 1, d_t)` to `(b, width)`."""
        x, y = self.image_norm(image[:, 0]).index_select(0, picture_of), self.text_norm(text[:, 0])
        if self.kind == "concat":
            return nn.functional.gelu(self.both(torch.cat([x, y], dim=-1)))
        if self.kind == "tanh":
            return torch.tanh(self.image(x) + self.text(y))
        if self.kind == "product":
            return torch.tanh(self.image(x)) * torch.tanh(self.text(y))
        gate = torch.sigmoid(self.gate(torch.cat([x, y], dim=-1)))
        return gate * torch.tanh(self.image(x)) + (1 - gate) * torch.tanh(self.text(y))


class SingleStreamFusion(nn.Module):
    """One transformer over a class token, image tokens and text tokens.

    Reference:
        Li et al. 2019 (VisualBERT), Kim et al. 2021 (ViLT).
    """

    def __init__(self, config: SingleStream, *, image_dim: int, text_dim: int, norm_image: bool, grid: Grid):
        super().__init__()
        self.width = config.width
        self.inputs = Inputs(
            config.width, image_dim=image_dim, text_dim=text_dim, norm_image=norm_image, grid=grid
        )
        self.start = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.layers = nn.ModuleList(layer(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, image: Tensor, text: Tensor, text_seen: Tensor, picture_of: Tensor) -> Tensor:
        """`(p, n, d_i)` and `(b, m, d_t)` to `(b, width)`."""
        x, y = self.inputs(image, text)
        x = x.index_select(0, picture_of)
        row = torch.cat([self.start.expand(len(y), -1, -1), x, y], dim=1)  # (b, 1 + n + m, width)
        unseen = torch.cat([text_seen.new_zeros(len(y), 1 + x.shape[1]), ~text_seen], dim=1)
        for block in self.layers:
            row = block(row, src_key_padding_mask=unseen)
        return self.norm(row[:, 0])


class CoAttentionFusion(nn.Module):
    """Image tokens that look at the text and text tokens that look at the picture, in turns with their own layers.

    Reference:
        Lu et al. 2019 (ViLBERT), Tan and Bansal 2019 (LXMERT).
    """

    def __init__(self, config: CoAttention, *, image_dim: int, text_dim: int, norm_image: bool, grid: Grid):
        super().__init__()
        width, heads = config.width, config.heads
        self.width = 2 * width
        self.inputs = Inputs(width, image_dim=image_dim, text_dim=text_dim, norm_image=norm_image, grid=grid)
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.LayerNorm(width) for _ in range(2)) for _ in range(config.layers)
        )
        self.cross = nn.ModuleList(
            nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2))
            for _ in range(config.layers)
        )
        self.own = nn.ModuleList(
            nn.ModuleList(layer(width, heads) for _ in range(2)) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, image: Tensor, text: Tensor, text_seen: Tensor, picture_of: Tensor) -> Tensor:
        """`(p, n, d_i)` and `(b, m, d_t)` to `(b, 2 * width)`."""
        x, y = self.inputs(image, text)
        x = x.index_select(0, picture_of)
        unseen = ~text_seen
        for norms, cross, own in zip(self.norms, self.cross, self.own, strict=True):
            nx, ny = norms[0](x), norms[1](y)  # pyright: ignore
            seen_text = cross[0](nx, ny, ny, key_padding_mask=unseen, need_weights=False)[0]  # pyright: ignore
            seen_image = cross[1](ny, nx, nx, need_weights=False)[0]  # pyright: ignore
            x = own[0](x + seen_text)  # pyright: ignore
            y = own[1](y + seen_image, src_key_padding_mask=unseen)  # pyright: ignore
        weight = text_seen.to(y.dtype).unsqueeze(-1)
        words = (y * weight).sum(dim=1) / weight.sum(dim=1)
        return self.norm(torch.cat([x.mean(dim=1), words], dim=-1))


HEADS: dict[str, Any] = {
    "tanh": PooledFusion,
    "concat": PooledFusion,
    "gated": PooledFusion,
    "product": PooledFusion,
    "single_stream": SingleStreamFusion,
    "co_attention": CoAttentionFusion,
    "cross_attention": CrossAttentionFusion,
}


def build_head(
    config: Fusion, *, image_dim: int, text_dim: int, norm_image: bool = True, grid: Grid = (1, 1)
) -> Any:
    """The module that a recipe's `task.fusion` describes, for image tokens of a grid, row by row."""
    return HEADS[config.kind](
        config, image_dim=image_dim, text_dim=text_dim, norm_image=norm_image, grid=grid
    )
