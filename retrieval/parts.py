"""Embeddings on disk: one part a shard, each whole or absent, and a manifest when all are there.

A part depends on its shard, the model, the batch size and the dtype alone. So any process may make any part, a
killed job goes on where it was with the same bytes, and the last process to finish writes the manifest: there is
nothing to wait for and no process that must not fail.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.artifact import (
    MANIFEST,
    new_artifact,
    read_artifact,
    read_lines,
    sha256,
    write_lines,
    write_manifest,
)

KIND = "pairstream-embeddings"
PART = "pairstream-embeddings-part"
FAILED = "failed.jsonl"
DTYPES = ("float16", "float32")
SIDES = ("images", "texts")


@dataclass(frozen=True)
class PartRows:
    """Content of a part, on its way to the disk.

    Attributes:
        images: float `(n, dim)`.
        texts: float `(m, dim)`.
        image_records: n records with `key` and `sample`, the number within the part's shard.
        text_records: m records with `text`, `key` and `image`, the row of its picture in this part.
        failed: Samples without a row: `shard`, `key`, `cause`, `detail`, `count`.
    """

    images: np.ndarray
    texts: np.ndarray
    image_records: list[dict[str, Any]]
    text_records: list[dict[str, Any]]
    failed: Sequence[dict[str, Any]] = ()


def part_folder(folder: str | Path, number: int) -> Path:
    return Path(folder) / "parts" / f"{number:05d}"


def write_part(
    folder: str | Path, number: int, rows: PartRows, *, dtype: str, size: int, shard: str = ""
) -> None:
    """Write one part, with the checksum of each row in its record.

    Args:
        folder: The embeddings' folder.
        number: The part's number, that of its shard.
        rows: Its content.
        dtype: `float16` or `float32`.
        size: Samples in its shard, unusable ones included: what the next shard's numbers begin after.
        shard: The shard's name.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    content = {
        "shard": shard,
        "samples": size,
        "images": len(rows.images),
        "texts": len(rows.texts),
        "dim": int(rows.images.shape[1]),
        "dtype": dtype,
    }
    with new_artifact(part_folder(folder, number), PART, content) as temporary:
        for side, array, records in (
            ("images", rows.images, rows.image_records),
            ("texts", rows.texts, rows.text_records),
        ):
            stored = np.ascontiguousarray(array, dtype=dtype)
            np.save(temporary / f"{side}.npy", stored)
            write_lines(
                temporary / f"{side}.jsonl",
                [
                    {**record, "crc32": zlib.crc32(row.tobytes())}
                    for record, row in zip(records, stored, strict=True)
                ],
            )
        write_lines(temporary / FAILED, rows.failed)


def part_is_done(folder: str | Path, number: int) -> bool:
    return (part_folder(folder, number) / MANIFEST).is_file()


def write_set(
    folder: str | Path, content: dict[str, Any], *, count: int = 1, faults: dict[str, int] | None = None
) -> dict[str, Any]:
    """Write the manifest over `count` parts that are all there, and the log of all failed rows.

    Args:
        folder: The embeddings' folder.
        content: Keys of the manifest: model, fingerprint, dim, dtype, shards.
        count: Parts.
        faults: Samples left out by cause; None to count the parts' logs.

    Returns:
        The manifest.
    """
    parts, failed = [], []
    for number in range(count):
        path = part_folder(folder, number)
        part = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        failed += read_lines(path / FAILED)
        parts.append(
            {
                "name": path.name,
                **{name: part[name] for name in ("images", "texts", "samples")},
                "sha256": sha256(path / MANIFEST),
            }
        )
    write_lines(Path(folder) / FAILED, failed)
    if faults is None:
        faults = {}
        for record in failed:
            faults[record["cause"]] = faults.get(record["cause"], 0) + record["count"]
    totals = {side: sum(part[side] for part in parts) for side in SIDES}
    return write_manifest(folder, KIND, {**content, **totals, "faults": faults, "parts": parts}, [FAILED])


