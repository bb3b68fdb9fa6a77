import io
import json
import logging
import pickle
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.faults import Fault
from data.pairs import drop_words
from data.samples import RawSample
from data.shards import Sample, ShardWriter
from data.stream import Batch, PairStream, pair_stream
from data.transforms import EvalTransform, TrainTransform

CONTEXT = 8


def tokenize(texts) -> torch.Tensor:
    """The first characters of each text as numbers; int64 (n, 8)."""
    return torch.tensor([[ord(char) for char in text.ljust(CONTEXT)[:CONTEXT]] for text in texts]).reshape(
        len(texts), CONTEXT
    )


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_keys(folder: Path, counts: list[int]) -> list[str]:
    """Shards whose samples are nothing but a key and one byte of picture."""
    folder.mkdir(exist_ok=True)
    return [
        str(write_tar(folder / f"{shard}.tar", {f"{shard}-{n}.jpg": b"." for n in range(count)}))
        for shard, count in enumerate(counts)
    ]


def load_key(sample: RawSample, rng: np.random.Generator) -> tuple[str, float]:
    return sample.key, rng.random()


def collate_keys(rows: list[tuple[str, float]]) -> dict:
    return {"keys": [key for key, _ in rows], "draws": [draw for _, draw in rows]}


def key_stream(shards, **options) -> PairStream:
    return PairStream(shards, load_key, collate_keys, **options)


def as_data(batch: Batch) -> tuple:
    return batch.step, batch.epoch, batch.keys, batch.indices.tolist(), batch.data


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, make_picture) -> Path:
    """Four shards of 30 pictures with three captions each."""
    folder = tmp_path_factory.mktemp("pairs")
    with ShardWriter(folder, samples_per_shard=8) as writer:
        for n in range(30):
            captions = [f"{n:02d} {word}" for word in ("one", "two", "three")]
            writer.write(Sample(f"{n:05d}", make_picture(n), "jpg", captions, {"label": n}))
    return folder


