"""`retrieval embed` on disk: parts, resumption after a kill, several processes, a Ray cluster, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.shards import Sample, ShardWriter
from pairstream.cli import main as pairstream
from pretrain.encoder import build_encoder, load_encoder
from pretrain.recipe_model import TowersModel
from retrieval.embed import Embeddings, embed_shards
from retrieval.job import Launch, finish_job, make_parts, plan_job, start_job
from retrieval.parts import EmbeddingSet, part_folder
from retrieval.shard_rows import Take, embed_batches

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 44  # in shards of 8, the last one with 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_picture) -> str:
    """Six shards; sample 3 is no picture, sample 20 has no caption."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, samples_per_shard=8) as writer:
        for number in range(SAMPLES):
            captions = [f"picture {number} of {word}" for word in ("dogs", "hills")[: 1 + number % 2]]
            writer.write(
                Sample(
                    f"{number:05d}",
                    b"no picture" if number == 3 else make_picture(number),
                    "jpg",
                    [] if number == 20 else captions,
                    {"width": 40 + number, "url": f"http://x/{number}", "extra": [1]},
                )
            )
    return str(folder)


def small_model(tiny_models, folder, seed=0) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return str(build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu").save(folder))


@pytest.fixture(scope="module")
def model(tiny_models, tmp_path_factory) -> str:
    return small_model(tiny_models, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def encoder(model):
    return load_encoder(model, device="cpu")


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(model: str, shards: str, out: Path, *more: str) -> list[str]:
    words = ["retrieval", "embed", "--model", model, "--data", shards, "--out", str(out), "--batch-size", "5"]
    return [*words, "--max-faults", "0.1", "--device", "cpu", *more]


def environment(**more: str) -> dict[str, str]:
    """One thread in each process: sums over more of them may round differently."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(model, shards, tmp_path_factory, one_thread) -> Path:
    """What an undisturbed process writes."""
    out = tmp_path_factory.mktemp("whole") / "rows"
    assert pairstream(command(model, shards, out)) == 0
    return out


def test_parts_hold_the_rows_of_the_encoder(whole, encoder, shards):
    found = embed_shards(encoder, shards, batch_size=5, max_faults=0.1)
    loaded = Embeddings.load(whole)
    assert loaded.keys == found.keys == [f"{n:05d}" for n in range(SAMPLES) if n not in (3, 20)]
    for name in ("captions", "faults", "meta", "fingerprint", "shards"):
        assert getattr(loaded, name) == getattr(found, name)
    for name in ("samples", "image_of_text"):
        assert np.array_equal(getattr(loaded, name), getattr(found, name))
    assert loaded.faults == {"undecodable_image": 1, "missing_caption": 1}
    assert loaded.meta[0] == {"width": 40, "url": "http://x/0"}
    np.testing.assert_allclose(loaded.images, found.images, atol=1e-3)  # float16 on disk
    np.testing.assert_allclose(loaded.texts, found.texts, atol=1e-3)
    parts = list(EmbeddingSet.open(whole))
    assert [len(part.images) for part in parts] == [7, 8, 7, 8, 8, 4]
    assert [part.base for part in parts] == [0, 8, 16, 24, 32, 40]
    assert parts[0].images.dtype == np.float16
    failed = [json.loads(line) for line in (whole / "failed.jsonl").read_text().splitlines()]
    assert [(row["key"], row["cause"]) for row in failed] == [
        ("00003", "undecodable_image"),
        ("00020", "missing_caption"),
    ]
    assert failed[1]["shard"].endswith("00002.tar")


def test_a_killed_job_goes_on_to_the_same_bytes(model, shards, whole, tmp_path):
    out = tmp_path / "rows"
    slow = (
        "import sys, time, retrieval.job as job; write = job.write_part\n"
        "def late(*words, **more):\n    write(*words, **more); print('part', flush=True); time.sleep(0.3)\n"
        "job.write_part = late\n"
        "from pairstream.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    kills = 0
    while not (out / "manifest.json").is_file():
        process = subprocess.Popen(
            [sys.executable, "-c", slow, *command(model, shards, out)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        if kills < 2:
            assert process.stdout.readline() == "part\n"
            time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.communicate()
            # What a kill in the middle of a write leaves, which no kill is sure to hit.
            for rest in (out / "parts" / ".tmp-00004-1", out / ".tmp-manifest.json-1"):
                if not rest.exists():
                    rest.write_bytes(b"half") if rest.suffix else (
                        rest.mkdir(),
                        (rest / "x").write_bytes(b"half"),
                    )
        else:
            assert process.communicate()[0].count("part\n") == 6 - kills  # the others were kept
            assert process.returncode == 0
    assert content(out) == content(whole)


def test_ranks_that_share_the_work_write_the_same_bytes(model, shards, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):  # in any order: none waits for another
        monkeypatch.setenv("RANK", str(rank))
        assert pairstream(command(model, shards, tmp_path / "rows")) == 0
        assert (tmp_path / "rows" / "manifest.json").is_file() == (rank == 1)
    assert content(tmp_path / "rows") == content(whole)


@pytest.mark.dist
def test_torchrun_writes_the_same_bytes(model, shards, whole, torchrun, tmp_path):
    torchrun("-m", "pairstream", *command(model, shards, tmp_path / "rows"))
    assert content(tmp_path / "rows") == content(whole)


@pytest.mark.slow
@pytest.mark.dist
def test_a_ray_cluster_writes_the_same_bytes(model, shards, whole, tmp_path):
    pytest.importorskip("ray")
    # One part is there already: only the others are made.
    encoder = load_encoder(model, device="cpu")
    job = plan_job(encoder, shards, batch_size=5)
    start_job(tmp_path / "rows", job)
    make_parts(tmp_path / "rows", job, encoder, [2], max_faults=0.5)
    before = part_folder(tmp_path / "rows", 2).stat().st_mtime_ns
    run(["-m", "pairstream", *command(model, shards, tmp_path / "rows", "--ray", "--ray-actors", "2")])
    assert part_folder(tmp_path / "rows", 2).stat().st_mtime_ns == before
    first, second = content(tmp_path / "rows"), content(whole)
    assert first == second


def test_nothing_is_decoded_twice(encoder, shards, monkeypatch):
    import retrieval.shard_rows as rows

    read = []
    original = rows.read_sample

    def counted(index, sample, number, reader):
        read.append((index.name, number))
        return original(index, sample, number, reader)

    monkeypatch.setattr(rows, "read_sample", counted)
    from data.shards import expand_shards

    batches = list(embed_batches(encoder, [Take(name) for name in expand_shards(shards)], batch_size=3))
    assert len(read) == len(set(read)) == SAMPLES
    assert sum(batch.seen for batch in batches) == SAMPLES
    assert [batch.shard for batch in batches if batch.ends] == list(range(6))


def test_loader_processes_and_a_limit_give_the_same_rows(encoder, shards, tmp_path):
    found = {}
    for workers in (0, 2):
        out = tmp_path / str(workers)
        job = plan_job(encoder, shards, batch_size=5, limit=13, dtype="float32")
        assert [shard["take"] for shard in job.shards] == [8, 5]
        assert start_job(out, job)
        assert make_parts(out, job, encoder, range(2), workers=workers, max_faults=0.5) == 2
        assert finish_job(out, job, max_faults=0.5)["images"] == 12
        found[workers] = content(out)
        assert not start_job(out, job)
        assert make_parts(out, job, encoder, range(2)) == 0
    assert found[0] == found[2]


def test_an_empty_and_a_broken_shard_are_parts_without_rows(encoder, make_picture, tmp_path):
    with ShardWriter(tmp_path / "s", samples_per_shard=2) as writer:
        for number in range(4):
            writer.write(Sample(str(number), make_picture(number), "jpg", ["a thing"]))
    (tmp_path / "s" / "00002.tar").write_bytes(b"\0" * 10240)  # a tar without members
    (tmp_path / "s" / "00003.tar").write_bytes(b"no tar at all" * 100)
    job = plan_job(encoder, str(tmp_path / "s"))
    start_job(tmp_path / "out", job)
    make_parts(tmp_path / "out", job, encoder, range(4), max_faults=0.9)
    manifest = finish_job(tmp_path / "out", job, max_faults=0.9)
    assert [part["images"] for part in manifest["parts"]] == [2, 2, 0, 0]
    assert manifest["faults"] == {"bad_shard": 1}
    assert Embeddings.load(tmp_path / "out").keys == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match=r"1 of 5 samples cannot be used"):
        finish_job(tmp_path / "out", job)


def test_bad_samples_past_the_budget_stop_the_job_and_keep_its_parts(encoder, shards, tmp_path):
    job = plan_job(encoder, shards)
    start_job(tmp_path, job)
    make_parts(tmp_path, job, encoder, range(6))  # few samples: judged at the end
    with pytest.raises(ValueError, match=r"2 of 44 samples cannot be used .* budget max_faults is 1.0%"):
        finish_job(tmp_path, job)
    with pytest.raises(ValueError, match="these embeddings are unfinished: run the same embed command again"):
        EmbeddingSet.open(tmp_path)
    assert make_parts(tmp_path, job, encoder, range(6)) == 0
    assert finish_job(tmp_path, job, max_faults=0.05)["images"] == 42


def test_a_job_refuses_what_does_not_belong_to_it(encoder, shards, tiny_models, tmp_path):
    job = plan_job(encoder, shards, batch_size=5)
    start_job(tmp_path / "rows", job)
    for other, message in (
        (plan_job(encoder, shards, batch_size=6), "unfinished job with another batch_size: 5, now 6"),
        (plan_job(encoder, shards, batch_size=5, dtype="float32"), 'another dtype: "float16", now "float32"'),
        (plan_job(encoder, shards, batch_size=5, limit=9), "another limit: null, now 9"),
    ):
        with pytest.raises(ValueError, match=message):
            start_job(tmp_path / "rows", other)
    stranger = load_encoder(small_model(tiny_models, tmp_path / "other", seed=1), device="cpu")
    with pytest.raises(ValueError, match="another fingerprint"):
        start_job(tmp_path / "rows", plan_job(stranger, shards, batch_size=5))
    with pytest.raises(ValueError, match="the weights must be the same everywhere"):
        make_parts(tmp_path / "rows", job, stranger, [0])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="exists and holds no pairstream-embeddings"):
            start_job(tmp_path / "home", job, overwrite=overwrite)
    with pytest.raises(ValueError, match="dtype 'int8': expected one of float16, float32"):
        plan_job(encoder, shards, dtype="int8")
    with pytest.raises(ValueError, match="batch_size must be at least 1 picture, got 0"):
        plan_job(encoder, shards, batch_size=0)
    with pytest.raises(ValueError, match="limit must be at least 1 sample, got 0"):
        plan_job(encoder, shards, limit=0)
    with pytest.raises(ValueError, match="batch_size of at least 1 and workers of at least 0, got 2, -1"):
        next(embed_batches(encoder, [], batch_size=2, workers=-1))


def test_a_set_without_a_usable_sample_is_refused(encoder, tmp_path):
    with ShardWriter(tmp_path / "s") as writer:
        writer.write(Sample("1", b"no picture", "jpg", ["a thing"]))
    job = plan_job(encoder, str(tmp_path / "s"))
    start_job(tmp_path / "out", job)
    make_parts(tmp_path / "out", job, encoder, [0], max_faults=0.9)
    with pytest.raises(ValueError, match=r"none of the samples of .* can be used: .*undecodable_image"):
        finish_job(tmp_path / "out", job, max_faults=0.9)


def test_damage_is_found_and_named(whole, tmp_path):
    import shutil

    out = tmp_path / "rows"
    shutil.copytree(whole, out)
    path = part_folder(out, 1) / "images.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-40] ^= 1  # within the last row but one: 16 numbers of 2 bytes
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"00001.images\.npy is damaged"):
        EmbeddingSet.open(out).part(1)
    opened = EmbeddingSet.open(out)
    opened.checked.add(1)  # as if it had been damaged after it was opened
    with pytest.raises(ValueError, match=r"row 6 of images \(key '00014'\) is damaged"):
        opened.part(1).rows("images")
    shutil.rmtree(part_folder(out, 2))
    with pytest.raises(ValueError, match="00002 is missing: run the same embed command again"):
        EmbeddingSet.open(out).part(2)
    shutil.copytree(part_folder(out, 0), part_folder(out, 2))
    with pytest.raises(ValueError, match="00002 is damaged: it is not the part that the manifest names"):
        EmbeddingSet.open(out).part(2)


def test_rows_that_are_not_finite_are_refused_when_read(whole, tmp_path):
    found = Embeddings.load(whole)
    found.images[5, 3] = np.nan
    found.save(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"row 5 of images \(key '00006'\) has NaN or infinite values"):
        EmbeddingSet.open(tmp_path / "rows").part(0).rows("images")


def test_the_command_says_what_it_did(model, shards, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows"
    assert pairstream(command(model, shards, out)) == 0
    printed = capsys.readouterr().out
    assert "42 pictures and 63 texts, 16 wide, in 6 parts" in printed
    assert "2 samples failed, listed in" in printed
    assert pairstream(command(model, shards, out)) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    for words, message in (
        (
            command(model, shards, out, "--dtype", "float32"),
            "already holds pairstream-embeddings made with another",
        ),
        (command(model, str(tmp_path / "none"), tmp_path / "x"), "no shards at"),
    ):
        assert pairstream(words) == 2
        assert message in capsys.readouterr().err
    assert pairstream(command(model, shards, out, "--dtype", "float32", "--overwrite")) == 0
    assert next(iter(EmbeddingSet.open(out))).images.dtype == np.float32
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pairstream(command(model, shards, out, "--overwrite")) == 2
    assert "remove the folder instead of --overwrite" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="expected 0 <= RANK < WORLD_SIZE"):
        Launch.from_environment()
