"""The pictures behind an index's rows, read from their shards when somebody wants to see one."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image

from data.samples import index_shards, read_sample
from data.tar import ShardReader
from data.transforms import decode_image

SIDE = 320  # pixels of a thumbnail's longer side


class Gallery:
    """Small JPEG copies of an index's pictures.

    Args:
        shards: The set that was embedded, as it is named everywhere.
        records: The index's records of pictures: `key` and `sample`.

    Raises:
        ValueError: The shards are not those that were indexed.
    """

    def __init__(self, shards: Iterable[str], records: Sequence[dict[str, Any]]):
        self.shards, self.records = list(shards), records
        self.indices = index_shards(self.shards)
        self.places = [
            (shard, number) for shard, index in enumerate(self.indices) for number in range(len(index))
        ]
        for row, record in enumerate(records):
            place = self.places[record["sample"]] if record["sample"] < len(self.places) else None
            if place is None or self.indices[place[0]].key(place[1]) != record["key"]:
                raise ValueError(
                    f"--data {' '.join(self.shards)}: row {row} of the index is the sample {record['key']!r}, which is "
                    "not at its place there: give the shards that were embedded"
                )
        self.reader, self.lock = ShardReader(), threading.Lock()
        self.thumbnail = lru_cache(maxsize=512)(self.read)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, row: int) -> bytes:
        """JPEG of one row's picture, at most 320 pixels on its longer side.

        Raises:
            data.faults.Fault: It cannot be read any more.
        """
        number = self.records[row]["sample"]
        shard, place = self.places[number]
        with self.lock:
            content = read_sample(self.indices[shard], place, number, self.reader).image
        picture = Image.fromarray(decode_image(content).permute(1, 2, 0).numpy())  # (H, W, 3)
        picture.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=88)
        return file.getvalue()
