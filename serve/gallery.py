"""The pictures behind an index's rows: which row is which sample, and its picture when somebody wants to see it."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from PIL import Image

from data.samples import index_shards, read_sample
from data.tar import ShardReader
from data.transforms import decode_image
from retrieval.first_pass import key_hashes
from retrieval.side import Side

THUMBNAIL = 320  # pixels of the longer side


class Numbers:
    """From keys to their places in a sequence: 16 bytes a key, however long the keys are.

    Args:
        keys: Any; equal ones may occur.
    """

    def __init__(self, keys: Iterable[str]):
        hashes = key_hashes({"key": key} for key in keys)
        self.order = np.argsort(hashes, kind="stable")
        self.sorted = hashes[self.order]

    def find(self, key: str) -> list[int]:
        """Places that may have this key, in their order; the caller compares the key itself."""
        (wanted,) = key_hashes([{"key": key}])
        first, last = (
            np.searchsorted(self.sorted, wanted, "left"),
            np.searchsorted(self.sorted, wanted, "right"),
        )
        return self.order[first:last].tolist()


class PictureRows:
    """The row of the picture that a key names, for texts that were found.

    Args:
        side: The index's pictures; None where they were not indexed.
    """

    def __init__(self, side: Side | None):
        self.side = side
        self.numbers = Numbers(record["key"] for record in side.records) if side is not None else None

    def row(self, key: str) -> int | None:
        """The row, or None: the picture is not in the index, or was deleted."""
        if self.side is None or self.numbers is None:
            return None
        for row in reversed(self.numbers.find(key)):  # a key that was deleted may have been added again
            if not is_deleted(self.side, row) and self.side.records[row]["key"] == key:
                return row
        return None


class Gallery:
    """Small JPEG copies of an index's pictures.

    Rows are found by key. Where two samples of the set have one key, the number that the index keeps of each sample
    (within its shard, or within the set when it was embedded in memory) decides.

    Args:
        shards: The set that was embedded, as it is named everywhere.
        side: The index's pictures.

    Raises:
        ValueError: The shards are not those that were indexed.
    """

    def __init__(self, shards: Iterable[str], side: Side):
        self.side, shards = side, list(shards)
        self.indices = index_shards(shards)
        self.starts = np.cumsum([0, *(len(index) for index in self.indices)])
        self.samples = self.locate(" ".join(shards))
        self.reader, self.lock = ShardReader(), threading.Lock()
        self.thumbnail = lru_cache(maxsize=512)(self.read)

    def locate(self, name: str) -> np.ndarray:
        """int64 `(rows,)`: the number in the set of each row's sample; -1 for deleted rows."""
        numbers = Numbers(index.key(number) for index in self.indices for number in range(len(index)))
        samples = np.full(self.side.ntotal, -1, np.int64)
        for row, record in enumerate(self.side.records):
            if is_deleted(self.side, row):
                continue
            found = [number for number in numbers.find(record["key"]) if self.key(number) == record["key"]]
            if len(found) > 1:
                found = [n for n in found if record["sample"] in (n, self.place(n)[1])]
            if len(found) != 1:
                raise ValueError(
                    f"--data {name}: row {row} of the index is the sample {record['key']!r}, of which there "
                    f"{'are several' if found else 'is none'}: give the shards that were embedded, and no others"
                )
            samples[row] = found[0]
        return samples

    def place(self, number: int) -> tuple[int, int]:
        """Shard, and number within it."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])

    def key(self, number: int) -> str:
        """Key of a sample of the set."""
        shard, within = self.place(number)
        return self.indices[shard].key(within)

    def __contains__(self, row: int) -> bool:
        return 0 <= row < len(self.samples) and self.samples[row] >= 0

    def read(self, row: int) -> bytes:
        """JPEG of one row's picture, at most 320 pixels on its longer side.

        Raises:
            data.faults.Fault: It cannot be read any more.
        """
        number = int(self.samples[row])
        shard, within = self.place(number)
        with self.lock:
            content = read_sample(self.indices[shard], within, number, self.reader).image
        picture = Image.fromarray(decode_image(content).permute(1, 2, 0).numpy())  # (H, W, 3)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=88)
        return file.getvalue()


def is_deleted(side: Side, row: int) -> bool:
    """Whether a row of a side was deleted."""
    return side.deleted is not None and bool(side.deleted[row])


def alive(side: Side | None) -> int:
    """Rows that a search can find; none on a side that was not indexed."""
    return 0 if side is None else side.alive
