"""The pair stream: shards to batches, in an order that depends on nothing but the seed.

One way data flows: `EpochOrder` names a global sample index for each position; a rank takes its slice of
global batch t; a loader worker reads the samples of that slice, `load`s each, and `collate`s them. Nobody
keeps state, so that resuming means starting at another batch number, and ranks and workers may change from
run to run.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.device import on_device
from data.faults import FaultLog
from data.fetch import ShardCache, cache_folder, is_remote
from data.labels import LabelTexts
from data.loading import load_batches
from data.mixture import Mix, Mixture, Rows, Sources, as_sources, warn_of_shared_shards, whole_weights
from data.order import WINDOW, EpochOrder, rank_slice, source_seed
from data.pairs import CAPTIONS, PairCollate, PairLoad, own_captions
from data.samples import RawSample, index_shards
from data.stored import require_members
from data.tar import ShardIndex
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
        data: What `collate` made of them; `batch["images"]` is short for `batch.data["images"]`, and
            `batch["indices"]` for `batch.indices`.
        sources: Number of each sample's source; int64 (b,), zeros where there is one.
    """

    step: int
    epoch: int
    keys: list[str]
    indices: torch.Tensor
    data: dict[str, Any]
    sources: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, name: str) -> Any:
        return self.indices if name == "indices" else self.data[name]