# The order


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(sum),
    batch_size=st.integers(1, 7),
    shuffle=st.one_of(st.booleans(), st.integers(0, 20)),
    seed=st.integers(0, 50),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_sample_once_resumable_and_the_same_for_any_world(
    tmp_path, counts, batch_size, shuffle, seed, data
):
    shards = write_keys(tmp_path / "-".join(map(str, counts)), counts)
    world = data.draw(st.sampled_from([1, 2, 3, 4]), label="world")
    order = {"seed": seed, "shuffle": shuffle}
    ranks = [
        key_stream(shards, batch_size=batch_size, rank=rank, world_size=world, **order)
        for rank in range(world)
    ]
    one = key_stream(shards, batch_size=batch_size * world, **order)
    steps = one.batches_per_epoch
    assert {rank.batches_per_epoch for rank in ranks} == {steps}

    # Two epochs, and the global batches of one process are those of several ranks laid side by side.
    whole = [as_data(batch) for batch in one.iterate(0, 2 * steps)]
    split = [[as_data(batch) for batch in rank.iterate(0, 2 * steps)] for rank in ranks]
    for step in range(2 * steps):
        assert whole[step][:2] == (step, step // steps)
        assert [key for rank in split for key in rank[step][2]] == whole[step][2]
        assert [draw for rank in split for draw in rank[step][4]["draws"]] == whole[step][4]["draws"]
    keys = [f"{shard}-{n}" for shard, count in enumerate(counts) for n in range(count)]
    for epoch in range(2):
        seen = [key for step in range(epoch * steps, (epoch + 1) * steps) for key in whole[step][2]]
        assert sorted(seen) == sorted(keys)

    # Stopping anywhere and going on gives what an unbroken run gives.
    stop = data.draw(st.integers(0, 2 * steps), label="stop")
    fresh = key_stream(shards, batch_size=batch_size * world, **order)
    again = [*one.iterate(0, stop), *fresh.iterate(stop, 2 * steps)]
    assert [as_data(batch) for batch in again] == whole


def test_the_global_index_names_the_sample(tmp_path):
    stream = key_stream(write_keys(tmp_path, [3, 4]), batch_size=2)
    keys = ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2", "1-3"]
    for batch in stream.iterate(0, 12):
        assert batch.indices.dtype == torch.int64
        assert [keys[index] for index in batch.indices] == batch.keys == batch["keys"]


def test_without_shuffling_the_order_is_that_of_the_shards(tmp_path):
    stream = key_stream(write_keys(tmp_path, [3, 2]), batch_size=2, shuffle=False)
    assert [batch.keys for batch in stream.epoch(5)] == [["0-0", "0-1"], ["0-2", "1-0"], ["1-1"]]


def test_the_last_batch_is_split_evenly_and_may_leave_a_rank_without_rows(tmp_path):
    shards = write_keys(tmp_path, [10])
    sizes = [
        [len(batch) for batch in key_stream(shards, batch_size=2, rank=rank, world_size=4).epoch()]
        for rank in range(4)
    ]
    assert sizes == [[2, 1], [2, 1], [2, 0], [2, 0]]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(pairs, workers):
    def batches(count):
        stream = pair_stream(
            pairs,
            transform=TrainTransform(16, scale=(0.3, 1)),
            tokenize=tokenize,
            batch_size=7,
            workers=count,
        )
        return list(stream.iterate(3, 12))

    for one, two in zip(batches(0), batches(workers), strict=True):
        assert (one.step, one.epoch, one.keys, one["texts"]) == (two.step, two.epoch, two.keys, two["texts"])
        assert torch.equal(one["images"], two["images"])
        assert torch.equal(one["tokens"], two["tokens"])


def test_an_endless_stream_with_workers_can_be_left(tmp_path):
    stream = key_stream(write_keys(tmp_path, [5]), batch_size=2, workers=2)
    for batch in stream.iterate(1):
        if batch.step == 8:
            break
    assert batch.epoch == 2


def test_iterating_leaves_torchs_random_state_alone(tmp_path):
    """Or a resumed run, which starts the loader once more, would draw other dropout masks."""
    stream = key_stream(write_keys(tmp_path, [5]), batch_size=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(stream.iterate(0, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_with_its_loaders_can_be_pickled(pairs):
    stream = pair_stream(pairs, transform=TrainTransform(16), tokenize=tokenize, batch_size=7)
    copy = pickle.loads(pickle.dumps(stream))
    one, two = next(stream.epoch(1)), next(copy.epoch(1))
    assert one.keys == two.keys
    assert torch.equal(one["images"], two["images"])


# Pairs


def test_scaled_decoding_is_for_the_train_transform(pairs):
    options = {"tokenize": tokenize, "batch_size": 7, "scaled_decode": True}
    assert pair_stream(pairs, transform=TrainTransform(16), **options).load.scaled_decode
    with pytest.raises(ValueError, match="scaled_decode is for TrainTransform, got EvalTransform"):
        pair_stream(pairs, transform=EvalTransform(16), **options)
    with pytest.raises(ValueError, match="views are of the whole picture"):
        pair_stream(pairs, transform=TrainTransform(16), views=TrainTransform(16), **options)


def test_scaled_decoding_changes_pixels_a_little_and_nothing_else(pairs):
    def batches(**options):
        stream = pair_stream(pairs, transform=TrainTransform(16), tokenize=tokenize, batch_size=7, **options)
        return list(stream.iterate(0, 7))

    for exact, scaled, again in zip(
        batches(), batches(scaled_decode=True), batches(scaled_decode=True, workers=2), strict=True
    ):
        assert (exact.keys, exact["texts"]) == (scaled.keys, scaled["texts"]) == (again.keys, again["texts"])
        assert torch.equal(scaled["images"], again["images"])
        difference = (exact["images"].float() - scaled["images"].float()).abs().mean().item()
        assert 0 < difference < 4


class WithMemory:
    """A collate that also says how much memory the process holds, in bytes."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        return {**self.collate(rows), "rss": psutil.Process().memory_info().rss}


def test_the_memory_of_a_worker_stays_flat(tmp_path, make_picture):
    pictures = [
        make_picture(n, size=(160, 120), format=format)
        for n in range(6)
        for format in ("JPEG", "PNG", "WEBP")
    ]
    with ShardWriter(tmp_path) as writer:
        for n in range(200):
            extension = ("jpg", "png", "webp")[n % 3]
            writer.write(
                Sample(f"{n:05d}", pictures[n % len(pictures)], extension, [f"caption ĳ {n} & so on"])
            )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    made = pair_stream(tmp_path, transform=TrainTransform(32), tokenize=tokenizer, batch_size=20)
    stream = PairStream(tmp_path, made.load, WithMemory(made.collate), batch_size=20, workers=1)
    memory = [batch["rss"] for batch in stream.iterate(0, 150)]
    growth = np.median(memory[-20:]) - np.median(memory[30:50])
    assert growth < 1e6  # 2,000 samples; a picture kept of each would be 115 MB, its file 4 MB


def test_batches_of_pictures_and_tokens(pairs):
    stream = pair_stream(pairs, transform=EvalTransform((16, 24)), tokenize=tokenize, batch_size=7)
    assert (stream.samples, stream.batches_per_epoch, stream.faults) == (30, 5, {})
    batch = next(stream.epoch())
    assert batch["images"].shape == (7, 3, 16, 24)
    assert batch["images"].dtype == torch.uint8
    assert batch["tokens"].shape == (7, CONTEXT)
    assert batch["tokens"].dtype == torch.int64
    assert torch.equal(tokenize(batch["texts"]), batch["tokens"])
    assert [text[:2] for text in batch["texts"]] == [key[-2:] for key in batch.keys]
    assert "image_of_text" not in batch.data


def test_one_caption_is_drawn_anew_each_epoch(pairs):
    stream = pair_stream(pairs, transform=EvalTransform(8), tokenize=tokenize, batch_size=30)
    drawn = np.zeros((40, 30), dtype=int)
    words = ["one", "two", "three"]
    for batch in stream.iterate(0, 40):
        for index, text in zip(batch.indices, batch["texts"], strict=True):
            drawn[batch.epoch, index] = words.index(text[3:])
    counts = np.bincount(drawn.ravel(), minlength=3)
    assert np.abs(counts - 400).max() < 5 * np.sqrt(1200 * 2 / 9)  # five standard deviations
    assert (drawn[0] != drawn[1]).any()


def test_the_first_caption(pairs):
    stream = pair_stream(
        pairs, transform=EvalTransform(8), tokenize=tokenize, batch_size=30, captions="first"
    )
    assert {text[3:] for text in next(stream.epoch())["texts"]} == {"one"}


def test_all_captions_with_their_pictures(pairs):
    stream = pair_stream(
        pairs, transform=EvalTransform(8), tokenize=tokenize, batch_size=4, captions="all", shuffle=False
    )
    batch = next(stream.epoch())
    assert batch["tokens"].shape == (12, CONTEXT)
    assert batch["image_of_text"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batch["texts"][:4] == ["00 one", "00 two", "00 three", "01 one"]


@pytest.mark.parametrize("captions", ["random", "all"])
def test_a_rank_without_rows_gets_empty_tensors_of_the_right_shape(pairs, captions):
    stream = pair_stream(
        pairs,
        transform=EvalTransform(8),
        tokenize=tokenize,
        batch_size=29,
        rank=1,
        world_size=2,
        captions=captions,
    )
    (batch,) = stream.epoch()
    assert len(batch) == 15
    empty = stream.collate([])
    assert empty["images"].shape == (0, 3, 8, 8)
    assert empty["tokens"].shape == (0, CONTEXT)
    assert empty["texts"] == []
    if captions == "all":
        assert empty["image_of_text"].shape == (0,)


@pytest.mark.parametrize(
    ("record", "text", "expected"),
    [
        ({"captions": ["a", " b "], "caption": "c"}, "d", ["a", "b"]),
        ({"caption": "c"}, "d", ["c"]),
        ({}, " d\n", ["d"]),
        ({"caption": None}, "d", ["d"]),
        ({"captions": ["", " "]}, None, []),
        ({}, None, []),
    ],
)
def test_where_captions_come_from(record, text, expected):
    assert RawSample("k", "s", 0, b"", "jpg", record, text).captions() == expected


@pytest.mark.parametrize("captions", [7, ["a", 7], {"a": "b"}])
def test_captions_that_are_not_text(captions):
    with pytest.raises(Fault, match="captions should be a list of texts"):
        RawSample("k", "s", 0, b"", "jpg", {"captions": captions}).captions()


@pytest.mark.parametrize("key", [None, "rewritten"])
def test_a_caption_with_half_a_character_is_a_fault_and_no_end_of_a_run(key):
    """Tokenizers of the hub raise a TypeError for it."""
    record = {"caption": "half \ud800 of one", "rewritten": ["whole", "half \udfff of one"]}
    with pytest.raises(Fault, match="bad_text: a caption holds half a character"):
        RawSample("k", "s", 0, b"", "jpg", record).captions(key)


# Bad input


@pytest.fixture
def damaged(tmp_path, make_picture) -> Path:
    """20 samples, of which seven are bad in seven ways."""
    good = {f"good{n}": {"jpg": make_picture(n), "txt": b"a text"} for n in range(13)}
    bad = {
        "text": {"jpg": b"this is a text file", "txt": b"a text"},
        "nocaption": {"jpg": make_picture(1)},
        "blank": {"jpg": make_picture(1), "txt": b"  \n"},
        "noimage": {"txt": b"a text", "json": b"{}"},
        "json": {"jpg": make_picture(1), "txt": b"a text", "json": b'{"caption": '},
        "list": {"jpg": make_picture(1), "txt": b"a text", "json": b"[1]"},
        "latin1": {"jpg": make_picture(1), "txt": "é".encode("latin-1")},
    }
    files = {
        f"{key}.{extension}": content
        for key, sample in {**good, **bad}.items()
        for extension, content in sample.items()
    }
    return write_tar(tmp_path / "damaged.tar", files)


CAUSES = {
    "undecodable_image": 1,
    "missing_caption": 2,
    "missing_image": 1,
    "bad_json": 2,
    "bad_text": 1,
}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_by_cause_and_left_out(damaged, workers):
    stream = pair_stream(
        str(damaged),
        transform=EvalTransform(8),
        tokenize=tokenize,
        batch_size=6,
        workers=workers,
        max_faults=0.5,
    )
    batches = list(stream.epoch())
    assert [batch.step for batch in batches] == [0, 1, 2, 3]
    assert sorted(key for batch in batches for key in batch.keys) == sorted(f"good{n}" for n in range(13))
    assert stream.faults == CAUSES
    for batch in batches:
        assert len(batch) == len(batch["images"]) == len(batch["tokens"]) == len(batch.indices)


def test_json_nested_beyond_any_parser_is_a_fault_and_no_crash(tmp_path, make_picture):
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    files = {"a.jpg": make_picture(0), "a.json": deep, "a.txt": b"a text", "b.jpg": b"."}
    stream = key_stream([str(write_tar(tmp_path / "s.tar", files))], batch_size=2, max_faults=0.9)
    assert [batch.keys for batch in stream.epoch()] == [["b"]]
    assert stream.faults == {"bad_json": 1}


def test_past_the_budget_the_stream_stops_and_says_why(damaged):
    stream = pair_stream(
        str(damaged), transform=EvalTransform(8), tokenize=tokenize, batch_size=6, max_faults=0.3
    )
    with pytest.raises(ValueError, match=r"7 of 20 samples cannot be used \(35.0%\)") as caught:
        list(stream.epoch())
    text = str(caught.value)
    assert "missing_caption: 2" in text
    assert "damaged.tar, sample 'text': not a picture: 19 bytes that start with b'this is a text f'" in text
    assert "damaged.tar, sample 'noimage': none of jpg, jpeg, png, webp (it has txt, json)" in text


def test_no_faults_allowed_stops_at_the_first(damaged):
    stream = pair_stream(
        str(damaged),
        transform=EvalTransform(8),
        tokenize=tokenize,
        batch_size=1,
        shuffle=False,
        max_faults=0,
    )
    batches = stream.epoch()
    for _ in range(13):
        next(batches)
    with pytest.raises(ValueError, match="1 of 14 samples"):
        next(batches)


def test_a_part_of_an_epoch_is_not_judged_as_if_it_were_one(damaged, caplog):
    stream = pair_stream(
        str(damaged),
        transform=EvalTransform(8),
        tokenize=tokenize,
        batch_size=6,
        max_faults=0.4,
        shuffle=False,
    )
    # 7 of 8 samples are bad in what is left of the first epoch, then 7 of 20 in a whole one.
    with caplog.at_level(logging.WARNING):
        assert [len(batch) for batch in stream.iterate(2, 8)] == [1, 0, 6, 6, 1, 0]
    assert "epoch 0: 7 of 8 samples left out (missing_caption 2" in caplog.text
    assert "epoch 1: 7 of 20 samples left out (missing_caption 2" in caplog.text
    assert sum(stream.faults.values()) == 14


def test_a_truncated_shard_is_reported_before_the_first_batch(tmp_path, make_picture):
    with ShardWriter(tmp_path, samples_per_shard=50) as writer:
        for n in range(100):
            writer.write(Sample(f"{n}", make_picture(n), "jpg", ["a text"]))
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    options = {"transform": EvalTransform(8), "tokenize": tokenize, "batch_size": 10}
    with pytest.raises(ValueError, match="whole samples of the 50 that the manifest promises") as caught:
        pair_stream(tmp_path, **options)
    assert "truncated_tar" in str(caught.value)
    stream = pair_stream(tmp_path, max_faults=0.4, **options)
    assert stream.faults == {"truncated_tar": 100 - stream.samples}
    assert sum(len(batch) for batch in stream.epoch()) == stream.samples
    assert 70 < stream.samples < 80


def test_shards_that_hold_nothing(tmp_path):
    empty = write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(ValueError, match=r"no samples in 1 shards \(.*empty.tar"):
        key_stream(str(empty), batch_size=1)
    (tmp_path / "page.tar").write_bytes(b"<html>" * 1000)
    with pytest.raises(ValueError, match=r"no samples in 1 shards.*\n.*page.tar: not a tar"):
        key_stream(str(tmp_path / "page.tar"), batch_size=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is the samples per rank, at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, world_size\), got rank 2 of world_size 2"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"shuffle": -5}, "shuffle is a number of samples, at least 0, got -5"),
        ({"max_faults": 1.0}, "max_faults is a share of the samples"),
    ],
)
def test_impossible_options(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        key_stream(write_keys(tmp_path, [3]), **{"batch_size": 2, **options})


def test_impossible_ranges_and_captions(tmp_path, pairs):
    stream = key_stream(write_keys(tmp_path, [3]), batch_size=2)
    for start, stop in [(-1, 2), (3, 2)]:
        with pytest.raises(ValueError, match=f"expected 0 <= start <= stop, got start={start}, stop={stop}"):
            stream.iterate(start, stop)
    assert list(stream.iterate(2, 2)) == []
    with pytest.raises(ValueError, match="captions 'latest': expected one of random, first, longest, all"):
        pair_stream(pairs, transform=EvalTransform(8), tokenize=tokenize, batch_size=2, captions="latest")


def test_no_shards():
    with pytest.raises(ValueError, match="the shard list is empty"):
        key_stream([], batch_size=1)


def test_a_manifest_that_is_not_ours_is_ignored(tmp_path):
    shards = write_keys(tmp_path, [3])
    for content in ["not json", "[1]", json.dumps({"shards": 3}), json.dumps({"shards": {"0.tar": {}}})]:
        (tmp_path / "manifest.json").write_text(content)
        assert key_stream(shards, batch_size=2).samples == 3


def test_several_captions_of_a_picture_are_drawn_without_replacement(tmp_path, make_picture):
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write(Sample("a", make_picture(seed=0), "jpg", ["a0", "a1", "a2"]))
        writer.write(Sample("b", make_picture(seed=1), "jpg", ["b0"]))
    options = {"transform": TrainTransform(16), "tokenize": tokenize, "batch_size": 2, "seed": 1}
    stream = pair_stream(str(tmp_path / "shards"), captions_per_image=2, **options)
    drawn = set()
    for epoch in range(20):
        (batch,) = list(stream.epoch(epoch))
        assert batch["tokens"].shape[:2] == (2, 2)
        assert torch.equal(batch["tokens"].flatten(0, 1), tokenize(batch["texts"]))
        pairs = {texts[0][0]: texts for texts in (batch["texts"][:2], batch["texts"][2:])}
        assert pairs["b"] == ["b0", "b0"]
        drawn.add(tuple(pairs["a"]))
    assert drawn == {(x, y) for x in ("a0", "a1", "a2") for y in ("a0", "a1", "a2") if x != y}
    for wrong, told in (
        ({"captions_per_image": 2, "captions": "first"}, "several are drawn, expected 'random'"),
        ({"captions_per_image": 0}, "captions_per_image 0: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=told):
            pair_stream(str(tmp_path / "shards"), **options, **wrong)


def test_words_are_left_out_at_random_but_never_all_of_them():
    words = [str(number) for number in range(1000)]
    kept = drop_words(" ".join(words), 0.3, np.random.default_rng(0)).split()
    assert 640 < len(kept) < 760
    assert kept == [word for word in words if word in set(kept)]  # in their order
    assert drop_words("alone", 0.999, np.random.default_rng(0)) == "alone"


def test_word_dropout_is_drawn_anew_each_epoch_and_the_same_for_a_seed(tmp_path, make_picture):
    caption = " ".join(f"w{number}" for number in range(20))
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(4):
            writer.write(Sample(f"{number}", make_picture(seed=number), "jpg", [caption]))

    def texts(epoch: int) -> list[str]:
        options = {
            "transform": TrainTransform(16),
            "tokenize": tokenize,
            "batch_size": 4,
            "word_dropout": 0.5,
        }
        stream = pair_stream(str(tmp_path / "shards"), seed=3, **options)
        return [text for batch in stream.epoch(epoch) for text in batch["texts"]]

    first, second = texts(0), texts(1)
    assert first == texts(0)
    assert first != second
    assert len(set(first)) == 4  # each sample draws its own
    assert all(0 < len(text.split()) < 20 for text in first)
