"""Numbers of one ranking whose equal scores may come in any order: exact expectations, no sampling.

All functions work on groups: a group is the right answers of one query that share a score, with the wrong
candidates that share it, too. `start` candidates score higher, the group has `tied` candidates, `right` of
them right, and `before` right answers score higher.
"""

from __future__ import annotations

import torch


def expected_rank(start: torch.Tensor, tied: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Mean place of a group's first right answer, from 1: `1 + g + (t - p) / (p + 1)`; float64."""
    return 1 + start + (tied - right) / (right + 1).double()


def misses(tied: torch.Tensor, right: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Probability that `slots` draws from `tied` candidates find none of the `right` ones: C(t-p,m)/C(t,m)."""
    wrong, slots = tied - right, torch.minimum(slots, tied)
    if len(slots) and slots.max() > right.max():  # C(t-p,m)/C(t,m) = C(t-m,p)/C(t,p): the shorter product
        wrong, slots = tied - slots, right
    result = torch.ones(tied.shape, dtype=torch.float64)
    for draw in range(int(slots.max()) if len(slots) else 0):
        factor = (wrong - draw).clamp(min=0) / (tied - draw).clamp(min=1).double()
        result = torch.where(draw < slots, result * factor, result)
    return result


def expected_reciprocal(start: torch.Tensor, tied: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Mean of 1 / place of a group's first right answer; float64.

    The first of p right answers among t stands at x with probability C(t-x, p-1) / C(t, p).
    """
    result = 1 / (1 + start).double()
    open_ = (tied > right).nonzero()[:, 0]
    if not len(open_):
        return result
    cases, which = torch.stack([start[open_], tied[open_], right[open_]]).unique(dim=1, return_inverse=True)
    values = torch.empty(cases.shape[1], dtype=torch.float64)
    for number, (g, t, p) in enumerate(cases.T.tolist()):
        x = torch.arange(1, t - p + 1, dtype=torch.float64)
        # Each probability from the one before: C(t-x-1, p-1) / C(t-x, p-1) = (t-x-p+1) / (t-x).
        chances = torch.cat([torch.full((1,), p / t, dtype=torch.float64), (t - x - p + 1) / (t - x)])
        places = g + torch.arange(1, t - p + 2, dtype=torch.float64)
        values[number] = (chances.cumprod(0) / places).sum()
    result[open_] = values[which]
    return result


def expected_found(start: torch.Tensor, tied: torch.Tensor, right: torch.Tensor, k: torch.Tensor | int):
    """Mean number of a group's right answers among the first k; float64."""
    places = torch.minimum((k - start).clamp(min=0), tied)
    return right * places / tied.double()


def expected_gain(
    start: torch.Tensor, tied: torch.Tensor, right: torch.Tensor, k: torch.Tensor | int, gains: torch.Tensor
) -> torch.Tensor:
    """Mean of the summed gains of a group's right answers among the first k; float64.

    Args:
        start: As in the module.
        tied: As in the module.
        right: As in the module.
        k: Cut-off.
        gains: float64 `(n + 1,)`: sum of the gains of the first 0, 1, 2, ... places.
    """
    limit = torch.as_tensor(k).clamp(max=len(gains) - 1)
    gained = gains[torch.minimum(start + tied, limit)] - gains[torch.minimum(start, limit)]
    return right * gained / tied.double()


def expected_precision(
    start: torch.Tensor,
    tied: torch.Tensor,
    right: torch.Tensor,
    before: torch.Tensor,
    k: torch.Tensor | int,
    harmonic: torch.Tensor,
) -> torch.Tensor:
    """Mean of the summed precisions at the places of a group's right answers among the first k; float64.

    At place r of the group a candidate is right with probability p/t, and then `before` + 1 +
    (r - start - 1)(p - 1)/(t - 1) right answers are expected up to it. Summed over r that is a closed form in
    harmonic numbers.

    Args:
        start: As in the module.
        tied: As in the module.
        right: As in the module.
        before: As in the module.
        k: Cut-off.
        harmonic: float64 `(n + 1,)`: 0, 1, 1 + 1/2, ... up to the size of the gallery.

    Reference:
        McSherry and Najork 2008, Computing information retrieval performance measures efficiently in the
        presence of tied scores.
    """
    places = torch.minimum((k - start).clamp(min=0), tied)
    slope = (right - 1) / (tied - 1).clamp(min=1).double()
    # The difference of two harmonic numbers loses digits where the group is one place, the usual case.
    reciprocals = torch.where(
        places == 1, 1 / (start + 1).double(), harmonic[start + places] - harmonic[start]
    )
    summed = (before + 1 - (start + 1) * slope) * reciprocals + slope * places
    return torch.where(places > 0, right / tied.double() * summed, 0.0)