class PairStream:
    """Shards of image-text pairs as an endless, resumable sequence of batches.

    - Same seed, same order of samples, with any number of loader workers.
    - Every sample exactly once per epoch, for any number of shards, workers and ranks.
    - Global batch t holds the same samples for any world size, as long as `batch_size * world_size` stays.
    - The state is one number: `iterate(start=t)` goes on where a run stopped after t batches, decoding
      nothing else; `state_dict` has it, with what it takes to know that the batches are the same ones.
    - A sample's random numbers come from (seed, epoch, its index), so that pixels do not depend on who loads
      them.

    A bad sample is left out and counted, which makes its batch shorter: ranks may hold batches of different
    length, and a rank may even hold none of the last batch of an epoch. `collate` must therefore accept an
    empty list. A sample whose shard cannot be read any more counts as bad too; when shuffling (for
    training, that is), one of the next shard stands in.

    Args:
        shards: What `data.shards.expand_shards` takes: a folder, files, globs, braces, URLs, `pipe:` commands; or
            a list of `Source`, which are mixed (`data.mixture.Mixture` says how).
        load: `load(sample, rng) -> row`; raises `Fault` for a sample that cannot be used.
        collate: `collate(rows) -> dict`; one with columns of fixed size (`data.buffers.Placing`) lets all workers
            fill each batch together.
        batch_size: Samples per rank and batch.
        seed: Of the order and of all random choices.
        shuffle: Samples that are mixed with one another (see `data.order.EpochOrder`); True for 65,536,
            False for the shards' own order.
        rank: Number of this process.
        world_size: Number of processes.
        workers: Loader processes of this rank; 0 loads in this one.
        max_faults: Largest share of bad samples, in [0, 1), judged once 100 samples were seen and at the end
            of an epoch; 0 stops at the first.
        cache_dir: Where shards from elsewhere are kept; `~/.cache/pairstream/shards` when None.
        cache_limit: Bytes that the shards there may take; None for no limit.
        temperature: Of a mixture whose sources have no weights: they are `samples ** (1 / temperature)`; None
            and 1 go by size.
        mix: `samples` gives every batch its exact share of each source, `batches` takes each from one source.
        members: Extensions of further files that `load` wants in `RawSample.members`.

    Raises:
        ValueError: No shards, no samples, too many faults, or an argument out of range.

    Example:
        >>> stream = PairStream("shards/", load, collate, batch_size=256, workers=4)     # doctest: +SKIP
        >>> for batch in stream.iterate(start=resumed_step, stop=total_steps):            # doctest: +SKIP
        ...     train_step(batch["images"], batch["tokens"])
    """

    def __init__(
        self,
        shards: Sources,
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
        cache_limit: int | None = None,
        temperature: float | None = None,
        mix: Mix = "samples",
        members: Sequence[str] = (),
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is the samples per rank, at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of world_size {world_size}")
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if cache_limit is not None and cache_limit < 1:
            raise ValueError(f"cache_limit is a number of bytes, at least 1, got {cache_limit}")
        self.load, self.collate, self.members = load, collate, tuple(members)
        self.batch_size, self.rank, self.world_size, self.workers = batch_size, rank, world_size, workers
        self.max_faults = max_faults
        self.cache = ShardCache(Path(cache_dir or cache_folder()), cache_limit)
        self.sources = as_sources(shards)
        scan = FaultLog(max_faults)
        found = [index_shards(source.shards, cache=self.cache, tolerant=True) for source in self.sources]
        self.indices = [index for indices in found for index in indices]
        faults = [fault for index in self.indices for fault in index.faults]
        self.samples = sum(len(index) for index in self.indices)
        scan.add(faults, self.samples + sum(fault.count for fault in faults))
        for source, indices in zip(self.sources, found, strict=True):
            if not any(map(len, indices)):
                names = ", ".join(index.name for index in indices[:3])
                why = "".join(f"\n  {fault}" for fault in faults[:3])
                what = f"source {source.name}: " if len(self.sources) > 1 else ""
                raise ValueError(f"{what}no samples in {len(indices)} shards ({names} ...){why}")
        scan.judge(final=True)
        self.counts = scan.counts
        self.seed = seed
        self.window = (WINDOW if shuffle else 0) if isinstance(shuffle, bool) else shuffle
        orders = [
            EpochOrder(
                [len(index) for index in indices],
                seed=source_seed(seed, number),
                window=self.window,
                replacement=source.replacement,
            )
            for number, (source, indices) in enumerate(zip(self.sources, found, strict=True))
        ]
        weights = whole_weights(
            [order.total for order in orders], [source.weight for source in self.sources], temperature
        )
        self.global_batch = batch_size * world_size
        names = [source.name for source in self.sources]
        warn_of_shared_shards(names, [[index.path for index in indices] for indices in found])
        self.mixture = Mixture(orders, weights, names, global_batch=self.global_batch, mix=mix)
        self.batches_per_epoch = self.mixture.batches_per_epoch
        self.bases = np.cumsum(
            [0, *(len(index) for index in self.indices)]
        )  # global index of each first sample
        self.remote = any(is_remote(index.name) for index in self.indices)
        self.lookahead = -(-self.window // self.global_batch) + 1  # batches; the next window's shards
        self.step = 0

    @property
    def faults(self) -> dict[str, int]:
        """Bad samples so far, by cause: those that the scan found and those of this rank's batches."""
        return dict(self.counts)

    def state_dict(self) -> dict[str, Any]:
        """What going on elsewhere needs: the number of the next batch, and which batches these are. Of constant size.

        `step` counts what was taken from the iterator, so that a loader's read-ahead is not lost.
        """
        return {"step": self.step, "faults": self.faults, **self.identity}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the order of the batches."""
        digest = hashlib.sha256()
        for index in self.indices:
            digest.update(f"{len(index)} {zlib.crc32(index.keys.tobytes())}\n".encode())
        names = [[order.total, order.replacement] for order in self.mixture.orders]
        return {
            "samples": self.samples,
            "shards": digest.hexdigest()[:32],
            "sources": [[*name, weight] for name, weight in zip(names, self.mixture.weights, strict=True)],
            "mix": self.mixture.mix if len(names) > 1 else None,
            "seed": self.seed,
            "shuffle": self.window,
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let `iter(stream)` go on where another stream's `state_dict` was taken.

        Ranks and workers may be others; what decides the order may not.

        Raises:
            TypeError: It is no state.
            ValueError: The state is of other batches; the message has what differs.
        """
        if not isinstance(state, dict):
            raise TypeError(
                f"the state of a stream is a dict from its state_dict, got {type(state).__name__}"
            )
        mine = self.identity
        other = [name for name, value in mine.items() if state.get(name) != value]
        if type(state.get("step")) is not int or state["step"] < 0:
            other.append("step")
        if not isinstance(state.get("faults"), dict):
            other.append("faults")
        if other:
            here = {name: f", here {mine[name]!r}" for name in mine}
            told = ", ".join(f"{name} {state.get(name)!r}{here.get(name, '')}" for name in other)
            raise ValueError(f"the state of another stream cannot be taken up: it has {told}")
        self.step = state["step"]
        self.counts = Counter(state["faults"])

    def rows_of(self, step: int) -> Rows:
        """This rank's part of global batch `step`, at most `batch_size` rows."""
        start, stop = rank_slice(self.mixture.size(step), self.rank, self.world_size)
        return self.mixture.rows(step, start, stop)

    def locate(self, number: int) -> tuple[ShardIndex, int]:
        """Shard and number within the shard of a global sample index."""
        shard = int(self.bases.searchsorted(number, side="right")) - 1
        return self.indices[shard], number - int(self.bases[shard])

    def shards_of(self, step: int) -> list[int]:
        """Numbers of the shards that global batch `step` reads from."""
        numbers = self.mixture.rows(step, 0, self.global_batch).numbers
        return np.unique(np.searchsorted(self.bases, numbers, side="right") - 1).tolist()

    def fetch(self, shard: int) -> None:
        """Bring a shard into the cache, by its number."""
        self.cache.locate(self.indices[shard])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where `state_dict` would say that the stream is, without end."""
        return self.iterate(self.step)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch."""
        return self.iterate(epoch * self.batches_per_epoch, (epoch + 1) * self.batches_per_epoch)

    def iterate(
        self,
        start: int = 0,
        stop: int | None = None,
        device: str | torch.device | None = None,
        stay: Collection[str] = (),
    ) -> Iterator[Batch]:
        """Batches `start`, `start + 1`, ... up to `stop` (exclusive), or without end.

        With a CUDA `device` the tensors of `data` lie there, but for those that `stay` in pinned memory: a thread pins
        and copies them, two batches ahead.

        Raises:
            ValueError: A range that cannot be; or, while running, more bad samples than `max_faults`.
        """
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"expected 0 <= start <= stop, got start={start}, stop={stop}")
        return self._iterate(start, stop, device, stay)

    def _iterate(
        self, start: int, stop: int | None, device: str | torch.device | None, stay: Collection[str]
    ) -> Iterator[Batch]:
        log = FaultLog(self.max_faults)
        for made in on_device(load_batches(self, start, stop), device, stay):
            epoch, number = divmod(made.step, self.batches_per_epoch)
            if number == 0:
                log = FaultLog(self.max_faults)  # the budget is one epoch's
            log.add(made.faults, made.seen)
            for fault in made.faults:
                self.counts[fault.cause] += fault.count
            whole = made.step + 1 - start >= self.batches_per_epoch
            ends = number + 1 == self.batches_per_epoch
            log.judge(final=whole and ends)
            if ends:
                log.summarise(f"epoch {epoch}")
            self.step = made.step + 1
            indices, sources = made.numbers.T
            yield Batch(made.step, epoch, made.keys, indices, made.data, sources)
            del made  # the consumer's alone from here on, so that its memory is free as soon as it lets go


def pair_stream(
    shards: Sources,
    *,
    transform: EvalTransform | TrainTransform,
    tokenize: Callable[[Sequence[str]], torch.Tensor],
    batch_size: int,
    captions: str = "random",
    max_pixels: int = MAX_PIXELS,
    word_dropout: float = 0.0,
    scaled_decode: bool = False,
    captions_per_image: int = 1,
    stored: Sequence[str] = (),
    views: TrainTransform | None = None,
    labels: LabelTexts | None = None,
    **options: Any,
) -> PairStream:
    """The stream of pictures and tokens that a dual encoder is trained and measured on.

    Args:
        shards: What `PairStream` takes.
        transform: `TrainTransform` or `EvalTransform`.
        tokenize: Texts to int64 (n, context), for instance an open_clip tokenizer; `data.tokens` gives the ids of
            open_clip's `SimpleTokenizer` in its place, faster.
        batch_size: Samples per rank and batch.
        captions: `random` draws captions anew each epoch, `first` takes the first, `longest` that of most characters,
            `all` gives all. A `Source` may have its own, and rewritten captions.
        max_pixels: Pictures with more pixels are `too_large_image` faults.
        word_dropout: Share of each caption's words that is left out at random.
        scaled_decode: Decode large JPEGs at a reduced size, with `TrainTransform` only: 0.6 of the CPU time at 1024 px,
            pixels that differ by up to 2.5 of 255 on average.
        captions_per_image: How many captions `random` draws for a picture.
        stored: Teachers whose embeddings every sample must have beside it (`data.stored`).
        views: Gives two more views of each picture.
        labels: Makes texts of the class labels of samples that have one, in place of captions.
        options: The other arguments of `PairStream`: seed, shuffle, rank, world_size, workers, max_faults,
            cache_dir, cache_limit, temperature, mix.

    Returns:
        A stream whose batches hold `images` uint8 (b, 3, h, w), `tokens` int64 (b, context) and `texts`
        (list of b strings). For `captions_per_image` k above one: `tokens` (b, k, context) and b * k `texts`.
        For `all`: `tokens` (n_texts, context), n_texts `texts`, and `image_of_text`
        int64 (n_texts,), the position of each text's picture in the batch. With `views`: `views` uint8
        (b, 2, 3, h, w). For each teacher of `stored`: `NAME.image` and `NAME.text` float32 (b, d), `NAME.scale` (b,).

    Raises:
        ValueError: An unknown `captions`, several a picture that are not drawn, `scaled_decode` with an
            `EvalTransform`, a sample without what a stored teacher said of it, or as `PairStream` does.

    Example:
        >>> stream = pair_stream(                                                # doctest: +SKIP
        ...     "shards/", transform=TrainTransform(224), tokenize=tokenizer, batch_size=256, workers=8
        ... )
        >>> next(stream.epoch())["images"].shape                                # doctest: +SKIP
        torch.Size([256, 3, 224, 224])
    """
    if captions not in CAPTIONS:
        raise ValueError(f"captions {captions!r}: expected one of {', '.join(CAPTIONS)}")
    if captions_per_image < 1:
        raise ValueError(f"captions_per_image {captions_per_image}: expected at least 1")
    stored = tuple(stored)
    load = PairLoad(
        transform,
        captions,
        max_pixels,
        word_dropout,
        scaled_decode,
        captions_per_image,
        stored=stored,
        views=views,
        labels=labels,
    )
    sources = [own_captions(source, load) for source in as_sources(shards)]
    collate = PairCollate(
        batch_tokenizer(tokenize),
        transform.size,
        captions,
        captions_per_image,
        stored,
        views.size if views else None,
    )
    stream = PairStream(sources, load, collate, batch_size=batch_size, members=load.members, **options)
    require_members(stream.indices, stored)
    return stream


def set_picture_size(stream: PairStream, size: tuple[int, int]) -> None:
    """Let a stream that `pair_stream` made give pictures of another size, from its next `iterate` on.

    Args:
        stream: Changed in place; which samples a batch holds, and their crops, stay as they were.
        size: (height, width), pixels.
    """

    def resized(load: Any) -> Any:
        views = load and load.views and replace(load.views, size=size)
        return load and replace(load, transform=replace(load.transform, size=size), views=views)

    collate: Any = stream.collate
    stream.load = resized(stream.load)
    stream.collate = replace(collate, size=size, views=collate.views and size)
    stream.sources = [replace(source, load=resized(source.load)) for source in stream.sources]
