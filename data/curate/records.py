"""What is kept of each sample between reading and deciding: about 100 bytes, and its embedding where there is one.

One file a shard, so that a run that was killed goes on, and so that machines of a cluster share nothing but a folder.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from data.faults import FaultRecord
from pairstream.atomic import write_bytes

KEPT = "kept"
UNUSABLE = "unusable"  # damaged; its fault says how
NUMBERS = ("punsafe", "pwatermark", "similarity")


@dataclass
class Records:
    """Samples of one shard or of many, a row each; absent numbers are NaN.

    Attributes:
        keys: UTF-8; `S` (n,).
        verdicts: Index into the recipe's causes; uint8 (n,). 0 is kept.
        width: Pixels as shown; int32 (n,). 0 for what is damaged.
        height: Pixels; int32 (n,).
        bytes: Of the picture's file; int64 (n,).
        sha256: First 16 bytes; `V16` (n,).
        text: 64-bit digest of captions and key, which orders what is equal otherwise; uint64 (n,).
        hashes: Perceptual hash; uint64 (n,).
        mirrored: That of the mirrored picture; uint64 (n,).
        hashed: Whether it has one; bool (n,).
        characters: Of the first caption; int32 (n,).
        words: Of the first caption; int32 (n,).
        punsafe: float32 (n,).
        pwatermark: float32 (n,).
        similarity: float32 (n,).
        score: Cosine under the encoder; float32 (n,).
        embedded: Row in `embeddings`, -1 for none; int64 (n,).
        entry_starts: Entries `entries[entry_starts[i]:entry_starts[i + 1]]` are in the captions of sample i;
            int64 (n + 1,).
        entries: Numbers of entries of the balancing list; int32.
        embeddings: float16 (m, dimensions).
        faults: What was damaged.
        captions: Sample -> numbers of the captions that stay, for those that lose some.
        plants: Planted copies, a row each: `base` (sample), `kind`, and the same columns.
        shards: Names of the shards, in order.
        bounds: Shard s owns rows `bounds[s]:bounds[s + 1]`; int64 (shards + 1,).
    """

    keys: np.ndarray
    verdicts: np.ndarray
    width: np.ndarray
    height: np.ndarray
    bytes: np.ndarray
    sha256: np.ndarray
    text: np.ndarray
    hashes: np.ndarray
    mirrored: np.ndarray
    hashed: np.ndarray
    characters: np.ndarray
    words: np.ndarray
    punsafe: np.ndarray
    pwatermark: np.ndarray
    similarity: np.ndarray
    score: np.ndarray
    embedded: np.ndarray
    entry_starts: np.ndarray
    entries: np.ndarray
    embeddings: np.ndarray
    faults: list[FaultRecord] = field(default_factory=list)
    captions: dict[int, list[int]] = field(default_factory=dict)
    plants: Plants | None = None
    shards: list[str] = field(default_factory=list)
    bounds: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        return self.keys[row].decode("utf-8", "backslashreplace")

    def place(self, row: int) -> tuple[int, int]:
        """Number of the shard and of the sample within it."""
        shard = int(np.searchsorted(self.bounds, row, side="right")) - 1
        return shard, row - int(self.bounds[shard])

    @property
    def pixels(self) -> np.ndarray:
        """int64 (n,)."""
        return self.width.astype(np.int64) * self.height


@dataclass
class Plants:
    """Planted copies, whose search measures the search; a row each.

    Attributes:
        base: Row of the sample that was copied; int64 (p,).
        kind: Index into `data.curate.plant.KINDS`; uint8 (p,).
        sha256: `V16` (p,).
        hashes: uint64 (p,).
        mirrored: uint64 (p,).
        hashed: bool (p,).
        embeddings: float16 (p, dimensions), or (0, 0) without an encoder.
    """

    base: np.ndarray
    kind: np.ndarray
    sha256: np.ndarray
    hashes: np.ndarray
    mirrored: np.ndarray
    hashed: np.ndarray
    embeddings: np.ndarray


DTYPES: dict[str, Any] = {
    "verdicts": np.uint8,
    "width": np.int32,
    "height": np.int32,
    "bytes": np.int64,
    "sha256": "V16",
    "text": np.uint64,
    "hashes": np.uint64,
    "mirrored": np.uint64,
    "hashed": bool,
    "characters": np.int32,
    "words": np.int32,
    "punsafe": np.float32,
    "pwatermark": np.float32,
    "similarity": np.float32,
    "score": np.float32,
    "embedded": np.int64,
}
ABSENT = {"punsafe": np.nan, "pwatermark": np.nan, "similarity": np.nan, "score": np.nan, "embedded": -1}


def blank(keys: np.ndarray, name: str) -> Records:
    """Records of one shard before anything is known but its keys."""
    n = len(keys)
    columns: dict[str, Any] = {
        column: np.full(n, ABSENT[column], dtype) if column in ABSENT else np.zeros(n, dtype)
        for column, dtype in DTYPES.items()
    }
    return Records(
        keys=keys,
        **columns,
        entry_starts=np.zeros(n + 1, dtype=np.int64),
        entries=np.zeros(0, dtype=np.int32),
        embeddings=np.zeros((0, 0), dtype=np.float16),
        shards=[name],
        bounds=np.array([0, n], dtype=np.int64),
    )


def save(records: Records, path: Path) -> None:
    """Write the records of one shard; whole or not at all, equal records as equal bytes."""
    arrays = {item.name: getattr(records, item.name) for item in fields(Records)}
    said = {
        "faults": [asdict(fault) for fault in arrays.pop("faults")],
        "captions": {str(row): kept for row, kept in arrays.pop("captions").items()},
        "shards": arrays.pop("shards"),
    }
    plants = arrays.pop("plants")
    if plants is not None:
        arrays |= {f"plants_{item.name}": getattr(plants, item.name) for item in fields(Plants)}
    arrays["said"] = np.frombuffer(json.dumps(said).encode("utf-8"), dtype=np.uint8)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    write_bytes(path, file.getvalue())


def load(path: Path) -> Records:
    """Read the records of one shard.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        said = json.loads(arrays.pop("said").tobytes())
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, and the same command reads its shard again"
        ) from error
    planted = {name: arrays.pop(f"plants_{name}") for name in PLANTED if f"plants_{name}" in arrays}
    return Records(
        **arrays,
        faults=[FaultRecord(**fault) for fault in said["faults"]],
        captions={int(row): kept for row, kept in said["captions"].items()},
        plants=Plants(**planted) if planted else None,
        shards=said["shards"],
    )


