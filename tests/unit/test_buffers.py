import multiprocessing
import pickle
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.buffers import KEPT, Column, Slot, Slots, join
from data.faults import Fault
from data.loading import Parts, put_together, tasks
from data.pairs import PairCollate, PairLoad
from data.samples import RawSample
from data.shards import Sample, ShardWriter
from data.stream import Batch, PairStream, pair_stream
from data.transforms import EvalTransform, TrainTransform

COLUMNS = {
    "images": Column((3, 4, 5), torch.uint8, channels_last=True),
    "numbers": Column((), torch.int64),
    "views": Column((2, 3), torch.float32),
}


def tokenize(texts) -> torch.Tensor:
    """int64 (n, 4)"""
    return torch.tensor([[ord(char) for char in text.ljust(4)[:4]] for text in texts]).reshape(len(texts), 4)


class PlacedKeys:
    """A collate of one number a row, put in place, and of its key."""

    columns = {"draws": Column((2,), torch.float64)}  # noqa: RUF012

    def __call__(self, rows, placed=None):
        if placed is None:
            draws = torch.stack([draws for _, draws in rows]) if rows else torch.zeros(0, 2).double()
        else:
            draws = placed["draws"]
        return {"draws": draws, "keys": [key for key, _ in rows]}


def place_key(sample: RawSample, rng: np.random.Generator, places=None) -> tuple[str, torch.Tensor]:
    if sample.image == b"bad":
        if places is not None:
            places["draws"].fill_(-1)  # what a bad sample leaves behind is of no account
        raise Fault("undecodable_image", "bad")
    draws = torch.from_numpy(rng.random(2))
    return sample.key, draws if places is None else places["draws"].copy_(draws)


def write(folder: Path, counts: list[int], bad: frozenset[int] = frozenset()) -> list[str]:
    """Shards of keys, of which the bad ones are counted through all shards."""
    names, number = [], 0
    for shard, count in enumerate(counts):
        with ShardWriter(folder / str(shard), samples_per_shard=1000) as writer:
            for n in range(count):
                writer.write(Sample(f"{shard}-{n}", b"bad" if number in bad else b".", "jpg", ["a text"]))
                number += 1
        names.append(str(folder / str(shard) / "00000.tar"))
    return names


def plain(batch: Batch) -> tuple:
    data = {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in batch.data.items()
    }
    return batch.step, batch.keys, batch.indices.tolist(), batch.sources.tolist(), data


def by_workers(stream: PairStream, start: int, stop: int, workers: int) -> list[tuple]:
    """Batches as loader workers make them, one after the other in this process; processes would take a second each."""
    slots = Slots(stream.collate.columns, stream.batch_size, shared=False)  # pyright: ignore
    each = [Parts(stream, slots, stop) for _ in range(workers)]

    def made():
        for number, task in enumerate(tasks(slots, start, stop, workers)):
            info = SimpleNamespace(id=number % workers, num_workers=workers)
            with mock.patch("data.loading.get_worker_info", return_value=info):
                yield each[number % workers][task]

    return [
        (batch.step, batch.keys, batch.numbers.tolist(), batch.data["draws"].tolist(), batch.data["keys"])
        for batch in put_together(made(), each[0])
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("keys")


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bad=st.frozensets(st.integers(0, 30), max_size=6),
    batch_size=st.integers(1, 9),
    workers=st.integers(2, 5),
    start=st.integers(0, 4),
)
@settings(max_examples=40, deadline=None)
def test_workers_that_fill_a_batch_together_make_what_one_process_makes(
    folder, counts, bad, batch_size, workers, start
):
    name = "-".join(map(str, [*counts, "bad", *sorted(bad)]))
    if not (folder / name).exists():
        write(folder / name, counts, bad)
    shards = [str(folder / name / str(shard) / "00000.tar") for shard in range(len(counts))]
    stream = PairStream(shards, place_key, PlacedKeys(), batch_size=batch_size, max_faults=0.99)
    stop = start + 2 * stream.batches_per_epoch
    alone = PairStream(
        shards,
        lambda sample, rng: place_key(sample, rng),
        lambda rows: PlacedKeys()(rows),
        batch_size=batch_size,
        max_faults=0.99,
    )
    with mock.patch("data.stream.FaultLog"):  # all samples may be bad
        expected = [plain(batch) for batch in alone.iterate(start, stop)]
        assert [plain(batch) for batch in stream.iterate(start, stop)] == expected
    found = by_workers(stream, start, stop, workers)
    assert [(step, keys, numbers, draws) for step, keys, numbers, draws, _ in found] == [
        (step, keys, [list(pair) for pair in zip(indices, sources, strict=True)], data["draws"])
        for step, keys, indices, sources, data in expected
    ]
    assert all(keys == collated for _, keys, _, _, collated in found)


