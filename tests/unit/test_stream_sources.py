"""Mixtures through the stream: state, workers, ranks, captions of each source, and shards that fail on the way."""

import io
import itertools
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.buffers import Slots
from data.loading import Parts, tasks
from data.mixture import Source
from data.pairs import PairLoad
from data.samples import RawSample
from data.shards import Sample, ShardWriter
from data.stream import PairStream, pair_stream
from data.transforms import EvalTransform


def load_key(sample, rng):
    return sample.key, rng.random()


def collate_keys(rows):
    return {"keys": [key for key, _ in rows], "draws": [draw for _, draw in rows]}


def write_keys(folder: Path, counts: list[int]) -> str:
    folder.mkdir()
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for n in range(count):
                info = tarfile.TarInfo(f"{folder.name}{shard}-{n}.jpg")
                info.size = 1
                tar.addfile(info, io.BytesIO(b"."))
    return str(folder)


@pytest.fixture
def sources(tmp_path) -> list[Source]:
    return [
        Source(write_keys(tmp_path / "a", [9, 4, 8]), name="a", weight=3),
        Source(write_keys(tmp_path / "b", [5, 6]), name="b", weight=1),
    ]


def stream_of(sources, **options) -> PairStream:
    return PairStream(
        sources, load_key, collate_keys, **{"batch_size": 8, "seed": 5, "shuffle": 6, **options}
    )


def plain(batch):
    return batch.step, batch.keys, batch.indices.tolist(), batch.sources.tolist(), batch["draws"]


def whole(ranks: list[list]) -> list:
    """Global batches from the batches of each rank."""
    return [
        (
            parts[0].step,
            [key for part in parts for key in part.keys],
            [x for part in parts for x in part["draws"]],
        )
        for parts in zip(*ranks, strict=True)
    ]


# On a machine of fewer cores torch says so.
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("mix", ["samples", "batches"])
def test_the_same_global_batches_for_any_workers_ranks_and_stops(sources, mix):
    one = stream_of(sources, mix=mix)
    expected = [plain(batch) for batch in one.iterate(0, 12)]
    assert {len(batch[1]) for batch in expected} == {8}
    for workers in (2, 4):
        assert [
            plain(batch) for batch in stream_of(sources, mix=mix, workers=workers).iterate(0, 12)
        ] == expected

    # One rank, killed after 3 batches; two ranks take its state, killed after 7; one rank takes theirs.
    state, found = None, []
    for world, stop in ((1, 3), (2, 7), (1, 12)):
        ranks = []
        for rank in range(world):
            stream = stream_of(
                sources, mix=mix, batch_size=8 // world, rank=rank, world_size=world, workers=2 - world % 2
            )
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
            taken = []
            for batch in stream:
                taken.append(batch)
                if batch.step + 1 == stop:
                    break
            ranks.append(taken)
            after = stream.state_dict()
        found += whole(ranks)
        state = after
    assert found == [(step, keys, draws) for step, keys, _, _, draws in expected]
    assert state["step"] == 12


def loaded(stream: PairStream, start: int, stop: int, workers: int) -> list[list[str]]:
    """Keys of batches as loader workers make them, each on its own; processes would take a second an example."""
    slots = Slots({}, stream.batch_size, shared=False)
    count = max(workers, 1)
    made = {}
    for worker in range(count):
        info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
        with mock.patch("data.loading.get_worker_info", return_value=info):
            parts = Parts(stream, slots, stop)
            for task in itertools.islice(tasks(slots, start, stop, workers), worker, None, count):
                made[task.step] = parts[task].keys
            parts.close()
    return [made[step] for step in range(start, stop)]


