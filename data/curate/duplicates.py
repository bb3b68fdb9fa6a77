"""Copies: which pictures are the same, by their bytes, by a perceptual hash or by their embeddings.

Each search gives pairs of rows; pairs make groups (A is a copy of C when both are copies of B), and of a group the best
one stays. What is best depends on the samples alone, never on the order of shards.
"""

from __future__ import annotations

import numpy as np

from data.curate.hashes import close_pairs
from data.curate.lists import NONE, Lists, Pairs, unit
from data.curate.records import Records


def exact_pairs(digests: np.ndarray, rows: np.ndarray) -> Pairs:
    """Rows whose bytes are the same, each paired with the next one of its kind.

    Args:
        digests: `V16` (n,).
        rows: Which of them to look at; int64.
    """
    _, kinds = np.unique(digests[rows].view("S16") if len(rows) else digests[rows], return_inverse=True)
    return _neighbours(rows, kinds)


def _neighbours(rows: np.ndarray, kinds: np.ndarray) -> Pairs:
    order = np.argsort(kinds, kind="stable")
    same = kinds[order][1:] == kinds[order][:-1]
    return rows[order[:-1][same]], rows[order[1:][same]]


def perceptual_pairs(records: Records, rows: np.ndarray, max_distance: int, flips: bool) -> Pairs:
    """Rows whose hashes are close to each other, or to the other's mirrored one."""
    rows = rows[records.hashed[rows]]
    if len(rows) < 2:
        return NONE
    # Pictures with the same two hashes are searched for once: a thousand copies would else make a million pairs.
    both = np.stack([records.hashes[rows], records.mirrored[rows]], axis=1)
    unique, first, kinds = np.unique(both, axis=0, return_index=True, return_inverse=True)
    pairs = [_neighbours(rows, kinds.ravel())]
    for side in (0, 1) if flips else (0,):
        asked, found, _ = close_pairs(unique[:, 0], unique[:, side], max_distance)
        other = asked != found
        pairs.append((rows[first[asked[other]]], rows[first[found[other]]]))
    return _joined(pairs)


def semantic_pairs(vectors: np.ndarray, rows: np.ndarray, order: np.ndarray, min_similarity: float) -> Pairs:
    """Rows whose embeddings have at least this cosine.

    All pairs up to 20,000 rows; above that those in the lists that lie nearest (`Lists`), so that the cost of a row
    stays the same.

    Args:
        vectors: Rows of length one; float16 or float32 (n, dimensions).
        rows: What to call them; int64 (n,).
        order: Numbers that put them into an order of their own, whatever the order of shards; (n,).
        min_similarity: The smallest cosine.
    """
    if len(rows) < 2:
        return NONE
    sequence = np.argsort(order, kind="stable")
    rows = rows[sequence]
    vectors = unit(vectors[sequence])
    asked, found = Lists(vectors).search(vectors, min_similarity)
    other = asked != found
    return rows[asked[other]], rows[found[other]]


def _joined(pairs: list[Pairs]) -> Pairs:
    if not pairs:
        return NONE
    return np.concatenate([one for one, _ in pairs]), np.concatenate([other for _, other in pairs])


def components(n: int, pairs: Pairs) -> np.ndarray:
    """Union-find over all pairs at once: the smallest row that each row is joined with.

    Args:
        n: Rows.
        pairs: Rows that belong together.

    Returns:
        int64 (n,).
    """
    labels = np.arange(n)
    one, other = pairs
    while True:
        before = labels.copy()
        lowest = np.minimum(labels[one], labels[other])
        np.minimum.at(labels, labels[one], lowest)  # the roots are hung on
        np.minimum.at(labels, labels[other], lowest)
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]  # and the paths are shortened
        if np.array_equal(labels, before):
            return labels


def keepers(records: Records, labels: np.ndarray) -> np.ndarray:
    """The row of each group that stays: most pixels, then most bytes, then the first key, then the first captions.

    Args:
        records: The samples.
        labels: Group of each; int64 (n,).

    Returns:
        For each row the one that stays in its place (itself where it does); int64 (n,).
    """
    kept = np.arange(len(labels))
    members = np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1)
    if not len(members):
        return kept
    ranked = members[
        np.lexsort(
            (
                records.text[members],
                records.keys[members],
                -records.bytes[members],
                -records.pixels[members],
                labels[members],
            )
        )
    ]
    groups, first = np.unique(labels[ranked], return_index=True)
    best = dict(zip(groups.tolist(), ranked[first].tolist(), strict=True))
    kept[members] = [best[label] for label in labels[members].tolist()]
    return kept
