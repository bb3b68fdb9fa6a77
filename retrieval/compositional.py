"""Winoground, SugarCrepe, ARO and WinoGAViL: scoring functions of plain numbers, with ties stated.

A right answer must score higher than a wrong one. Where scores are equal, the headline number counts every
order of them alike, so that a model that scores everything alike gets exactly chance; `strict` counts a tie as
wrong, as the sets' authors do. They differ only where there are ties, and `ties` says how many. Taking the
argmax instead would give such a model 100 % wherever the right answer comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np

from retrieval.bootstrap import bootstrap_intervals

VG_A_LEAST = 25  # ARO leaves out attributes with fewer cases


def checked_scores(scores: Any, shape: str, dims: int) -> np.ndarray:
    """Scores as float64.

    Raises:
        ValueError: No cases, another shape, NaN or infinity.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != dims or not len(array):
        raise ValueError(f"expected scores of shape {shape} with at least one case, got {array.shape}")
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(1)
    if bad.any():
        raise ValueError(
            f"case {int(bad.argmax())} has a NaN or infinite score ({int(bad.sum())} such cases)"
        )
    return array


def intervals(**values: np.ndarray) -> dict[str, list[float]]:
    """95 % bootstrap intervals of means over cases, by name."""
    found = bootstrap_intervals(values, np.arange(len(next(iter(values.values())))))
    return {name: [each.low, each.high] for name, each in found.items()}