@given(
    shards=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(lambda counts: sum(counts) >= 4),
        min_size=1,
        max_size=3,
    ),
    weighted=st.booleans(),
    mix=st.sampled_from(["samples", "batches"]),
    shuffle=st.integers(0, 9),
    seed=st.integers(0, 99),
    runs=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 2, 4]), st.integers(1, 6)),
        min_size=1,
        max_size=5,
    ),
)
@settings(max_examples=40, deadline=None)
def test_every_key_once_an_epoch_through_any_kills_worlds_workers_and_mixtures(
    tmp_path_factory, shards, weighted, mix, shuffle, seed, runs
):
    folder = tmp_path_factory.mktemp("set")
    sources = [
        Source(write_keys(folder / "abc"[number], counts), name="abc"[number], weight=weight)
        for number, counts in enumerate(shards)
        for weight in [number + 1 if weighted else None]
    ]
    state, step, drawn = None, 0, {source.name: [] for source in sources}
    for world, workers, steps in runs:  # each run is killed after some batches, and the next takes its state
        ranks = []
        for rank in range(world):
            options = {"seed": seed, "shuffle": shuffle, "mix": mix, "rank": rank, "world_size": world}
            stream = stream_of(sources, batch_size=4 // world, **options)
            if state is not None:
                stream.load_state_dict(state)
            assert stream.step == step
            ranks.append(loaded(stream, step, step + steps, workers))
        step += steps
        state = json.loads(json.dumps({**stream.state_dict(), "step": step}))
        assert len(json.dumps(state)) < 1000
        for batch in zip(*ranks, strict=True):
            assert max(map(len, batch)) - min(map(len, batch)) <= 1
            for key in (key for part in batch for key in part):
                drawn[key[0]].append(key)
    for source, counts in zip(sources, shards, strict=True):
        keys = sorted(f"{source.name}{shard}-{n}" for shard, count in enumerate(counts) for n in range(count))
        epochs = [drawn[source.name][at : at + len(keys)] for at in range(0, step * 4, len(keys))]
        for epoch in (epoch for epoch in epochs if epoch):
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < len(keys) or sorted(epoch) == keys


def test_sources_of_rows_and_the_size_of_the_state(sources, tmp_path):
    stream = stream_of(sources)
    batch = next(iter(stream))
    assert ["ab"[source] for source in batch.sources] == [key[0] for key in batch.keys]
    assert batch.sources.dtype == torch.int64
    assert batch.sources.bincount().tolist() == [6, 2]
    assert stream.mixture.epochs_seen(7) == {"a": 42 / 21, "b": 14 / 11}
    one = PairStream(write_keys(tmp_path / "c", [3] * 40), load_key, collate_keys, batch_size=4)
    assert abs(len(json.dumps(one.state_dict())) - len(json.dumps(stream.state_dict()))) < 50


def test_shards_alone_a_list_and_one_source_are_the_same_order(tmp_path):
    folder = write_keys(tmp_path / "a", [9, 4, 8])
    names = [f"{folder}/{n}.tar" for n in range(3)]
    runs = [
        [plain(batch) for batch in stream_of(given).iterate(0, 7)]
        for given in (folder, names, tuple(map(Path, names)), [Source(folder)], [Source(names, weight=2)])
    ]
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 6}, "seed 5, here 6"),
        ({"shuffle": 7}, "shuffle 6, here 7"),
        ({"batch_size": 4}, "global_batch 8, here 4"),
        ({"mix": "batches"}, "mix 'samples', here 'batches'"),
    ],
)
def test_a_state_of_other_batches_is_refused(sources, change, words):
    state = stream_of(sources).state_dict()
    with pytest.raises(ValueError, match=f"state of another stream cannot be taken up: it has {words}"):
        stream_of(sources, **change).load_state_dict(state)


def test_a_state_of_other_weights_shards_or_no_step_is_refused(sources, tmp_path):
    state = stream_of(sources).state_dict()
    lighter = [sources[0], Source(sources[1].shards, name="b", weight=2)]
    with pytest.raises(ValueError, match="it has sources"):
        stream_of(lighter).load_state_dict(state)
    other = [sources[0], Source(write_keys(tmp_path / "c", [5, 6]), name="b", weight=1)]
    with pytest.raises(ValueError, match="it has shards"):  # as many samples, with other keys
        stream_of(other).load_state_dict(state)
    for step in (True, None, "3"):
        with pytest.raises(ValueError, match=rf"it has step {step!r}$"):
            stream_of(sources).load_state_dict({**state, "step": step})
    with pytest.raises(ValueError, match=r"it has faults None$"):
        stream_of(sources).load_state_dict({**state, "faults": None})
    with pytest.raises(TypeError, match="a dict from its state_dict, got NoneType"):
        stream_of(sources).load_state_dict(None)
    with pytest.raises(ValueError, match="it has step -1"):
        stream_of(sources).load_state_dict({**state, "step": -1})


def test_mixtures_that_cannot_be(sources):
    with pytest.raises(ValueError, match="got sources and bare shards together"):
        stream_of([sources[0], "b"])
    with pytest.raises(ValueError, match="source 'none' has no shards: give it at least one path"):
        stream_of([*sources, Source([], name="none")])
    with pytest.raises(ValueError, match="need different names, got a, a"):
        stream_of([sources[0], sources[0]])
    with pytest.raises(ValueError, match="cache_limit is a number of bytes, at least 1, got 0"):
        stream_of(sources, cache_limit=0)


# Captions


def tokenize(texts):
    return torch.tensor([[ord(text[0])] for text in texts])


