"""Heatmaps and words from changed inputs: occlusion, LIME and SHAP. Slow, and true of any model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from explain.targets import Target, mean_colour, versions_scored
from pairstream.errors import require

Players = Callable[[np.ndarray], np.ndarray]
"""Scores `(m,)` of 0/1 rows `(m, parts)` that say which parts are there."""


def occlusion(target: Target, pixels: Tensor, *, cells: int = 8, window: int = 2) -> Tensor:
    """How much the score falls when a window of the picture is painted in its mean colour.

    Args:
        target: What to explain.
        pixels: Normalised, `(b, 3, h, w)`.
        cells: Rows and columns of the map.
        window: Side of the window in cells; it moves by one. 49 forward passes a picture with 8 and 2.

    Returns:
        float `(b, cells, cells)`, signed: the mean fall over the windows that cover a cell.
    """
    height, width = pixels.shape[-2:]
    rows = torch.arange(height) * cells // height
    columns = torch.arange(width) * cells // width
    places = [(r, c) for r in range(cells - window + 1) for c in range(cells - window + 1)]
    covers = torch.zeros(len(places), cells, cells)
    for number, (r, c) in enumerate(places):
        covers[number, r : r + window, c : c + window] = 1
    keep = 1 - covers[:, rows][:, :, columns]  # (places, h, w)
    whole = versions_scored(target, pixels, torch.ones(1, height, width), mean_colour(pixels))  # (b, 1)
    fall = whole - versions_scored(target, pixels, keep, mean_colour(pixels))  # (b, places)
    return torch.einsum("bp,prc->brc", fall, covers) / covers.sum(0)


def superpixels(image: Tensor, count: int = 40) -> np.ndarray:
    """Parts of a picture that hang together (SLIC).

    Args:
        image: uint8 `(3, h, w)`.
        count: About how many.

    Returns:
        int `(h, w)`, numbers from 0.

    Raises:
        ImportError: The extra `explain` is not installed.
    """
    segmentation = require("skimage.segmentation", "explain", "superpixels")
    found = segmentation.slic(image.permute(1, 2, 0).numpy(), n_segments=count, compactness=10, start_label=0)
    return np.unique(found, return_inverse=True)[1].reshape(found.shape)


def picture_players(target: Target, pixels: Tensor, parts: np.ndarray, number: int) -> Players:
    """A picture's superpixels as players: absent ones are painted in the mean colour.

    Args:
        target: What to explain.
        pixels: All its pictures, normalised.
        parts: Superpixels of picture `number`.
        number: Which.
    """
    places = torch.from_numpy(parts)

    class One:
        encoder, reads, see = target.encoder, target.reads, staticmethod(target.see)

        @staticmethod
        def score_of(features: Tensor, of: Tensor) -> Tensor:
            return target.score_of(features, torch.full_like(of, number))

    one = pixels[number : number + 1]

    def players(there: np.ndarray) -> np.ndarray:
        keep = torch.from_numpy(np.asarray(there, np.float32))[:, places]  # (m, h, w)
        return versions_scored(cast(Target, One()), one, keep, mean_colour(one))[0].numpy().astype(np.float64)

    return players


def word_players(words: Sequence[str], scores: Callable[[Sequence[str]], Tensor]) -> Players:
    """A text's words as players: absent ones are left out.

    Args:
        words: The text.
        scores: Texts to scores `(n,)`.
    """

    def players(there: np.ndarray) -> np.ndarray:
        texts = [" ".join(word for word, kept in zip(words, row, strict=True) if kept > 0.5) for row in there]
        order = {text: number for number, text in enumerate(dict.fromkeys(texts))}  # many versions recur
        with torch.no_grad():
            found = scores(list(order)).double().cpu().numpy()
        return found[[order[text] for text in texts]]

    return players


def leave_one_out(players: Players, parts: int) -> np.ndarray:
    """Fall of the score when one part is absent, `(parts,)`."""
    found = players(np.concatenate([np.ones((1, parts)), 1 - np.eye(parts)]))
    return found[0] - found[1:]


def lime(
    players: Players, parts: int, *, samples: int = 500, width: float = 0.25, seed: int = 0
) -> np.ndarray:
    """LIME: weights of a linear model of the score over which parts are there, fitted near the whole.

    Args:
        players: Scores of subsets.
        parts: Number of parts.
        samples: Random subsets, each part there by the toss of a coin; the whole is one of them.
        width: Of the kernel exp(-d^2 / width^2), where d is the cosine distance to the whole.
        seed: Of the subsets.

    Returns:
        float `(parts,)`, signed.

    Reference:
        Ribeiro et al. 2016; ridge regression with penalty 1, the intercept free.
    """
    rng = np.random.default_rng(seed)
    there = (rng.random((samples, parts)) < 0.5).astype(np.float64)
    there[0] = 1
    value = players(there)
    distance = 1 - np.sqrt(there.mean(1))  # the cosine of a 0/1 row and the row of ones
    root = np.sqrt(np.exp(-((distance / width) ** 2)))
    design = np.concatenate([there, np.ones((samples, 1))], axis=1) * root[:, None]
    penalty = np.diag([1.0] * parts + [0.0])
    return np.linalg.solve(design.T @ design + penalty, design.T @ (value * root))[:parts]


def shap_values(players: Players, parts: int, *, rounds: int = 5, seed: int = 0) -> np.ndarray:
    """Shapley values by antithetic permutations: they add up to the score of the whole minus that of nothing.

    Args:
        players: Scores of subsets.
        parts: Number of parts.
        rounds: Permutations, each walked forwards and backwards: `2 * parts + 1` subsets each.
        seed: Of the permutations.

    Returns:
        float `(parts,)`, signed.

    Raises:
        ImportError: The extra `explain` is not installed.

    Reference:
        Lundberg and Lee 2017; shap's permutation explainer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shap's imports warn of what they themselves still use
        shap = require("shap", "explain", "SHAP")
    if parts == 1:  # shap refuses a single player, whose value needs no sampling
        return players(np.ones((1, 1))) - players(np.zeros((1, 1)))
    explainer = shap.explainers.Permutation(players, np.zeros((1, parts)), seed=seed)
    found = explainer(np.ones((1, parts)), max_evals=rounds * (2 * parts + 1), silent=True)
    return found.values[0]
