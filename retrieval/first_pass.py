"""All rows of one side read once: checked, their records written, those that train taken, the queries answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pairstream.progress import ProgressBar
from retrieval.choose import Plan
from retrieval.fill import Source
from retrieval.index import indexed
from retrieval.measure import ExactTopK
from retrieval.parts import EmbeddingSet
from retrieval.side import Records


class PartsSource:
    """One side of embeddings on disk; rows read with their records are compared with their checksums."""

    def __init__(self, embeddings: EmbeddingSet, side: str):
        self.embeddings, self.side = embeddings, side
        self.count, self.dim = embeddings.count(side), embeddings.dim

    def blocks(self, *, records: bool = False) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
        for part in self.embeddings:
            rows = part.rows(self.side, check=records)
            if len(rows):
                yield rows, indexed(part.records(self.side)) if records else []


@dataclass
class FirstPass:
    """What reading all rows once gave.

    Attributes:
        name: Stem of the segment's files, from the rows' digest.
        train: Rows to train on.
        exact: The right answers to the queries.
        rows: float16 rows, mapped, where a plan re-ranks.
    """

    name: str
    train: np.ndarray
    exact: ExactTopK
    rows: np.ndarray | None


def first_pass(
    source: Source,
    folder: Path,
    side: str,
    plans: Sequence[Plan],
    queries: np.ndarray,
    k: int,
    *,
    show: bool = False,
) -> FirstPass:
    """Read all rows once: check them, write records and float16 rows, take those that train, answer the queries.

    Raises:
        ValueError: Rows that are damaged or not finite, a key that occurs twice.
    """
    exact = ExactTopK(queries, min(k, source.count))
    wanted = min(source.count, max(plan.train_rows for plan in plans))
    chosen = np.sort(np.random.default_rng(0).permutation(source.count)[:wanted])
    stored = None
    if any(plan.exact_rows for plan in plans):
        stored = np.lib.format.open_memmap(
            folder / f"{side}.npy", mode="w+", dtype=np.float16, shape=(source.count, source.dim)
        )
    digest, hashes, train, start = hashlib.sha256(), [], [], 0
    with (
        ProgressBar(f"read {side}", source.count, show=show) as bar,
        (folder / f"{side}.jsonl").open("w", encoding="utf-8") as file,
    ):
        for rows, records in source.blocks(records=True):
            digest.update(rows.tobytes())
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            if side == "images":  # a picture has several texts of one key
                hashes.append(key_hashes(records))
            mine = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, start + len(rows))]
            train.append(rows[mine - start])
            if stored is not None:
                stored[start : start + len(rows)] = rows
            exact.add(rows, start)
            start += len(rows)
            bar.advance(len(rows))
    if hashes:
        refuse_repeated(np.concatenate(hashes), Records(folder / f"{side}.jsonl"))
    name = f"{side}-{digest.hexdigest()[:10]}"
    (folder / f"{side}.jsonl").rename(folder / f"{name}.jsonl")
    mapped = None
    if stored is not None:
        stored.flush()
        (folder / f"{side}.npy").rename(folder / f"{name}.npy")
        mapped = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return FirstPass(name, np.concatenate(train), exact, mapped)


def key_hashes(records: Iterable[dict[str, Any]]) -> np.ndarray:
    """uint64 of each record's key: a hundred million keys then take 800 MB and no more."""
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(str(record["key"]).encode(), digest_size=8).digest(), "little")
            for record in records
        ],
        dtype=np.uint64,
    )


def refuse_repeated(hashes: np.ndarray, records: Sequence[dict[str, Any]]) -> None:
    """Stop when a key stands for two rows.

    Raises:
        ValueError: With the key and both rows.
    """
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for place in same.tolist():
        first, second = sorted(order[place : place + 2].tolist())
        key = records[first]["key"]
        if key == records[second]["key"]:
            raise ValueError(
                f"the key {key!r} stands for two pictures, rows {first} and {second}: an index names its results by "
                "key; write the shards with unique keys, or index the sets apart"
            )
