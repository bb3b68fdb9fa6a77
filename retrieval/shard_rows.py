"""Shards to rows of one space, batch by batch: what every way of embedding a set goes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.faults import Fault, FaultRecord
from data.loading import as_it_is, start_worker
from data.pairs import PairCollate, PairLoad
from data.samples import index_shards, read_sample
from data.tar import ShardIndex, ShardReader
from data.transforms import EvalTransform
from pretrain.encoder import Encoder
from retrieval.share import ALONE, Share

META = (
    "url",
    "width",
    "height",
    "similarity",
    "punsafe",
    "pwatermark",
    "label",
)  # JSON keys that filters use


class Take(NamedTuple):
    """A shard of a set, and how many of its samples count; None for all."""

    name: str
    samples: int | None = None


@dataclass(frozen=True)
class RowBatch:
    """Rows of some neighbouring samples of one shard.

    Attributes:
        shard: Number of the shard among those asked for.
        images: float32 `(b, dim)` unit rows.
        texts: float32 `(n, dim)` unit rows of all their captions.
        image_of_text: int64 `(n,)`: the position of each text's picture in the batch.
        records: One a picture: `key`, `sample` (its number within the shard), and its JSON's keys of `META`.
        captions: The n strings.
        faults: Samples that gave no row; with a shard's first batch also what its scan found.
        seen: Samples looked at, those of `faults` included.
        ends: The shard has no further batch.
        size: Samples in the whole shard.
    """

    shard: int
    images: torch.Tensor
    texts: torch.Tensor
    image_of_text: torch.Tensor
    records: list[dict[str, Any]]
    captions: list[str]
    faults: list[FaultRecord]
    seen: int
    ends: bool
    size: int


class _Task(NamedTuple):
    """One batch of one shard, as it goes to a loader process: the index of its own samples only."""

    shard: int
    index: ShardIndex
    first: int
    ends: bool
    size: int


@dataclass(frozen=True)
class _Decode(Dataset):
    """A task to decoded pictures and tokens; runs in a loader process."""

    load: PairLoad
    collate: PairCollate

    def __getitem__(self, task: _Task) -> dict[str, Any]:
        index = task.index
        rows, records, faults = [], [], list(index.faults)
        lost = sum(fault.count for fault in faults)
        with ShardReader() as reader:
            for number in range(len(index)):
                try:
                    raw = read_sample(index, number, task.first + number, reader)
                    rows.append(self.load(raw, np.random.default_rng(0)))  # no random choice is made
                except Fault as fault:
                    faults.append(FaultRecord(fault.cause, index.name, index.key(number), fault.detail))
                else:
                    meta = {name: raw.record[name] for name in META if is_plain(raw.record.get(name))}
                    records.append({"key": raw.key, "sample": raw.index, **meta})
        return {
            "task": (task.shard, task.ends, task.size),
            "data": self.collate(rows),
            "records": records,
            "faults": faults,
            "seen": len(index) + lost,
        }


def embed_batches(
    encoder: Encoder,
    shards: Sequence[Take],
    *,
    batch_size: int = 64,
    workers: int = 0,
    share: Share = ALONE,
) -> Iterator[RowBatch]:
    """Decode and embed shards in their order, each sample once.

    No batch spans two shards, so that a shard's rows do not depend on its neighbours, nor on who else embeds
    the others. A process alone looks at a shard only when its turn comes; one of several scans all for their sizes.

    Args:
        encoder: The model.
        shards: What to read; URLs are fetched.
        batch_size: Pictures at a time, with all their captions.
        workers: Loader processes; 0 decodes in this one.
        share: Which of the batches are to be made.

    Yields:
        At least one batch a shard, even when it has no usable sample.

    Raises:
        ValueError: An embedding that is NaN, infinite or zero.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(
            f"expected a batch_size of at least 1 and workers of at least 0, got {batch_size}, {workers}"
        )
    transform: EvalTransform = encoder.transform
    decode = _Decode(
        PairLoad(transform, "all"),
        PairCollate(
            encoder.tokenizer, transform.size, "all"
        ),  # alone: loader processes must not get the towers
    )
    tasks = _tasks(shards, batch_size)
    loader = DataLoader(
        decode,
        sampler=tasks if share.world == 1 else share.part(list(tasks)),  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=workers,
        collate_fn=as_it_is,
        generator=torch.Generator(),  # or the loader would draw from torch's global state
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker if workers else None,
    )
    with evaluating(encoder):
        for made in loader:
            data, records = made["data"], made["records"]
            images = encode(encoder.encode_images, data["images"], encoder.embed_dim)
            texts = encode(encoder.encode_texts, data["tokens"], encoder.embed_dim)
            owner = data["image_of_text"]
            for what, rows, of in (
                ("picture", images, torch.arange(len(records))),
                ("text", texts, owner),
            ):
                usable = torch.isfinite(rows).all(1) & (rows != 0).any(1)
                if not usable.all():
                    key = records[int(of[~usable][0])]["key"]
                    raise ValueError(
                        f"{encoder.name}: the embedding of a {what} of sample {key!r} is NaN, infinite or "
                        "zero; look for an overflow in the model or a damaged checkpoint"
                    )
            shard, ends, size = made["task"]
            yield RowBatch(
                shard,
                images,
                texts,
                owner,
                records,
                data["texts"],
                made["faults"],
                made["seen"],
                ends,
                size,
            )


def encode(function: Callable[[Any], torch.Tensor], inputs: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows on the CPU; no call for an empty batch, which not every tower takes."""
    return function(inputs).cpu() if len(inputs) else torch.zeros((0, dim))


def _tasks(shards: Sequence[Take], batch_size: int) -> Iterator[_Task]:
    for number, (name, samples) in enumerate(shards):
        (index,) = index_shards([name])
        count = len(index) if samples is None else min(samples, len(index))
        for first in range(0, max(count, 1), batch_size):
            stop = min(first + batch_size, count)
            part = cut(index, first, stop)
            yield _Task(
                number, part if first == 0 else replace(part, faults=()), first, stop == count, len(index)
            )


def cut(index: ShardIndex, first: int, stop: int) -> ShardIndex:
    """The index of some of a shard's samples: a loader process needs no more."""
    files = slice(int(index.starts[first]), int(index.starts[stop]))
    return replace(
        index,
        keys=index.keys[first:stop],
        starts=index.starts[first : stop + 1] - index.starts[first],
        extensions=index.extensions[files],
        offsets=index.offsets[files],
        sizes=index.sizes[files],
    )


def is_plain(value: Any) -> bool:
    """Whether a JSON value is one that a filter can compare; NaN is none, and servers refuse it."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def count_faults(records: Sequence[FaultRecord | Mapping[str, Any]]) -> dict[str, int]:
    """Lost samples by cause."""
    counts: dict[str, int] = {}
    for record in records:
        cause, lost = (
            (record.cause, record.count)
            if isinstance(record, FaultRecord)
            else (record["cause"], record["count"])
        )
        counts[cause] = counts.get(cause, 0) + lost
    return counts


@contextmanager
def evaluating(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode again afterwards: training may go on."""
    before = {module: module.training for module in encoder.model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
