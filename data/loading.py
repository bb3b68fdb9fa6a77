"""What a loader does: it reads the samples of a batch, or of its part of one, loads each, and collates them."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Mapping
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.ahead import Ahead
from data.buffers import Slots, columns_of, join
from data.faults import Fault, FaultRecord
from data.order import rank_slice
from data.samples import read_sample
from data.seeds import sample_rng, sample_rngs
from data.tar import ShardReader

if TYPE_CHECKING:
    from data.stream import PairStream

Places = Mapping[str, torch.Tensor]


class Task(NamedTuple):
    """A part of one batch, as it goes to whoever makes it."""

    step: int
    part: int
    parts: int
    slot: int | None
    """Where its columns belong; None for memory of their own."""


class Part(NamedTuple):
    """What became of a task."""

    task: Task
    start: int
    """Its first row, counted as if no sample were bad."""
    keys: list[str]
    numbers: np.ndarray
    """Global index and source of each row; int64 (rows, 2)."""
    data: dict[str, Any]
    """Without the columns that lie in the slot."""
    faults: list[FaultRecord]
    seen: int
    """Samples, bad ones included."""


class Made(NamedTuple):
    """One rank's part of a global batch, whole."""

    step: int
    keys: list[str]
    numbers: torch.Tensor
    """Global index and source of each row; int64 (rows, 2)."""
    data: dict[str, Any]
    faults: list[FaultRecord]
    seen: int


class Parts(Dataset):
    """Parts of batches by their tasks; the shards stay open from one to the next."""

    def __init__(self, stream: PairStream, slots: Slots, stop: int | None):
        self.stream, self.slots, self.stop = stream, slots, stop
        self.opened: tuple[ShardReader, Ahead] | None = None

    def __getitem__(self, task: Task) -> Part:
        reader, ahead = self.opened = self.opened or self.open()
        if self.stream.remote:
            later = task.step + self.stream.lookahead
            ahead.ask(self.stream.shards_of(later if self.stop is None else min(later, self.stop - 1)))
        return make_part(self.stream, task, reader, self.slots)

    def open(self) -> tuple[ShardReader, Ahead]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            Finalize(self, self.close, exitpriority=1)  # or the process would fetch on for a while
        return ShardReader(locate=self.stream.cache.locate), Ahead(self.stream.fetch, number, count)

    def close(self) -> None:
        for opened in self.opened or ():
            opened.close()
        self.opened = None


def load_batches(stream: PairStream, start: int, stop: int | None) -> Iterator[Made]:
    """Start the stream's workers and have them make batches.

    Workers fill each batch together where `collate` names columns (`data.buffers.Placing`), else they take turns.
    """
    columns = columns_of(stream.collate)
    workers = stream.workers if stop is None or columns else min(stream.workers, stop - start)
    if start == stop:
        return iter(())
    slots = Slots(columns, stream.batch_size, shared=workers > 0)
    parts = Parts(stream, slots, stop)
    loader = DataLoader(
        parts,
        batch_size=None,
        sampler=tasks(slots, start, stop, workers),  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        collate_fn=as_it_is,
        generator=torch.Generator(),  # or the loader would draw from, and so change, torch's global state
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker if workers else None,
    )
    return put_together(iter(loader), parts)  # not when the first batch is asked for, which a thread may do


def tasks(slots: Slots, start: int, stop: int | None, workers: int) -> Iterator[Task]:
    """The tasks of batches `start` up to `stop`, in the order in which the workers take turns."""
    parts = max(workers, 1) if slots.columns else 1
    for step in itertools.count(start) if stop is None else range(start, stop):
        slot = slots.take()
        for part in range(parts):
            yield Task(step, part, parts, slot)


def put_together(made: Iterator[Part], parts: Parts) -> Iterator[Made]:
    """Whole batches from their parts, which come in the order of their tasks."""
    found: list[Part] = []
    try:
        for part in made:
            found.append(part)
            if len(found) == part.task.parts:
                del part  # it would hold on to its batch until the next one has come
                yield whole(found, parts.slots)
                found = []
    finally:
        # A traceback keeps torch's iterator alive, and the end of the process would wait for its workers in vain: they
        # ignore the signal that it sends them.
        getattr(made, "_shutdown_workers", int)()
        parts.close()


