"""Fusion heads: from image and text features to one vector.

A head is a module `(image (p, n, d_i), text (b, m, d_t), text_seen (b, m), picture_of (b,)) -> (b, head.width)`; for
pooled heads m and n are 1. A picture stands in `image` once, however many texts it has: `picture_of` is each text's.
Features may differ in scale by orders of magnitude between towers, so each head norms its inputs first, but for image
features that have been standardised.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.fusion.recipe import CoAttention, CrossAttention, Fusion, Pooled, SingleStream

Grid = tuple[int, int]  # rows and columns of image tokens


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


class Inputs(nn.Module):
    """Tokens of both towers to one width, each marked with where it comes from, those of the picture with their place.

    A convolution's tokens know it only from the padding at the edges; "left of" is then hardly learnt.
    """

    def __init__(self, width: int, *, image_dim: int, text_dim: int, norm_image: bool, grid: Grid):
        super().__init__()
        norm = nn.LayerNorm(image_dim) if norm_image else nn.Identity()
        self.image = nn.Sequential(norm, nn.Linear(image_dim, width))
        self.text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.origin = nn.Parameter(torch.randn(2, width) * 0.02)
        self.places = nn.Parameter(0.7 * waves(grid, width))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """`(p, n, d_i)` and `(b, m, d_t)` to `(p, n, width)` and `(b, m, width)`."""
        return self.image(image) + self.places + self.origin[0], self.text(text) + self.origin[1]


def token_grid(count: int, size: tuple[int, int]) -> Grid:
    """Rows and columns of so many image tokens of pictures of a size; one row where they are no grid of that shape."""
    rows = max(1, round((count * size[0] / size[1]) ** 0.5))
    return (rows, count // rows) if count % rows == 0 else (1, count)


def waves(grid: Grid, width: int) -> Tensor:
    """What the places of a grid begin with: float `(rows * columns, width)`, from -1 to 1.

    Half of the channels are sines and cosines of the row, half of the column, at wavelengths from 6 to 600 tokens, so
    that near places are alike.

    Reference:
        Vaswani et al. 2017, section 3.5, for each axis, with 100 in place of 10,000: pictures have fewer places.
    """
    quarter = width // 4
    rates = 100 ** -(torch.arange(quarter) / quarter)
    rows, columns = (torch.arange(count)[:, None] * rates for count in grid)
    axes = [torch.cat([angle.sin(), angle.cos()], dim=1) for angle in (rows, columns)]  # (count, 2 * quarter)
    down, across = axes[0].repeat_interleave(grid[1], dim=0), axes[1].repeat(grid[0], 1)
    return F.pad(torch.cat([down, across], dim=1), (0, width - 4 * quarter))


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


class CrossAttentionFusion(nn.Module):
    """A class token and text tokens that look at the picture, whose own tokens are computed once for all its texts.

    With several questions a picture a step costs a fraction of what it does in `SingleStreamFusion`, where the tokens
    of the picture, several times as many as a text's, go through all layers with each of them.

    Reference:
        Li et al. 2021 (ALBEF) and 2022 (BLIP), the image-grounded text encoder.
    """

    def __init__(
        self, config: CrossAttention, *, image_dim: int, text_dim: int, norm_image: bool, grid: Grid
    ):
        super().__init__()
        width, heads = config.width, config.heads
        self.width = width
        self.inputs = Inputs(width, image_dim=image_dim, text_dim=text_dim, norm_image=norm_image, grid=grid)
        self.start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.picture = nn.Sequential(layer(width, heads), nn.LayerNorm(width))
        self.looks = nn.ModuleList(Look(width, heads) for _ in range(config.layers))
        self.layers = nn.ModuleList(layer(width, heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, text: Tensor, text_seen: Tensor, picture_of: Tensor) -> Tensor:
        """`(p, n, d_i)` and `(b, m, d_t)` to `(b, width)`."""
        x, y = self.inputs(image, text)
        x = self.picture(x)
        y = torch.cat([self.start.expand(len(y), -1, -1), y], dim=1)  # (b, 1 + m, width)
        unseen = F.pad(~text_seen, (1, 0))
        for look, block in zip(self.looks, self.layers, strict=True):
            y = block(y + look(y, x, picture_of), src_key_padding_mask=unseen)
        return self.norm(y[:, 0])


class Look(nn.Module):
    """Attention of texts to the tokens of their pictures, of which each picture's are projected once.

    Beside the tokens there is a place without content. Attention is a mean, in which one cow and four cows look the
    same; next to an empty place, four cows have a larger share.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.empty = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, text: Tensor, picture: Tensor, picture_of: Tensor) -> Tensor:
        """`(b, m, width)` and `(p, n, width)` to what the texts have seen, `(b, m, width)`."""
        key = torch.cat([self.key(picture), self.empty.expand(len(picture), -1, -1)], dim=1)
        value = F.pad(self.value(picture), (0, 0, 0, 1))
        query, key, value = (
            rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for rows in (self.query(self.norm(text)), key, value)
        )  # (rows, heads, tokens, width of a head)
        seen = F.scaled_dot_product_attention(
            query, key.index_select(0, picture_of), value.index_select(0, picture_of)
        )
        return self.out(seen.transpose(1, 2).flatten(2))


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


def layer(width: int, heads: int) -> nn.TransformerEncoderLayer:
    """A transformer layer that norms first, without dropout: modality dropout regularises already."""
    return nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


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