def test_each_source_chooses_its_captions(tmp_path, make_picture):
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name) as writer:
            for n in range(40):
                meta = {"new": [f"{name} rewritten {n}", "x"]} if n % 2 else {}
                writer.write(Sample(f"{n}", make_picture(n), "jpg", ["short", "the longest one"], meta))
    stream = pair_stream(
        [
            Source(str(tmp_path / "one"), captions="longest"),
            Source(str(tmp_path / "two"), captions="first", rewritten_key="new", rewritten_share=0.5),
        ],
        transform=EvalTransform(8),
        tokenize=tokenize,
        batch_size=20,
    )
    texts = {0: [], 1: []}
    for batch in stream.iterate(0, 40):  # ten epochs
        for source, text in zip(batch.sources.tolist(), batch["texts"], strict=True):
            texts[source].append(text)
    assert set(texts[0]) == {"the longest one"}
    assert len(texts[1]) == 400
    rewritten = [text for text in texts[1] if text != "short"]
    assert all(text.startswith("two rewritten") for text in rewritten)
    assert 65 < len(rewritten) < 135  # half of the half that has any: 100, standard deviation 10 of 200 draws


def test_rewritten_captions_need_a_key_and_a_share():
    for options in (
        {"rewritten_key": "new"},
        {"rewritten_share": 0.5},
        {"rewritten_key": "a", "rewritten_share": 2},
    ):
        with pytest.raises(ValueError, match="rewritten captions need their JSON key and a share above 0"):
            PairLoad(EvalTransform(8), **options)
    sample = RawSample("k", "s", 0, b"", "jpg", {"caption": "a", "new": " b "})
    assert (sample.captions(), sample.captions("new"), sample.captions("none")) == (["a"], ["b"], [])


def test_captions_of_sources_that_cannot_be(tmp_path):
    options = {"transform": EvalTransform(8), "tokenize": tokenize, "batch_size": 2}
    with pytest.raises(
        ValueError, match="source x: captions 'latest': expected one of random, first, longest, all"
    ):
        pair_stream([Source("x", name="x", captions="latest")], **options)
    with pytest.raises(
        ValueError, match="source x: its captions 'first' and the stream's 'all' cannot stand in one batch"
    ):
        pair_stream([Source("x", captions="first")], captions="all", **options)
    with pytest.raises(ValueError, match="source x: rewritten captions need their JSON key and a share"):
        pair_stream([Source("x", rewritten_key="new"), Source("y")], **options)


def test_sources_that_share_shards_are_pointed_out(tmp_path, caplog):
    folder = write_keys(tmp_path / "a", [20, 20, 20])
    (tmp_path / "link").symlink_to(folder)
    other = write_keys(tmp_path / "b", [20])
    shared = [f"{tmp_path}/link/1.tar", f"{folder}/2.tar", other]
    stream_of([Source(folder, name="whole"), Source(shared, name="part"), Source(f"{other}/0.tar", name="b")])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("sources whole and part share 2 shards: a picture may stand twice in a batch")
    assert said[1].startswith("sources part and b share 1 shards")
    caplog.clear()
    stream_of([Source(folder, name="a"), Source(other, name="b")])
    assert not caplog.records


# Shards that fail on the way


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_gone_is_counted_and_the_next_one_stands_in(tmp_path, workers):
    folder = write_keys(tmp_path / "a", [20, 20, 20, 20])
    options = {"batch_size": 10, "shuffle": 80, "max_faults": 0.4, "workers": workers}
    good = [batch.keys for batch in stream_of(folder, **options).iterate(0, 8)]
    stream = stream_of(folder, **options)
    Path(folder, "1.tar").unlink()
    batches = list(stream.iterate(0, 8))
    assert stream.faults == {"unreadable_shard": 20}
    stands_in = str(stream.mixture.stand_ins(0, 0, 20)[0] // 20)
    for old, batch in zip(good, batches, strict=True):
        kept = [key for key in old if not key.startswith("a1-")]
        assert [key for key in batch.keys if key in old] == kept  # the others stand where they stood
        assert len(set(batch.keys)) == len(batch.keys)  # no pair is its own negative
        assert {key[1] for key in batch.keys if key not in old} <= {stands_in}
    assert sum(len(batch) for batch in batches) > 65  # of 80: some would have been in their batch already


def test_a_shard_that_is_gone_counts_against_the_budget(tmp_path):
    stream = stream_of(write_keys(tmp_path / "a", [20, 20]), max_faults=0.1)
    Path(tmp_path, "a", "1.tar").unlink()
    with pytest.raises(ValueError, match="20 of 40 samples cannot be used") as caught:
        list(stream.epoch())
    assert "unreadable_shard: 20" in str(caught.value)


def test_with_all_shards_gone_there_is_nothing_to_stand_in(tmp_path):
    stream = stream_of(write_keys(tmp_path / "a", [20, 20]), max_faults=0.9)
    for path in Path(tmp_path, "a").glob("*.tar"):
        path.unlink()
    assert len(next(iter(stream))) == 0