@dataclass(frozen=True)
class Part:
    """One part, mapped; its records are read when they are asked for.

    Attributes:
        folder: Where it lies.
        base: Samples in the shards before its own.
        first: Rows in the parts before, by side.
        images: float16 or float32 `(n, dim)`.
        texts: The same for its texts.
    """

    folder: Path
    base: int
    first: dict[str, int]
    images: np.ndarray
    texts: np.ndarray

    @cached_property
    def image_records(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "images.jsonl")

    @cached_property
    def text_records(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "texts.jsonl")

    def records(self, side: str) -> list[dict[str, Any]]:
        return self.image_records if side == "images" else self.text_records

    def rows(self, side: str, *, check: bool = True) -> np.ndarray:
        """float32 rows of a side, each compared with the checksum in its record unless `check` is False.

        Raises:
            ValueError: A row that is not the one that was written, or not finite.
        """
        stored = self.images if side == "images" else self.texts
        if not check:
            return np.asarray(stored, dtype=np.float32)
        for number, (record, row) in enumerate(zip(self.records(side), stored, strict=True)):
            if zlib.crc32(row.tobytes()) != record["crc32"]:
                raise ValueError(
                    f"{self.folder}: row {number} of {side} (key {record['key']!r}) is damaged: its checksum is "
                    "not its record's; delete this part and run the same embed command again"
                )
        rows = np.asarray(stored, dtype=np.float32)
        bad = ~np.isfinite(rows).all(1)
        if bad.any():
            number = int(bad.argmax())
            raise ValueError(
                f"{self.folder}: row {number} of {side} (key {self.records(side)[number]['key']!r}) has NaN or "
                "infinite values; delete this part and embed it again with a sound model"
            )
        return rows


class EmbeddingSet:
    """A finished folder of embeddings, read part by part.

    Args:
        folder: Where it lies.
        manifest: Its content.

    Example:
        >>> for part in EmbeddingSet.open("rows"):                                  # doctest: +SKIP
        ...     index.add(part.rows("images"))
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.dim: int = manifest["dim"]
        self.checked: set[int] = set()

    @classmethod
    def open(cls, folder: str | Path) -> EmbeddingSet:
        """Read the manifest.

        Raises:
            FileNotFoundError: No embeddings there.
            ValueError: They are unfinished or damaged.
        """
        path = Path(folder)
        if not (path / MANIFEST).is_file() and (path / "job.json").is_file():
            raise ValueError(
                f"{path}: these embeddings are unfinished: run the same embed command again to go on"
            )
        manifest = read_artifact(path, KIND)
        if "parts" not in manifest:
            raise ValueError(f"{path} is damaged: its manifest names no parts; embed the set again")
        return cls(path, manifest)

    def __len__(self) -> int:
        return len(self.manifest["parts"])

    def count(self, side: str) -> int:
        """Rows of a side."""
        return self.manifest[side]

    def part(self, number: int) -> Part:
        """One part; all of its files are compared with their checksums when it is first opened.

        Raises:
            ValueError: It is missing or damaged, or does not belong here.
        """
        parts = self.manifest["parts"]
        path = part_folder(self.folder, number)
        if number not in self.checked:
            try:
                found = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
            except FileNotFoundError:
                raise ValueError(f"{path} is missing: run the same embed command again") from None
            if found != parts[number]["sha256"]:
                raise ValueError(
                    f"{path} is damaged: it is not the part that the manifest names; embed it again"
                )
            read_artifact(path, PART)
            self.checked.add(number)
        before = parts[:number]
        return Part(
            path,
            sum(part["samples"] for part in before),
            {side: sum(part[side] for part in before) for side in SIDES},
            *(np.load(path / f"{side}.npy", mmap_mode="r", allow_pickle=False) for side in SIDES),
        )

    def __iter__(self) -> Iterator[Part]:
        return (self.part(number) for number in range(len(self)))