PLANTED = tuple(item.name for item in fields(Plants))
OFFSETS = ("entry_starts", "entries", "embeddings", "embedded")  # joined in ways of their own


def join(parts: Sequence[Records]) -> Records:
    """Records of several shards as one."""
    if not parts:
        return blank(np.zeros(0, dtype="S1"), "")
    rows = np.cumsum([0, *(len(part) for part in parts)])
    vectors = np.cumsum([0, *(len(part.embeddings) for part in parts)])
    listed = np.cumsum([0, *(len(part.entries) for part in parts)])

    def stack(name: str, of: Iterable[Any] = parts) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in of])

    embedded = [
        np.where(part.embedded >= 0, part.embedded + first, -1)
        for part, first in zip(parts, vectors, strict=False)
    ]
    starts = [part.entry_starts[:-1] + first for part, first in zip(parts, listed, strict=False)]
    planted = [(part.plants, first) for part, first in zip(parts, rows, strict=False) if part.plants]
    plants = None
    if planted:
        columns = {
            name: _vectors([getattr(own, name) for own, _ in planted])
            if name == "embeddings"
            else np.concatenate([getattr(own, name) for own, _ in planted])
            for name in PLANTED
        }
        columns["base"] = np.concatenate([own.base + first for own, first in planted])
        plants = Plants(**columns)
    return Records(
        keys=stack("keys"),
        **{name: stack(name) for name in DTYPES if name not in OFFSETS},
        embedded=np.concatenate(embedded),
        entry_starts=np.concatenate([*starts, listed[-1:]]).astype(np.int64),
        entries=stack("entries"),
        embeddings=_vectors([part.embeddings for part in parts]),
        faults=[fault for part in parts for fault in part.faults],
        captions={
            row + int(first): kept
            for part, first in zip(parts, rows, strict=False)
            for row, kept in part.captions.items()
        },
        plants=plants,
        shards=[name for part in parts for name in part.shards],
        bounds=rows.astype(np.int64),
    )


def _vectors(parts: list[np.ndarray]) -> np.ndarray:
    some = [part for part in parts if len(part)]
    return np.concatenate(some) if some else parts[0]
