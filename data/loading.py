"""What a loader worker does: it reads the samples of its share of the batches, loads each, and collates them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from data.ahead import Ahead
from data.faults import Fault, FaultRecord
from data.order import sample_rng
from data.samples import read_sample
from data.tar import ShardReader

if TYPE_CHECKING:
    from data.stream import PairStream


class Steps(IterableDataset):
    """The batches that fall to one loader worker: every n-th."""

    def __init__(self, stream: PairStream, start: int, stop: int | None):
        self.stream, self.start, self.stop = stream, start, stop

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        step = self.start + number
        stream = self.stream
        with ShardReader(locate=stream.cache.locate) as reader, Ahead(stream.fetch, number, count) as ahead:
            while self.stop is None or step < self.stop:
                if stream.remote:
                    ahead.ask(
                        stream.shards_of(
                            min(step + stream.lookahead, (self.stop or step + stream.lookahead + 1) - 1)
                        )
                    )
                yield make_batch(stream, step, reader)
                step += count


def as_it_is(made: Any) -> Any:
    return made


def start_worker(_: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
    # Schedulers send these to every process of a job, and they are the training process's to answer: a loader
    # that dies of them fails the step that would have been the last before the save. It ends with its parent.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def make_batch(stream: PairStream, step: int, reader: ShardReader) -> dict[str, Any]:
    """Read, load and collate this rank's part of one global batch; runs in a worker."""
    rows, keys, taken, faults = [], [], [], []
    mine = stream.rows_of(step)
    columns = np.stack([mine.sources, mine.epochs, mine.numbers], axis=1)  # (rows, 3)
    for source, epoch, number in columns.tolist():
        row = make_row(stream, source, epoch, number, reader, faults)
        if row is None and stream.window and faults[-1].cause == "unreadable_shard":
            row = stand_in(stream, step, source, epoch, number, reader)
        if row is not None:
            rows.append(row[0])
            keys.append(row[1])
            taken.append((row[2], source))
    numbers = torch.tensor(taken, dtype=torch.int64).reshape(-1, 2)
    return {
        "step": step,
        "keys": keys,
        "indices": numbers[:, 0],
        "sources": numbers[:, 1],
        "data": stream.collate(rows),
        "faults": faults,
        "seen": len(mine.numbers),
    }


def make_row(
    stream: PairStream, source: int, epoch: int, number: int, reader: ShardReader, faults: list[FaultRecord]
) -> tuple[Any, str, int] | None:
    """Read and load one sample: its row, key and global index; None and one more fault when it is bad."""
    index, sample = stream.locate(number)
    load = stream.sources[source].load or stream.load
    try:
        raw = read_sample(index, sample, number, reader, stream.members)
        return load(raw, sample_rng(stream.seed, epoch, number)), raw.key, number
    except Fault as fault:
        faults.append(FaultRecord(fault.cause, index.name, index.key(sample), fault.detail))
        return None


def stand_in(
    stream: PairStream, step: int, source: int, epoch: int, number: int, reader: ShardReader
) -> tuple[Any, str, int] | None:
    """A sample for the place of one whose shard cannot be read, by the epoch's order; None when it is bad too.

    It must not be in the batch already: a pair would be its own negative.
    """
    for other in stream.mixture.stand_ins(source, epoch, number):
        faults: list[FaultRecord] = []
        row = make_row(stream, source, epoch, other, reader, faults)
        if not faults or faults[0].cause != "unreadable_shard":
            whole = stream.mixture.rows(step, 0, stream.global_batch)
            return None if other in whole.numbers else row
    return None
