"""What heads over tokens begin with: tokens of both towers at one width, and those of the picture with their places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]  # rows and columns of image tokens


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


def channel_scale(features: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What to subtract from each channel, and to multiply it with, for mean 0 and deviation 1 over some samples.

    Args:
        features: float `(samples, n, d)`.
        rows: Those that count.

    Returns:
        Mean and scale, float64 `(d,)`; the scale of a channel that never changes is 0.
    """
    total, squares = torch.zeros(2, features.shape[-1], dtype=torch.float64)
    count = 0
    # A part at a time: all in float64 would be twice the memory.
    for part in torch.as_tensor(list(rows)).split(1024):
        values = features[part].double().flatten(0, 1)
        total += values.sum(0)
        squares += values.square().sum(0)
        count += len(values)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    changes = deviation > 1e-6 * mean.abs().clamp(min=1)
    return mean, torch.where(changes, 1 / deviation, 0.0)


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


def layer(width: int, heads: int) -> nn.TransformerEncoderLayer:
    """A transformer layer that norms first, without dropout: modality dropout regularises already."""
    return nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
