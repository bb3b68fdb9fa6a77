"""What a ranking is asked for, checked before any work: cut-offs, owners of texts, judged pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def checked_cutoffs(ks: Sequence[int]) -> list[int]:
    """Cut-offs as a list.

    Raises:
        ValueError: None, or one that is not a whole number of at least 1.
    """
    if not len(ks) or any(int(k) != k or k < 1 for k in ks):
        raise ValueError(f"ks: expected one or more whole numbers of at least 1, got {list(ks)}")
    return [int(k) for k in ks]


def checked_owner(image_of_text: Any, images: int, texts: int) -> torch.Tensor:
    """`image_of_text` as int64 `(texts,)` on the CPU."""
    if isinstance(image_of_text, torch.Tensor):
        image_of_text = image_of_text.cpu().numpy()
    owner = np.array(image_of_text)
    if owner.shape != (texts,):
        raise ValueError(
            f"image_of_text: expected one entry for each of {texts} texts, got shape {owner.shape}"
        )
    if owner.dtype.kind not in "iu":
        raise TypeError(f"image_of_text: expected integers, got {owner.dtype}")
    outside = np.flatnonzero((owner < 0) | (owner >= images))
    if len(outside):
        raise ValueError(
            f"image_of_text: text {outside[0]} names image {owner[outside[0]]}, "
            f"expected 0 to {images - 1} ({len(outside)} texts are out of range)"
        )
    lonely = np.flatnonzero(np.bincount(owner.astype(np.int64), minlength=images) == 0)
    if len(lonely):
        raise ValueError(
            f"image_of_text: image {lonely[0]} has no text, so it has no right answer "
            f"({len(lonely)} of {images} images; leave them out of the images)"
        )
    return torch.from_numpy(owner.astype(np.int64))


def checked_pairs(relevant: Any, queries: int, gallery: int) -> torch.Tensor:
    """`relevant` as int64 `(pairs, 2)` on the CPU."""
    if isinstance(relevant, torch.Tensor):
        relevant = relevant.cpu().numpy()
    pairs = np.array(relevant)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"relevant: expected (pairs, 2) of query and candidate, got shape {pairs.shape}")
    if pairs.dtype.kind not in "iu":
        raise TypeError(f"relevant: expected integers, got {pairs.dtype}")
    outside = np.flatnonzero((pairs < 0).any(1) | (pairs >= (queries, gallery)).any(1))
    if len(outside):
        raise ValueError(
            f"relevant: pair {outside[0]} is {pairs[outside[0]].tolist()}, expected a query below {queries} "
            f"and a candidate below {gallery} ({len(outside)} pairs are out of range)"
        )
    pairs = pairs.astype(np.int64)
    unique, counts = np.unique(pairs, axis=0, return_counts=True)
    if len(unique) < len(pairs):
        raise ValueError(f"relevant: the pair {unique[counts.argmax()].tolist()} is given twice")
    lonely = np.flatnonzero(np.bincount(pairs[:, 0], minlength=queries) == 0)
    if len(lonely):
        raise ValueError(
            f"relevant: query {lonely[0]} has no right answer ({len(lonely)} of {queries} queries; "
            "leave them out of the queries)"
        )
    return torch.from_numpy(pairs)
