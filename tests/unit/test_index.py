"""The index kept beside a shard is what a scan finds, and is never taken for another shard's."""

import os
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import data.index as module
from data.index import fetched_index, index_files, index_shard
from data.shards import Sample, ShardWriter
from data.stream import PairStream
from data.tar import scan_shard


@pytest.fixture
def shard(tmp_path, monkeypatch) -> Path:
    """Five samples, written a minute ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write(tmp_path / "set")


def write(folder: Path, captions: str = "a text", count: int = 5) -> Path:
    with ShardWriter(folder, overwrite=True) as writer:
        for n in range(count):
            writer.write(Sample(f"k{n}", b"." * 600, "jpg", [captions]))
    return age(folder / "00000.tar")


def age(path: Path) -> Path:
    then = time.time() - 60
    os.utime(path, (then, then))
    return path


def same(one, other) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and type(getattr(one, name)) is type(getattr(other, name))
        for name in (field.name for field in fields(one))
    )


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """Names of the shards that were scanned."""
    names: list[str] = []

    def counted(path, name=None, expected=None):
        names.append(str(path))
        return scan_shard(path, name, expected)

    monkeypatch.setattr(module, "scan_shard", counted)
    return names


def test_a_second_start_reads_the_index_and_not_the_tar(shard, scans):
    first, second = index_shard(shard), index_shard(shard)
    assert scans == [str(shard)]
    assert same(first, second)
    assert same(second, scan_shard(shard))
    assert index_files(shard)[0].is_file()
    stream = PairStream(
        shard.parent, load=lambda sample, rng: sample.key, collate=lambda rows: {}, batch_size=2
    )
    assert sorted(key for batch in stream.epoch() for key in batch.keys) == ["k0", "k1", "k2", "k3", "k4"]


def test_faults_are_kept_under_the_name_of_the_day(shard, scans):
    age(Path(shard.write_bytes(shard.read_bytes()[:-3000]) and shard))
    first = index_shard(shard, "one name", 5)
    second = index_shard(shard, "another name", 5)
    assert len(scans) == 1
    assert [fault.cause for fault in first.faults] == ["truncated_tar"]
    assert second.faults[0].shard == "another name"
    assert second.faults[0].detail == first.faults[0].detail


def test_another_size_time_or_promise_makes_it_anew(shard, scans):
    index_shard(shard)
    write(shard.parent, count=6)
    assert len(index_shard(shard)) == 6  # the size is another
    os.utime(shard, (1e9, 1e9))
    index_shard(shard)
    index_shard(shard, expected=7)
    index_shard(shard, expected=7)
    assert len(scans) == 4


def test_a_shard_that_was_just_written_is_not_trusted_to_stay(shard, scans):
    os.utime(shard)
    index_shard(shard)
    index_shard(shard)
    assert len(scans) == 2
    assert not any(file.exists() for file in index_files(shard))


def test_a_folder_that_cannot_be_written_leaves_the_index_to_the_cache(shard, scans, tmp_path):
    index_files(shard)[0].mkdir()  # no file can be written there now, not even by root
    index_shard(shard)
    index_shard(shard)
    assert len(scans) == 1
    assert list((tmp_path / "cache/pairstream/index").iterdir()) == [index_files(shard)[1]]


def test_nowhere_to_write_is_no_error(shard, scans, tmp_path):
    index_files(shard)[0].mkdir()
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert len(index_shard(shard)) == len(index_shard(shard)) == 5
    assert len(scans) == 2


@pytest.mark.parametrize("damage", ["body", "head", "empty", "format"])
def test_a_damaged_index_is_made_anew(shard, scans, damage):
    whole = index_shard(shard)
    file = index_files(shard)[0]
    content = bytearray(file.read_bytes())
    if damage == "body":
        content[-3] ^= 1
    elif damage == "head":
        content[0] ^= 1
    elif damage == "format":
        content = content.replace(b"index 1", b"index 9")
    file.write_bytes(b"" if damage == "empty" else content)
    assert same(index_shard(shard), whole)
    assert len(scans) == 2
    assert same(index_shard(shard), whole)
    assert len(scans) == 2


def test_the_index_of_a_fetched_shard_outlives_it(shard):
    index = index_shard(shard, "http://host/a.tar", tag="v1")
    assert index.tag == "v1"
    shard.unlink()
    found = fetched_index(shard, "http://host/a.tar", None)
    assert (len(found), found.tag, found.bytes) == (5, "v1", index.bytes)
    assert fetched_index(shard, "http://host/a.tar", 6) is None


def test_preparing_over_indexed_shards_is_allowed(shard):
    from data.prepare import check_out

    index_shard(shard)
    check_out(shard.parent, overwrite=True)