# On a machine of fewer cores torch says so.
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_pictures_by_0_2_and_4_processes_and_a_consumer_that_keeps_or_drops_its_batches(
    tmp_path, make_picture
):
    with ShardWriter(tmp_path, samples_per_shard=10) as writer:
        for n in range(33):
            image = b"no picture" if n in (3, 4, 20) else make_picture(n)
            writer.write(Sample(f"{n:05d}", image, "jpg", [f"{n} one", f"{n} two"]))

    def stream(workers: int) -> PairStream:
        return pair_stream(
            tmp_path,
            transform=TrainTransform((16, 16), scale=(0.3, 1)),
            tokenize=tokenize,
            batch_size=9,
            views=TrainTransform((8, 12), scale=(0.2, 0.5)),
            workers=workers,
            max_faults=0.2,
        )

    made = stream(0)
    made.collate = lambda rows, collate=made.collate: collate(rows)  # names no columns
    expected = [plain(batch) for batch in made.iterate(2, 10)]
    assert {len(keys) for _, keys, *_ in expected} > {9, 8}
    for workers in (0, 2, 4):
        kept = list(stream(workers).iterate(2, 10))
        assert [plain(batch) for batch in kept] == expected
        assert kept[0]["images"].is_contiguous(memory_format=torch.channels_last)
        places = set()
        dropped = []
        for batch in stream(workers).iterate(2, 10):
            places.add(batch["images"].data_ptr())
            dropped.append(plain(batch))
        assert dropped == expected
        assert len(places) <= KEPT


def test_a_failing_load_ends_the_workers_though_its_traceback_is_kept(tmp_path):
    shards = write(tmp_path, [6], frozenset({2}))
    stream = PairStream(shards, fail, PlacedKeys(), batch_size=4, workers=2, shuffle=False)
    with pytest.raises(RuntimeError, match="no such thing") as caught:
        list(stream.iterate(0, 50))
    assert caught.traceback
    assert not multiprocessing.active_children()


def fail(sample, rng, places=None):
    if sample.image == b"bad":
        raise RuntimeError("no such thing")
    return place_key(sample, rng, places)


def test_memory_of_a_slot_is_laid_out_by_column_and_shared_by_copies():
    slot = Slot.make(COLUMNS, 6, shared=True)
    assert slot.memory.is_shared()
    arrays = slot.arrays()
    assert {name: array.shape for name, array in arrays.items()} == {
        "images": (6, 3, 4, 5),
        "numbers": (6,),
        "views": (6, 2, 3),
    }
    for number, array in enumerate(arrays.values()):
        array[:] = number + 1
    assert [int(array.max()) for array in slot.arrays().values()] == [1, 2, 3]  # none lies in another
    tensors = slot.tensors(2, 5)
    assert tensors["images"].is_contiguous(memory_format=torch.channels_last)
    assert [tensor.dtype for tensor in tensors.values()] == [torch.uint8, torch.int64, torch.float32]
    tensors["numbers"][0] = 7
    assert arrays["numbers"].tolist() == [2, 2, 7, 2, 2, 2]
    assert not Slot.make(COLUMNS, 6, shared=False).memory.is_shared()


