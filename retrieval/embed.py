"""Embed shards into memory: every picture and all its captions, once, in the order of the shards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.faults import FaultLog, FaultRecord
from data.samples import index_shards
from data.shards import expand_shards
from pairstream.atomic import new_folder
from pairstream.progress import ProgressBar
from pretrain.encoder import Encoder
from retrieval.parts import KIND, EmbeddingSet, PartRows, write_part, write_set
from retrieval.shard_rows import RowBatch, Take, count_faults, embed_batches, evaluating
from retrieval.share import ALONE, Share

__all__ = ["KIND", "Embeddings", "embed_shards", "evaluating"]


@dataclass(frozen=True)
class Embeddings:
    """Pictures and texts of a set as unit rows of one space, in memory.

    Attributes:
        images: float32 `(images, dim)`.
        texts: float32 `(texts, dim)`.
        image_of_text: int64 `(texts,)`: the row of the picture that each text describes.
        keys: `images` keys of the samples.
        samples: int64 `(images,)`: global number of each sample in its set, for reading it again.
        captions: The `texts` strings.
        model: Name of the encoder, for people.
        fingerprint: Hash of its weights and configuration, for checks.
        shards: The specification of the set.
        faults: Samples left out, by cause.
        meta: Further keys of each picture's JSON (`retrieval.shard_rows.META`), for filters; may be left out.
    """

    images: np.ndarray
    texts: np.ndarray
    image_of_text: np.ndarray
    keys: list[str]
    samples: np.ndarray
    captions: list[str]
    model: str
    fingerprint: str
    shards: list[str]
    faults: dict[str, int]
    meta: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: str | Path, *, dtype: str = "float32") -> Path:
        """Write the folder that `pairstream retrieval embed` writes, as a single part; all or none.

        Args:
            folder: Replaced when it exists.
            dtype: `float32`, or `float16` for half the bytes.

        Returns:
            The folder.
        """
        rows = PartRows(self.images, self.texts, self.image_records(), self.text_records())
        with new_folder(Path(folder)) as temporary:
            write_part(temporary, 0, rows, dtype=dtype, size=int(self.samples.max(initial=-1)) + 1)
            write_set(
                temporary,
                {
                    "model": self.model,
                    "fingerprint": self.fingerprint,
                    "dim": int(self.images.shape[1]),
                    "dtype": dtype,
                    "shards": self.shards,
                },
                faults=self.faults,
            )
        return Path(folder)

    def image_records(self) -> list[dict[str, Any]]:
        """One record a picture: `key`, `sample` and what `meta` has."""
        meta = self.meta or [{}] * len(self.keys)
        return [
            {"key": key, "sample": int(sample), **more}
            for key, sample, more in zip(self.keys, self.samples, meta, strict=True)
        ]

    def text_records(self) -> list[dict[str, Any]]:
        """One record a text: `text`, the `key` of its picture and that picture's row `image`."""
        return [
            {"text": text, "key": self.keys[image], "image": int(image)}
            for text, image in zip(self.captions, self.image_of_text, strict=True)
        ]

    @classmethod
    def load(cls, folder: str | Path) -> Embeddings:
        """Read a whole folder that `save` or `pairstream retrieval embed` wrote into memory, as float32.

        `EmbeddingSet` reads it part by part instead.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged or unfinished.
        """
        found = EmbeddingSet.open(folder)
        images, texts, owners, keys, samples, captions, meta = [], [], [], [], [], [], []
        for part in found:
            images.append(np.asarray(part.images, dtype=np.float32))
            texts.append(np.asarray(part.texts, dtype=np.float32))
            owners += [record["image"] + len(keys) for record in part.text_records]
            keys += [record["key"] for record in part.image_records]
            samples += [record["sample"] + part.base for record in part.image_records]
            captions += [record["text"] for record in part.text_records]
            meta += [
                {name: value for name, value in record.items() if name not in ("key", "sample", "crc32")}
                for record in part.image_records
            ]
        return cls(
            images=np.concatenate(images),
            texts=np.concatenate(texts),
            image_of_text=np.array(owners, dtype=np.int64),
            keys=keys,
            samples=np.array(samples, dtype=np.int64),
            captions=captions,
            meta=meta if any(meta) else [],
            **{name: found.manifest[name] for name in ("model", "fingerprint", "shards", "faults")},
        )


