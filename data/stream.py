"""The pair stream: shards to batches, in an order that depends on nothing but the seed.

One way data flows: `EpochOrder` names a global sample index for each position; a rank takes its slice of
global batch t; a loader worker reads the samples of that slice, `load`s each, and `collate`s them. Nobody
keeps state, so that resuming means starting at another batch number, and ranks and workers may change from
run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.faults import Fault, FaultLog, FaultRecord
from data.order import WINDOW, EpochOrder, rank_slice, sample_rng
from data.pairs import CAPTIONS, PairCollate, PairLoad
from data.samples import RawSample, Shards, index_shards, read_sample
from data.tar import ShardReader
from data.tokens import batch_tokenizer
from data.transforms import MAX_PIXELS, EvalTransform, TrainTransform

Load = Callable[[RawSample, np.random.Generator], Any]
Collate = Callable[[list[Any]], dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch.

    Attributes:
        step: Number of the global batch, counted through all epochs.
        epoch: `step // batches_per_epoch`.
        keys: Keys of the samples, in order.
        indices: Their global indices; int64 (b,).
        data: What `collate` made of them; `batch["images"]` is short for `batch.data["images"]`.
    """

    step: int
    epoch: int
    keys: list[str]
    indices: torch.Tensor
    data: dict[str, Any]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, name: str) -> Any:
        return self.data[name]