def whole(parts: list[Part], slots: Slots) -> Made:
    task = parts[0].task
    data = join([(len(part.keys), part.data) for part in parts])
    if task.slot is not None:
        data = {**slots.lend(task.slot, [(part.start, len(part.keys)) for part in parts]), **data}
    return Made(
        task.step,
        [key for part in parts for key in part.keys],
        torch.from_numpy(np.concatenate([part.numbers for part in parts])),
        data,
        [fault for part in parts for fault in part.faults],
        sum(part.seen for part in parts),
    )


def as_it_is(made: Any) -> Any:
    return made


def start_worker(_: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
    # Schedulers send these to every process of a job, and they are the training process's to answer: a loader
    # that dies of them fails the step that would have been the last before the save. It ends with its parent.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def make_part(stream: PairStream, task: Task, reader: ShardReader, slots: Slots) -> Part:
    """Read, load and collate a part of this rank's rows of one global batch; runs in a worker."""
    rows, keys, taken, faults = [], [], [], []
    mine = stream.rows_of(task.step)
    first, last = rank_slice(len(mine.numbers), task.part, task.parts)
    columns = np.stack([mine.sources, mine.epochs, mine.numbers], axis=1)  # (rows, 3)
    placed = None if task.slot is None else slots.slots[task.slot].tensors(first, last)
    more: tuple[Any, ...] = (None,) if slots.columns else ()  # what `load` and `collate` get besides
    columns = columns[first:last]
    rngs = sample_rngs(stream.seed, columns[:, 1], columns[:, 2])
    for (source, epoch, number), rng in zip(columns.tolist(), rngs, strict=True):
        if placed is not None:
            more = ({name: column[len(rows)] for name, column in placed.items()},)
        row = make_row(stream, source, number, rng, reader, faults, more)
        if row is None and stream.window and faults[-1].cause == "unreadable_shard":
            row = stand_in(stream, task.step, source, epoch, number, reader, more)
        if row is not None:
            rows.append(row[0])
            keys.append(row[1])
            taken.append((row[2], source))
    if placed is not None:
        more = ({name: column[: len(rows)] for name, column in placed.items()},)
    data = stream.collate(rows, *more)
    if placed is not None:
        data = {name: value for name, value in data.items() if name not in placed}
    numbers = np.array(taken, dtype=np.int64).reshape(-1, 2)
    return Part(task, first, keys, numbers, data, faults, last - first)


def make_row(
    stream: PairStream,
    source: int,
    number: int,
    rng: np.random.Generator,
    reader: ShardReader,
    faults: list[FaultRecord],
    more: tuple[Any, ...],
) -> tuple[Any, str, int] | None:
    """Read and load one sample: its row, key and global index; None and one more fault when it is bad."""
    index, sample = stream.locate(number)
    load = stream.sources[source].load or stream.load
    try:
        raw = read_sample(index, sample, number, reader, stream.members)
        return load(raw, rng, *more), raw.key, number
    except Fault as fault:
        faults.append(FaultRecord(fault.cause, index.name, index.key(sample), fault.detail))
        return None


def stand_in(
    stream: PairStream,
    step: int,
    source: int,
    epoch: int,
    number: int,
    reader: ShardReader,
    more: tuple[Any, ...],
) -> tuple[Any, str, int] | None:
    """A sample for the place of one whose shard cannot be read, by the epoch's order; None when it is bad too.

    It must not be in the batch already: a pair would be its own negative.
    """
    for other in stream.mixture.stand_ins(source, epoch, number):
        faults: list[FaultRecord] = []
        rng = sample_rng(stream.seed, epoch, other)
        row = make_row(stream, source, other, rng, reader, faults, more)
        if not faults or faults[0].cause != "unreadable_shard":
            whole = stream.mixture.rows(step, 0, stream.global_batch)
            return None if other in whole.numbers else row
    return None
