"""Is a heatmap true? Measures of maps against masks, against each other, and against the model; all pure functions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from explain.targets import Target, mean_colour, versions_scored


def target_over_distractor(heat: Tensor, target: Tensor, distractor: Tensor) -> Tensor:
    """Whether a map is hotter on what the text names than on what it does not name, by mean heat.

    Args:
        heat: float `(n, h, w)`, in the size of the masks.
        target: bool `(n, h, w)`, the named objects.
        distractor: bool `(n, h, w)`, other objects of the picture.

    Returns:
        float `(n,)`: 1, 0, or 0.5 for a tie (chance is 0.5).
    """

    def mean(mask: Tensor) -> Tensor:
        return (heat.double() * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)

    ours, theirs = mean(target), mean(distractor)
    return (ours > theirs).double() + 0.5 * (ours == theirs).double()


def pointing(heat: Tensor, boxes: Tensor) -> Tensor:
    """The pointing game: whether the hottest pixel lies in the boxes; pixels that tie for it share.

    Args:
        heat: float `(n, h, w)`.
        boxes: bool `(n, h, w)`, the named objects' boxes.

    Returns:
        float `(n,)`.
    """
    hottest = heat == heat.amax((1, 2), keepdim=True)
    return (hottest & boxes).sum((1, 2)).double() / hottest.sum((1, 2))


def energy_in_box(heat: Tensor, boxes: Tensor) -> Tensor:
    """The share of positive heat inside the boxes, `(n,)`; a map without any has the boxes' share of the area."""
    warm = heat.double().clamp(min=0)
    total = warm.sum((1, 2))
    share = (warm * boxes).sum((1, 2)) / total.clamp(min=1e-300)
    return torch.where(total > 0, share, boxes.double().mean((1, 2)))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place.ravel()]


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Rank correlation of each map with its counterpart.

    Args:
        one: float `(n, rows, columns)`.
        other: The same shape.

    Returns:
        float64 `(n,)`; 1 for two constant maps (they are the same), 0 where only one is constant.
    """
    found = []
    for a, b in zip(one.numpy(), other.numpy(), strict=True):
        x, y = ranks(a.ravel()), ranks(b.ravel())
        x, y = x - x.mean(), y - y.mean()
        size = np.sqrt((x @ x) * (y @ y))
        found.append(x @ y / size if size else float(not (x.any() or y.any())))
    return torch.tensor(found, dtype=torch.float64)


def insertion_deletion(
    target: Target, pixels: Tensor, heat: Tensor, *, steps: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores while pixels appear, and while they vanish, hottest first; absent pixels have the mean colour.

    Args:
        target: What the maps explain.
        pixels: Normalised, `(n, 3, h, w)`.
        heat: float `(n, h, w)`; only its order counts. Equal pixels come in random order.
        steps: Equal steps from none to all.

    Returns:
        Mean score of the insertion curve and of the deletion curve (trapezoids), and the score of the whole picture
        minus that of the blank one; each float `(n,)`.

    Reference:
        Petsiuk et al. 2018 (RISE).
    """
    n, height, width = heat.shape
    noise = torch.rand(heat.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = heat.double().view(n, -1)
    spread = (flat.amax(1, keepdim=True) - flat.amin(1, keepdim=True)).clamp(min=1e-30)
    order = (flat / spread + 1e-9 * noise.view(n, -1)).argsort(1, descending=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(height * width).expand(n, -1))
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    shown = (place[:, None] < (share * height * width).round()[:, None]).float()  # (n, steps + 1, pixels)
    keep = torch.cat([shown, 1 - shown[:, 1:-1]], dim=1).view(n, -1, height, width)  # the ends are the same
    scores = versions_scored(target, pixels, keep, mean_colour(pixels)).double()
    inserted = scores[:, : steps + 1]
    deleted = torch.cat([inserted[:, -1:], scores[:, steps + 1 :], inserted[:, :1]], dim=1)
    return (
        torch.trapezoid(inserted, share, dim=1),
        torch.trapezoid(deleted, share, dim=1),
        inserted[:, -1] - inserted[:, 0],
    )