def winoground(scores: Any) -> dict[str, Any]:
    """Text, image and group score.

    Args:
        scores: `(n, 2, 2)`: caption by image; caption 0 is image 0's and caption 1 image 1's.

    Returns:
        `text` (each image prefers its caption), `image` (each caption prefers its image), `group` (both), ties by
        expectation: 1/4, 1/4 and 1/6 for a constant model; the same with `strict_`, where a tie is wrong;
        `ties`, the cases with one; `cases`; and `intervals` of the first three by bootstrap over cases.

    Raises:
        ValueError: Another shape, NaN or infinity.

    Reference:
        Thrush et al. 2022.
    """
    array = checked_scores(scores, "(n, 2, 2)", 3)
    if array.shape[1:] != (2, 2):
        raise ValueError(f"expected scores of shape (n, 2, 2), got {array.shape}")
    flat = array.reshape(-1, 4)  # c0i0, c0i1, c1i0, c1i1

    def right(broken: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
        def over(a: int, b: int) -> np.ndarray:
            above = flat[:, a] > flat[:, b]
            return above if broken is None else above | ((flat[:, a] == flat[:, b]) & (broken[a] > broken[b]))

        return over(0, 2) & over(3, 1), over(0, 1) & over(3, 2)

    orders = [right(order) for order in permutations(range(4))]  # every way in which ties may fall
    text = np.mean([each[0] for each in orders], axis=0)
    image = np.mean([each[1] for each in orders], axis=0)
    group = np.mean([each[0] & each[1] for each in orders], axis=0)
    strict_text, strict_image = right(None)
    compared = ((0, 2), (3, 1), (0, 1), (3, 2))
    return {
        "text": float(text.mean()),
        "image": float(image.mean()),
        "group": float(group.mean()),
        "strict_text": float(strict_text.mean()),
        "strict_image": float(strict_image.mean()),
        "strict_group": float((strict_text & strict_image).mean()),
        "ties": int(np.any([flat[:, a] == flat[:, b] for a, b in compared], axis=0).sum()),
        "cases": len(flat),
        "intervals": intervals(text=text, image=image, group=group),
    }


def right_first(scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """Whether the right candidate of each case wins against all others.

    Args:
        scores: `(n, c)`, the right candidate first, or `(right, wrong)` as `(n, 2)`.

    Returns:
        Expectation over ties, and strictly; float64 `(n,)` both.
    """
    array = checked_scores(scores, "(n, candidates)", 2)
    if array.shape[1] < 2:
        raise ValueError(f"expected two or more candidates a case, got {array.shape[1]}")
    right, wrong = array[:, :1], array[:, 1:]
    lost, level = (wrong > right).any(1), (wrong == right).sum(1)
    return np.where(lost, 0.0, 1 / (level + 1)), (~lost & (level == 0)).astype(np.float64)


def accuracy(scores: Any) -> dict[str, Any]:
    """How often the right caption wins.

    Args:
        scores: `(n, candidates)`, the right one first.

    Returns:
        `accuracy` (ties by expectation), `strict_accuracy` (a tie is wrong), `chance`, `ties`, `cases`, and
        `intervals` of the accuracy by bootstrap over cases.

    Raises:
        ValueError: Another shape, NaN or infinity.
    """
    expected, strict = right_first(scores)
    return {
        "accuracy": float(expected.mean()),
        "strict_accuracy": float(strict.mean()),
        "chance": 1 / np.asarray(scores).shape[1],
        "ties": int(((expected > 0) & (expected < 1)).sum()),
        "cases": len(expected),
        "intervals": intervals(accuracy=expected),
    }


def sugarcrepe(scores: Any, kinds: Sequence[str]) -> dict[str, Any]:
    """SugarCrepe: the caption against one hard negative, by kind.

    Args:
        scores: `(n, 2)`: caption, negative caption.
        kinds: `add_att`, `add_obj`, `replace_att`, ... of each case.

    Returns:
        `kinds` (accuracy of each), `mean_of_kinds` (the usual average of the seven), `mean_of_groups` (of add,
        replace and swap), and what `accuracy` gives over all cases (the micro average).

    Raises:
        ValueError: Lengths that differ, another shape, NaN or infinity.

    Reference:
        Hsieh et al. 2023.
    """
    expected, _ = right_first(scores)
    by_kind = means_by(expected, kinds)
    groups: dict[str, list[float]] = {}
    for kind, value in by_kind.items():
        groups.setdefault(kind.partition("_")[0], []).append(value)
    return {
        **accuracy(scores),
        "kinds": by_kind,
        "mean_of_kinds": float(np.mean(list(by_kind.values()))),
        "mean_of_groups": float(np.mean([np.mean(values) for values in groups.values()])),
    }


def aro(scores: Any, groups: Sequence[str], *, least: int = 1) -> dict[str, Any]:
    """ARO's relations and attributes: accuracy as the mean over relations, or attributes.

    Args:
        scores: `(n, candidates)`, the right caption first.
        groups: The relation, or the pair of attributes, of each case.
        least: Groups with fewer cases are left out of the macro mean: 25 for attributes (`VG_A_LEAST`).

    Returns:
        `macro_accuracy`, `groups` (accuracy of each that counts), `groups_left_out`, and what `accuracy` gives.

    Raises:
        ValueError: No group is large enough, and as `sugarcrepe`.

    Reference:
        Yuksekgonul et al. 2023.
    """
    expected, _ = right_first(scores)
    sizes = {name: list(groups).count(name) for name in set(groups)}
    kept = {name: value for name, value in means_by(expected, groups).items() if sizes[name] >= least}
    if not kept:
        raise ValueError(f"no group has {least} cases: nothing to average")
    return {
        **accuracy(scores),
        "macro_accuracy": float(np.mean(list(kept.values()))),
        "groups": kept,
        "groups_left_out": len(sizes) - len(kept),
    }


def winogavil(scores: Sequence[Any], associations: Sequence[Sequence[int]]) -> dict[str, Any]:
    """WinoGAViL: Jaccard index of the top images of a cue and its associations, as many as there are.

    Args:
        scores: For each cue, the scores of its candidates `(c,)`.
        associations: For each cue, the numbers of the right candidates.

    Returns:
        `jaccard` (ties by expectation), `ties`, `cases`, and `intervals` of it by bootstrap over cues.

    Raises:
        ValueError: A candidate that is out of range or given twice, no association, NaN or infinity.

    Reference:
        Bitton et al. 2022.
    """
    if len(scores) != len(associations) or not len(scores):
        raise ValueError(f"expected associations for each of {len(scores)} cues, got {len(associations)}")
    found, open_ = [], 0
    for case, (each, right) in enumerate(zip(scores, associations, strict=True)):
        row = checked_scores([each], "(1, candidates)", 2)[0]
        answers = set(right)
        if not answers or len(answers) < len(right) or min(answers) < 0 or max(answers) >= len(row):
            raise ValueError(
                f"case {case}: associations {list(right)} are not different numbers below {len(row)}"
            )
        n, good = len(answers), np.isin(np.arange(len(row)), list(answers))
        level = np.sort(row)[-n]  # the last that gets in, or ties with it
        sure, tied = row > level, row == level
        slots = n - int(sure.sum())
        hits, pool = int((sure & good).sum()), int((tied & good).sum())
        open_ += int(slots < tied.sum() and 0 < pool < tied.sum())
        jaccards = []
        for more in range(max(0, slots - int(tied.sum()) + pool), min(slots, pool) + 1):
            chance = hypergeometric(int(tied.sum()), pool, slots, more)
            jaccards.append(chance * (hits + more) / (2 * n - hits - more))
        found.append(sum(jaccards))
    return {
        "jaccard": float(np.mean(found)),
        "ties": open_,
        "cases": len(found),
        "intervals": intervals(jaccard=np.array(found)),
    }


def hypergeometric(total: int, good: int, draws: int, hits: int) -> float:
    """Probability of `hits` good ones in `draws` out of `total`."""
    from math import comb

    return comb(good, hits) * comb(total - good, draws - hits) / comb(total, draws)


def means_by(values: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Mean of the values of each name, in the order of first appearance."""
    if len(names) != len(values):
        raise ValueError(f"expected a name for each of {len(values)} cases, got {len(names)}")
    array = np.asarray(names)
    return {name: float(values[array == name].mean()) for name in dict.fromkeys(names)}
