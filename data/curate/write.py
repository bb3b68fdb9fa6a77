"""The last pass: the samples that stay are copied, as they are, into full shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.curate.look import open_shard
from data.curate.records import Records
from data.faults import Fault
from data.samples import RawSample, read_sample
from data.shards import ShardFile
from data.tar import ShardIndex, ShardReader
from pairstream.atomic import write_text


@dataclass(frozen=True)
class Piece:
    """Samples of one shard that go into one shard of the result.

    Attributes:
        shard: The shard they lie in.
        holds: Samples that it had when it was read.
        samples: Their numbers in it; int32 (n,).
        keys: Number -> its new key, for those whose key is taken.
        captions: Number -> numbers of the captions that stay, for those that lose some.
    """

    shard: str
    holds: int
    samples: np.ndarray
    keys: dict[int, str]
    captions: dict[int, list[int]]


def plan_shards(records: Records, verdicts: np.ndarray, size: int) -> Iterator[list[Piece]]:
    """The pieces of each shard of the result, in the order of the set."""
    rows = np.flatnonzero(verdicts == 0)
    keys = new_keys(records, rows)
    for first in range(0, len(rows), size):
        mine = rows[first : first + size]
        shards = np.searchsorted(records.bounds, mine, side="right") - 1
        pieces = []
        for shard in np.unique(shards).tolist():
            base, end = records.bounds[shard : shard + 2].tolist()
            own = mine[shards == shard].tolist()
            pieces.append(
                Piece(
                    records.shards[shard],
                    end - base,
                    (mine[shards == shard] - base).astype(np.int32),
                    {row - base: keys[row] for row in own if row in keys},
                    {row - base: records.captions[row] for row in own if row in records.captions},
                )
            )
        yield pieces


def new_keys(records: Records, rows: np.ndarray) -> dict[int, str]:
    """Keys for samples whose own one an earlier sample has, as sets from several crawls do: `KEY-2`, `KEY-3`, ..."""
    _, first, counts = np.unique(records.keys[rows], return_index=True, return_counts=True)
    if not (counts > 1).any():
        return {}
    again = np.setdiff1d(np.arange(len(rows)), first)
    taken = set(records.keys[rows].tolist())
    made: dict[int, str] = {}
    numbers: dict[bytes, int] = {}
    for row in rows[again].tolist():
        old = bytes(records.keys[row])
        number = numbers.get(old, 2)
        while b"%s-%d" % (old, number) in taken:
            number += 1
        taken.add(b"%s-%d" % (old, number))
        numbers[old] = number + 1
        made[row] = f"{records.key(row)}-{number}"
    return made


@dataclass(frozen=True)
class WriteShard:
    """Write one shard of the result; it travels to the processes that do it.

    Attributes:
        out: The folder of the result.
        work: Where the entries of the manifest wait until all shards are there.
    """

    out: Path
    work: Path

    def __call__(self, number: int, pieces: list[Piece]) -> int:
        path = self.out / f"{number:05d}.tar"
        shard = ShardFile(path)
        try:
            for piece in pieces:
                copy(piece, shard)
        except BaseException:
            shard.abandon()
            raise
        entry = shard.finish()
        write_text(self.entry(number), json.dumps({path.name: entry}) + "\n")
        return entry["samples"]

    def entry(self, number: int) -> Path:
        return self.work / f"{number:05d}.json"


def copy(piece: Piece, shard: ShardFile) -> None:
    """Copy the samples of a piece.

    Raises:
        ValueError: The shard is another than when it was read.
    """
    index, opened = open_shard(piece.shard)
    if len(index) != piece.holds:
        raise ValueError(
            f"{piece.shard} holds {len(index)} samples now and had {piece.holds} when it was read: start anew with "
            "--overwrite"
        )
    with opened as reader:
        for sample in piece.samples.tolist():
            try:
                files = {
                    extension: reader.read(index, offset, size)
                    for extension, (offset, size) in index.members(sample).items()
                }
                if sample in piece.captions:
                    files |= with_captions(index, sample, reader, piece.captions[sample])
            except Fault as fault:
                raise ValueError(
                    f"{piece.shard}, sample {index.key(sample)!r}: {fault}; it could be read before"
                ) from fault
            shard.write(piece.keys.get(sample) or index.key(sample), files)


def with_captions(index: ShardIndex, sample: int, reader: ShardReader, kept: list[int]) -> dict[str, bytes]:
    """The files of a sample that name its captions, with those that stay."""
    raw: RawSample = read_sample(index, sample, sample, reader)
    captions = raw.captions()
    left = [captions[place] for place in kept]
    files: dict[str, bytes] = {}
    if raw.text is not None:
        files["txt"] = left[0].encode("utf-8") if left else b""
    if "json" in index.members(sample):
        record: dict[str, Any] = dict(raw.record)
        if "captions" in record:
            record["captions"] = left
        if "caption" in record:
            whole = left if isinstance(record["caption"], list) else left[0] if left else ""
            record["caption"] = whole
        files["json"] = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return files
