"""Hashes of pictures: SHA-256 of the bytes, and a perceptual hash that survives another encoding or size.

The perceptual hash is the one that the library ImageHash calls `phash` (the signs of the 8 x 8 lowest DCT frequencies
of a 32 x 32 grey picture, against their median), so that lists made with it can be used. It is ours for three reasons:
the picture is decoded at an eighth of its size where that is enough, a whole shard is transformed at once, and the hash
of the mirrored picture comes from the same frequencies, without decoding or transforming again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from PIL import Image

from data.pictures import Picture

FAISS: Any = faiss  # its stubs lack the binary indices
SIDE, LOW = 32, 8
ENOUGH = 2 * SIDE  # pixels of the shorter side that a reduced picture keeps
FLAT = 2.0  # grey levels; the standard deviation below which a picture shows nothing that could be compared
# Row k has cos(pi k (2 j + 1) / 64): the DCT-II without its factors, which are the same for all rows here.
COSINES = np.cos(np.pi * np.arange(LOW)[:, None] * (2 * np.arange(SIDE)[None] + 1) / (2 * SIDE))
MIRROR = np.where(np.arange(LOW) % 2, -1.0, 1.0)  # mirroring turns the sign of odd frequencies


def sha256_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass(frozen=True)
class Digests:
    """Perceptual hashes of some pictures.

    Attributes:
        hashes: uint64 (n,).
        mirrored: Of the pictures seen in a mirror; uint64 (n,).
        valid: False for pictures of one colour, whose hash would be noise; bool (n,).
    """

    hashes: np.ndarray
    mirrored: np.ndarray
    valid: np.ndarray

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Digests:
        hashes = np.array(numbers, dtype=np.uint64)
        return cls(hashes, hashes.copy(), np.ones(len(hashes), dtype=bool))


def grey_of(picture: Picture) -> np.ndarray:
    """The small grey picture that is hashed.

    Args:
        picture: Of any size.

    Returns:
        float32 (32, 32).

    Raises:
        Fault: `undecodable_image`.
    """
    pixels = picture.pixels(max(1.0, min(picture.width, picture.height) / ENOUGH))
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(grey, dtype=np.float32)


def hash_greys(greys: Sequence[np.ndarray]) -> Digests:
    """Perceptual hashes of small grey pictures; about 20 us each.

    Args:
        greys: float32 (32, 32) each.

    Returns:
        Their hashes; the first bit (the mean) is the highest.
    """
    if not len(greys):
        return Digests.of([])
    stack = np.stack(greys).astype(np.float64)  # (n, 32, 32)
    low = COSINES @ stack @ COSINES.T  # (n, 8, 8): vertical, horizontal frequency
    return Digests(_signs(low), _signs(low * MIRROR), stack.std(axis=(1, 2)) >= FLAT)


def _signs(low: np.ndarray) -> np.ndarray:
    flat = low.reshape(len(low), -1)  # (n, 64)
    bits = flat > np.median(flat, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)[:, 0]


def distances(one: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Bits in which hashes differ; uint64 arrays that broadcast."""
    return np.bitwise_count(one ^ many)


def close_pairs(
    base: np.ndarray, queries: np.ndarray, max_distance: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of hashes that differ in few bits, without comparing each with each.

    The 64 bits are split into parts so long that a bucket holds few hashes; of two hashes within the distance one
    part differs in so few bits that its bucket is looked up (FAISS's multi-index hashing, here always exhaustive).

    Args:
        base: Hashes that are searched; uint64 (n,), without repetition where there may be many.
        queries: uint64 (m,).
        max_distance: Bits.

    Returns:
        Positions in `queries`, positions in `base`, and their distances; int64 (pairs,) each.

    Reference:
        Norouzi, Punjani, Fleet: Fast exact search in Hamming space with multi-index hashing, 2014.
    """
    if not len(base) or not len(queries):
        none = np.zeros(0, dtype=np.int64)
        return none, none, none
    # Few flips with long parts look into fewer, emptier buckets than many parts that must agree.
    flips = max_distance // 4
    parts = max_distance // (flips + 1) + 1
    index = FAISS.IndexBinaryMultiHash(64, parts, 64 // parts)
    index.nflip = flips
    index.add(_as_bytes(base))
    limits, found, places = index.range_search(_as_bytes(queries), max_distance + 1)
    asked = np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64)))
    order = np.lexsort((places, asked))
    return asked[order], places[order].astype(np.int64), found[order].astype(np.int64)


def _as_bytes(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes, dtype=">u8").view(np.uint8).reshape(-1, 8)