def test_a_slot_is_free_when_nothing_of_its_batch_is_left():
    slots = Slots(COLUMNS, 6, shared=False)
    assert [slots.take() for _ in range(KEPT + 1)] == [*range(KEPT), None]
    batch = slots.lend(2, [(0, 6)])
    assert slots.take() is None
    row = batch["images"][1].numpy()[0]
    del batch
    assert slots.take() is None  # an array that shares the memory
    del row
    assert slots.take() == 2
    assert slots.take() is None
    assert Slots({}, 6, shared=True).take() is None


def test_gaps_between_parts_are_closed():
    slots = Slots(COLUMNS, 8, shared=False)
    number = slots.take()
    assert number is not None
    slots.slots[number].arrays()["numbers"][:] = np.arange(8)
    slots.slots[number].arrays()["images"][:] = np.arange(8)[:, None, None, None]
    batch = slots.lend(number, [(0, 1), (3, 3), (6, 0), (7, 1)])
    assert batch["numbers"].tolist() == [0, 3, 4, 5, 7]
    assert batch["images"][:, 2, 1, 3].tolist() == [0, 3, 4, 5, 7]
    assert slots.lend(number, [(0, 0), (4, 0)])["views"].shape == (0, 2, 3)


def test_parts_are_put_end_to_end():
    none, some, more = ({"a": torch.zeros(n, 2), "b": list("xyz"[:n])} for n in (0, 1, 2))
    none["a"] = torch.zeros(0, 9)  # nobody knows the shape of no rows
    joined = join([(0, none), (1, some), (0, none), (2, more)])
    assert joined["a"].shape == (3, 2)
    assert joined["b"] == ["x", "x", "y"]
    assert join([(0, none), (0, none)])["a"].shape == (0, 9)
    assert join([(1, {"any": 1})]) == {"any": 1}
    with pytest.raises(TypeError, match="collate gave 'any' as int: several workers make a batch together"):
        join([(1, {"any": 1}), (1, {"any": 1})])


def test_what_cannot_be_made_in_parts_names_no_columns():
    options = {"tokenize": tokenize, "size": (8, 9)}
    assert PairCollate(**options).columns == {"images": Column((3, 8, 9), torch.uint8, channels_last=True)}
    assert PairCollate(**options, views=(4, 5)).columns["views"] == Column((2, 3, 4, 5), torch.uint8)
    assert PairCollate(**options, captions="all").columns == {}
    assert PairCollate(**options, stored=("teacher",)).columns == {}


@pytest.mark.parametrize(
    "transform",
    [
        EvalTransform(8),
        EvalTransform((8, 6)),
        EvalTransform(8, resize_mode="longest"),
        EvalTransform((8, 6), resize_mode="squash"),
        TrainTransform(8),
        TrainTransform(8, interpolation="bilinear"),
        TrainTransform(8, hflip=1.0),
        TrainTransform(8, color_jitter=0.5),
        TrainTransform((8, 6), grayscale=1.0),
    ],
    ids=lambda transform: type(transform).__name__,
)
@pytest.mark.parametrize("side", [(48, 30), (8, 8), (5, 7)])
def test_a_row_lies_in_its_place(make_picture, transform, side):
    sample = RawSample("k", "s", 0, make_picture(1, side, "PNG"), "png", {"caption": "a text"})
    load = PairLoad(transform)
    place = torch.zeros(*transform.size, 3, dtype=torch.uint8).permute(2, 0, 1)
    pair = load(sample, np.random.default_rng(0), {"images": place})
    assert pair.image is place
    alone = load(sample, np.random.default_rng(0)).image
    assert torch.equal(place, alone)
    assert pickle.loads(pickle.dumps(alone)).shape == (3, *transform.size)
