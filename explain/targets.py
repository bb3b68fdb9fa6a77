"""What is to be explained: a score of a picture, by way of the image tower's features."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.encoder import Encoder

BATCH = 128  # versions of pictures that are scored at a time


class Target(Protocol):
    """A score for each picture of a batch, differentiable as far as the pixels.

    Attributes:
        encoder: Whose image tower sees.
        reads: What of it: `pooled` (the embedding) or `tokens`.
    """

    encoder: Encoder
    reads: Literal["pooled", "tokens"]

    def see(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `(b, 3, h, w)` to features, `(b, d)` or `(b, n, d)`."""
        ...

    def score_of(self, features: Tensor, of: Tensor) -> Tensor:
        """Features to scores `(b,)`; `of` int64 `(b,)` is the picture of the target that each is a version of."""
        ...


class PairTarget:
    """The cosine of pictures and texts.

    Args:
        encoder: The dual encoder.
        rows: Unit rows of the texts, `(n, d)`, one for each picture.
    """

    reads: Literal["pooled", "tokens"] = "pooled"

    def __init__(self, encoder: Encoder, rows: Tensor):
        self.encoder, self.rows = encoder, rows

    def see(self, pixels: Tensor) -> Tensor:
        return self.encoder.model.encode_image(pixels)

    def score_of(self, features: Tensor, of: Tensor) -> Tensor:
        return (F.normalize(features.float(), dim=-1) * self.rows[of]).sum(-1)


def score(target: Target, pixels: Tensor, of: Tensor | None = None) -> Tensor:
    """Scores `(b,)` of normalised pixels `(b, 3, h, w)`; see `Target.score_of` for `of`, in order when None."""
    of = torch.arange(len(pixels), device=pixels.device) if of is None else of
    return target.score_of(target.see(pixels), of)


@torch.no_grad()
def versions_scored(target: Target, pixels: Tensor, keep: Tensor, fill: Tensor) -> Tensor:
    """Score versions of pictures in which a part is replaced.

    Args:
        target: With one entry for each picture.
        pixels: Normalised, `(n, 3, h, w)`.
        keep: What stays, 0 to 1, `(m, h, w)` for all pictures or `(n, m, h, w)`.
        fill: What comes in its place, `(n, 3, h, w)` or broadcast to it.

    Returns:
        float `(n, m)` on the CPU.
    """
    fill = fill.expand_as(pixels)
    count = keep.shape[-3]
    number = torch.arange(len(pixels) * count)
    found = []
    for part in number.split(BATCH):
        of, which = part // count, part % count
        mask = (keep[which] if keep.ndim == 3 else keep[of, which]).to(pixels.device)[:, None]
        of = of.to(pixels.device)
        found.append(score(target, pixels[of] * mask + fill[of] * (1 - mask), of).float().cpu())
    return torch.cat(found).view(len(pixels), count)


def mean_colour(pixels: Tensor) -> Tensor:
    """Each picture's mean colour, `(n, 3, 1, 1)`: what stands for "nothing there"."""
    return pixels.mean((2, 3), keepdim=True)