class PairStream:
    """Shards of image-text pairs as an endless, resumable sequence of batches.

    - Same seed, same order of samples, with any number of loader workers.
    - Every sample exactly once per epoch, for any number of shards, workers and ranks.
    - Global batch t holds the same samples for any world size, as long as `batch_size * world_size` stays.
    - The state is one number: `iterate(start=t)` goes on where a run stopped after t batches, decoding
      nothing else.
    - A sample's random numbers come from (seed, epoch, its index), so that pixels do not depend on who loads
      them.

    A bad sample is left out and counted, which makes its batch shorter: ranks may hold batches of different
    length, and a rank may even hold none of the last batch of an epoch. `collate` must therefore accept an
    empty list.

    Args:
        shards: What `data.shards.expand_shards` takes: a folder, files, globs, braces, http(s) URLs.
        load: `load(sample, rng) -> row`; raises `Fault` for a sample that cannot be used.
        collate: `collate(rows) -> dict`; tensors in it are pinned when CUDA is there.
        batch_size: Samples per rank and batch.
        seed: Of the order and of all random choices.
        shuffle: Samples that are mixed with one another (see `data.order.EpochOrder`); True for 65,536,
            False for the shards' own order.
        rank: Number of this process.
        world_size: Number of processes.
        workers: Loader processes of this rank; 0 loads in this one.
        max_faults: Largest share of bad samples, in [0, 1), judged once 100 samples were seen and at the end
            of an epoch; 0 stops at the first.
        cache_dir: Where shards from URLs are kept; `~/.cache/pairstream/shards` when None.

    Raises:
        ValueError: No shards, no samples, too many faults, or an argument out of range.
        FileNotFoundError: A shard that cannot be had.

    Example:
        >>> stream = PairStream("shards/", load, collate, batch_size=256, workers=4)     # doctest: +SKIP
        >>> for batch in stream.iterate(start=resumed_step, stop=total_steps):            # doctest: +SKIP
        ...     train_step(batch["images"], batch["tokens"])
    """

    def __init__(
        self,
        shards: Shards,
        load: Load,
        collate: Collate,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool | int = True,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_faults: float = 0.01,
        cache_dir: str | Path | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is the samples per rank, at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of world_size {world_size}")
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.load, self.collate = load, collate
        self.batch_size, self.rank, self.world_size, self.workers = batch_size, rank, world_size, workers
        self.max_faults = max_faults
        scan = FaultLog(max_faults)
        self.indices = index_shards(shards, cache_dir=cache_dir)
        faults = [fault for index in self.indices for fault in index.faults]
        self.samples = sum(len(index) for index in self.indices)
        scan.add(faults, self.samples + sum(fault.count for fault in faults))
        if not self.samples:
            names = ", ".join(index.name for index in self.indices[:3])
            why = "".join(f"\n  {fault}" for fault in faults[:3])
            raise ValueError(f"no samples in {len(self.indices)} shards ({names} ...){why}")
        scan.judge(final=True)
        self.counts = scan.counts
        window = (WINDOW if shuffle else 0) if isinstance(shuffle, bool) else shuffle
        self.order = EpochOrder([len(index) for index in self.indices], seed=seed, window=window)
        self.global_batch = batch_size * world_size
        self.batches_per_epoch = -(-self.samples // self.global_batch)

    @property
    def faults(self) -> dict[str, int]:
        """Bad samples so far, by cause: those that the scan found and those of this rank's batches."""
        return dict(self.counts)

    def indices_of(self, step: int) -> np.ndarray:
        """Global sample indices of this rank's part of global batch `step`; int64 (<= batch_size,)."""
        epoch, number = divmod(step, self.batches_per_epoch)
        first = number * self.global_batch
        count = min(self.global_batch, self.samples - first)
        start, stop = rank_slice(count, self.rank, self.world_size)
        return self.order.positions(epoch, first + start, first + stop)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch."""
        return self.iterate(epoch * self.batches_per_epoch, (epoch + 1) * self.batches_per_epoch)

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches `start`, `start + 1`, ... up to `stop` (exclusive), or without end.

        Raises:
            ValueError: A range that cannot be; or, while running, more bad samples than `max_faults`.
        """
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"expected 0 <= start <= stop, got start={start}, stop={stop}")
        return self._iterate(start, stop)

    def _iterate(self, start: int, stop: int | None) -> Iterator[Batch]:
        loader = DataLoader(
            _Steps(self, start, stop),
            batch_size=None,  # a worker hands over whole batches; taking turns keeps their order
            num_workers=self.workers if stop is None else min(self.workers, stop - start),
            collate_fn=as_it_is,
            generator=torch.Generator(),  # or the loader would draw from, and so change, torch's global state
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker if self.workers else None,
        )
        log = FaultLog(self.max_faults)
        for made in loader:
            step = made["step"]
            epoch, number = divmod(step, self.batches_per_epoch)
            if number == 0:
                log = FaultLog(self.max_faults)  # the budget is one epoch's
            log.add(made["faults"], made["seen"])
            for fault in made["faults"]:
                self.counts[fault.cause] += fault.count
            whole = step + 1 - start >= self.batches_per_epoch
            ends = number + 1 == self.batches_per_epoch
            log.judge(final=whole and ends)
            if ends:
                log.summarise(f"epoch {epoch}")
            yield Batch(step, epoch, made["keys"], made["indices"], made["data"])

    def make_batch(self, step: int, reader: ShardReader) -> dict[str, Any]:
        """Read, load and collate this rank's part of one global batch; runs in a worker."""
        epoch = step // self.batches_per_epoch
        rows, keys, indices, faults = [], [], [], []
        numbers = self.indices_of(step).tolist()
        for number in numbers:
            shard, sample = self.order.locate(number)
            index = self.indices[shard]
            try:
                raw = read_sample(index, sample, number, reader)
                rows.append(self.load(raw, sample_rng(self.order.seed, epoch, number)))
            except Fault as fault:
                faults.append(FaultRecord(fault.cause, index.name, index.key(sample), fault.detail))
            else:
                keys.append(raw.key)
                indices.append(number)
        return {
            "step": step,
            "keys": keys,
            "indices": torch.tensor(indices, dtype=torch.int64),
            "data": self.collate(rows),
            "faults": faults,
            "seen": len(numbers),
        }


class _Steps(IterableDataset):
    """The batches that fall to one loader worker: every n-th."""

    def __init__(self, stream: PairStream, start: int, stop: int | None):
        self.stream, self.start, self.stop = stream, start, stop

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        step = self.start + number
        with ShardReader() as reader:
            while self.stop is None or step < self.stop:
                yield self.stream.make_batch(step, reader)
                step += count


def as_it_is(made: Any) -> Any:
    return made


def start_worker(_: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism


def pair_stream(
    shards: Shards,
    *,
    transform: EvalTransform | TrainTransform,
    tokenize: Callable[[Sequence[str]], torch.Tensor],
    batch_size: int,
    captions: str = "random",
    max_pixels: int = MAX_PIXELS,
    word_dropout: float = 0.0,
    scaled_decode: bool = False,
    captions_per_image: int = 1,
    **options: Any,
) -> PairStream:
    """The stream of pictures and tokens that a dual encoder is trained and measured on.

    Args:
        shards: What `data.shards.expand_shards` takes.
        transform: `TrainTransform` or `EvalTransform`.
        tokenize: Texts to int64 (n, context), for instance an open_clip tokenizer; `data.tokens` gives the ids of
            open_clip's `SimpleTokenizer` in its place, faster.
        batch_size: Samples per rank and batch.
        captions: `random` draws captions anew each epoch, `first` takes the first, `all` gives all.
        max_pixels: Pictures with more pixels are `too_large_image` faults.
        word_dropout: Share of each caption's words that is left out at random.
        scaled_decode: Decode large JPEGs at a reduced size, with `TrainTransform` only: 0.6 of the CPU time at 1024 px,
            pixels that differ by up to 2.5 of 255 on average.
        captions_per_image: How many captions `random` draws for a picture.
        options: The other arguments of `PairStream`: seed, shuffle, rank, world_size, workers, max_faults,
            cache_dir.

    Returns:
        A stream whose batches hold `images` uint8 (b, 3, h, w), `tokens` int64 (b, context) and `texts`
        (list of b strings). For `captions_per_image` k above one: `tokens` (b, k, context) and b * k `texts`.
        For `all`: `tokens` (n_texts, context), n_texts `texts`, and `image_of_text`
        int64 (n_texts,), the position of each text's picture in the batch.

    Raises:
        ValueError: An unknown `captions`, several a picture that are not drawn, `scaled_decode` with an
            `EvalTransform`, or as `PairStream` does.

    Example:
        >>> stream = pair_stream(                                                # doctest: +SKIP
        ...     "shards/", transform=TrainTransform(224), tokenize=tokenizer, batch_size=256, workers=8
        ... )
        >>> next(stream.epoch())["images"].shape                                # doctest: +SKIP
        torch.Size([256, 3, 224, 224])
    """
    if captions not in CAPTIONS:
        raise ValueError(f"captions {captions!r}: expected one of {', '.join(CAPTIONS)}")
    if captions_per_image < 1 or (captions_per_image > 1 and captions != "random"):
        raise ValueError(
            f"captions_per_image {captions_per_image} with captions {captions!r}: expected 1, or more with 'random'"
        )
    load = PairLoad(transform, captions, max_pixels, word_dropout, scaled_decode, captions_per_image)
    collate = PairCollate(batch_tokenizer(tokenize), transform.size, captions, captions_per_image)
    return PairStream(shards, load, collate, batch_size=batch_size, **options)
