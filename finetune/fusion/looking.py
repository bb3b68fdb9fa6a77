"""The fusion head whose words look at the picture in each layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.fusion.inputs import Grid, Inputs, layer
from finetune.fusion.recipe import CrossAttention
from pretrain.short_texts import groups_of_like_length

Keys = tuple[Tensor, Tensor]  # keys and values, `(rows, heads, tokens, width of a head)`


class CrossAttentionFusion(nn.Module):
    """A class token and text tokens that look at the picture, whose own tokens are computed once for all its texts.

    With several questions a picture a step costs a fraction of what it does in `SingleStreamFusion`, where the tokens
    of the picture, several times as many as a text's, go through all layers with each of them. Nothing is spent on
    padding, nor on what the last layer would make of any token but the one that is read.

    Reference:
        Li et al. 2021 (ALBEF) and 2022 (BLIP), the image-grounded text encoder; Shazeer 2020 for the gated layers,
        which learn relations in fewer steps than plain ones (docs/LOG.md).
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
        self.layers = nn.ModuleList(LookingLayer(width, heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, text: Tensor, text_seen: Tensor, picture_of: Tensor) -> Tensor:
        """`(p, n, d_i)` and `(b, m, d_t)` to `(b, width)`."""
        x, y = self.inputs(image, text)
        x = self.picture(x)
        pictures = [step.look.keys(x) for step in self.layers]  # pyright: ignore
        y = torch.cat([self.start.expand(len(y), -1, -1), y], dim=1)  # (b, 1 + m, width)
        seen = F.pad(text_seen, (1, 0), value=True)
        read, order = [], []
        for rows, length in groups_of_like_length(seen):
            z, own = y.index_select(0, rows)[:, :length], picture_of[rows]
            mask = seen[rows, None, None, :length]
            for step, picture in zip(self.layers, pictures, strict=True):
                z = step(z, mask, picture, own, only_first=step is self.layers[-1])
            read.append(z[:, 0])
            order.append(rows)
        return self.norm(torch.cat(read).index_select(0, torch.cat(order).argsort()))


class LookingLayer(nn.Module):
    """Attention among the tokens of a text, then to its picture, then a gated layer for each token.

    A gated layer multiplies two views of what a token holds, of words and picture by then: whether they agree is a
    product, which plain layers approximate.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.look_norm, self.look = nn.LayerNorm(width), Look(width, heads)
        self.gated_norm, self.wide, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 6 * width),
            nn.Linear(3 * width, width),
        )

    def forward(
        self, text: Tensor, seen: Tensor, picture: Keys, picture_of: Tensor, *, only_first: bool
    ) -> Tensor:
        """`(b, m, width)` to the same, or to `(b, 1, width)`.

        Args:
            text: Tokens.
            seen: bool `(b, 1, 1, m)`.
            picture: `look.keys` of the pictures.
            picture_of: int64 `(b,)`, each text's.
            only_first: Compute the first token alone.
        """
        normed = self.norm(text)
        keys = self.attention.keys(normed)
        if only_first:
            text, normed = text[:, :1], normed[:, :1]
        text = text + self.attention(normed, keys, seen)
        key, value = (rows.index_select(0, picture_of) for rows in picture)
        text = text + self.look(self.look_norm(text), (key, value))
        gate, content = self.wide(self.gated_norm(text)).chunk(2, dim=-1)
        return text + self.narrow(F.gelu(gate) * content)


class Attention(nn.Module):
    """Attention whose keys and values are projected apart, once for all that look at them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)

    def keys(self, tokens: Tensor) -> Keys:
        """`(rows, n, width)` to keys and values."""
        return self.split(self.key(tokens)), self.split(self.value(tokens))

    def split(self, tokens: Tensor) -> Tensor:
        """`(rows, n, width)` to `(rows, heads, n, width / heads)`."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, tokens: Tensor, keys: Keys, seen: Tensor | None = None) -> Tensor:
        """`(b, m, width)` to what they have seen, `(b, m, width)`; `seen` is bool, broadcast to `(b, heads, m, n)`."""
        found = F.scaled_dot_product_attention(self.split(self.query(tokens)), *keys, attn_mask=seen)
        return self.out(found.transpose(1, 2).flatten(2))


class Look(Attention):
    """Attention of texts to the tokens of their pictures.

    Beside the tokens there is a place without content. Attention is a mean, in which one cow and four cows look the
    same; next to an empty place, four cows have a larger share.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.empty = nn.Parameter(torch.zeros(1, 1, width))

    def keys(self, tokens: Tensor) -> Keys:
        key = torch.cat([self.key(tokens), self.empty.expand(len(tokens), -1, -1)], dim=1)
        return self.split(key), self.split(F.pad(self.value(tokens), (0, 0, 0, 1)))