def embed_shards(
    encoder: Encoder,
    shards: str | Iterable[str],
    *,
    batch_size: int = 64,
    limit: int | None = None,
    workers: int = 0,
    max_faults: float = 0.01,
    share: Share = ALONE,
    show: bool = False,
) -> Embeddings:
    """Embed a set of pictures with all their captions.

    Everything is held in memory: `4 * dim` bytes a picture and a text (2 GiB for a million rows of 512).
    `retrieval.parts` writes larger sets to disk, shard by shard.

    Args:
        encoder: The model.
        shards: What `data.shards.expand_shards` takes.
        batch_size: Pictures at a time, with all their captions.
        limit: Only the first so many samples; None for all.
        workers: Loader processes; 0 decodes in this one.
        max_faults: Share of bad samples past which the work stops.
        share: This process's share of the work; all processes get all rows.
        show: Show progress.

    Returns:
        Rows in the order of the shards; bad samples are left out and counted.

    Raises:
        ValueError: A limit below 1, no usable sample, too many faults, or an embedding that is not finite.

    Example:
        >>> found = embed_shards(load_encoder("runs/scenes_cpu"), "shards/test")   # doctest: +SKIP
        >>> retrieval_metrics(found.images, found.texts, found.image_of_text)      # doctest: +SKIP
    """
    shards = [shards] if isinstance(shards, str) else list(shards)
    takes = plan_takes(shards, limit)
    log, faults = FaultLog(max_faults), []
    batches: list[RowBatch] = []
    base, bases, keys = 0, [], []
    owners = []
    with ProgressBar("embed", len(takes), show=show) as bar:
        made = embed_batches(encoder, takes, batch_size=batch_size, workers=workers, share=share)
        for batch in share.together(made):
            log.add(batch.faults, batch.seen)
            log.judge()
            faults += batch.faults
            owners.append(batch.image_of_text + len(keys))
            keys += [record["key"] for record in batch.records]
            batches.append(batch)
            bases.append(base)
            if batch.ends:
                base += batch.size
                bar.advance(note=f"{len(keys)} pictures")
    if not keys:
        raise ValueError(nothing_usable(shards, limit, faults))
    log.judge(final=True)
    records = [
        {**record, "sample": record["sample"] + base}
        for batch, base in zip(batches, bases, strict=True)
        for record in batch.records
    ]
    meta = [
        {name: value for name, value in record.items() if name not in ("key", "sample")} for record in records
    ]
    return Embeddings(
        images=torch.cat([batch.images for batch in batches]).numpy(),
        texts=torch.cat([batch.texts for batch in batches]).numpy(),
        image_of_text=torch.cat(owners).numpy(),
        keys=keys,
        samples=np.array([record["sample"] for record in records], dtype=np.int64),
        captions=[text for batch in batches for text in batch.captions],
        model=encoder.name,
        fingerprint=encoder.fingerprint,
        shards=shards,
        faults=count_faults(faults),
        meta=meta if any(meta) else [],
    )


def plan_takes(shards: list[str], limit: int | None) -> list[Take]:
    """The shards that a specification means, and how much of each.

    Without a limit no shard is opened; with one, headers are scanned until it is reached.

    Raises:
        ValueError: A limit below 1, or no shards.
    """
    if limit is None:
        return [Take(name) for name in expand_shards(shards)]
    if limit < 1:
        raise ValueError(f"limit must be at least 1 sample, got {limit}")
    takes = []
    for name in expand_shards(shards):
        count = min(limit, len(index_shards([name])[0]))
        takes.append(Take(name, count))
        limit -= count
        if not limit:
            break
    return takes


def nothing_usable(shards: list[str], limit: int | None, faults: list[FaultRecord]) -> str:
    """The message for a set of which nothing is left."""
    first = "none of the samples" if limit is None else f"none of the first {limit} samples"
    return f"{first} of {', '.join(shards)} can be used: {count_faults(faults) or 'there are none'}"
