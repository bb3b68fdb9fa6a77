"""The shard writer and the names of shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data.shards import Sample, ShardWriter, expand_braces, expand_shards


def write(folder: Path, keys: list[str], **options) -> None:
    with ShardWriter(folder, **options) as writer:
        for key in keys:
            writer.write(Sample(key, key.encode(), "jpg", [f"caption of {key}", "another"], {"label": 3}))


def test_manifest_tells_what_lies_there(tmp_path):
    write(tmp_path, ["a", "b", "c"], samples_per_shard=2)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["samples"] == 3
    assert [shard["samples"] for shard in manifest["shards"].values()] == [2, 1]
    for name, shard in manifest["shards"].items():
        content = (tmp_path / name).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_equal_samples_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, ["a", "b"])
    assert (tmp_path / "one/00000.tar").read_bytes() == (tmp_path / "two/00000.tar").read_bytes()


def test_old_shards_are_kept_unless_overwritten(tmp_path):
    write(tmp_path, ["a", "b", "c"], samples_per_shard=1)
    with pytest.raises(FileExistsError, match=r"already holds 3 shards.*--overwrite"):
        ShardWriter(tmp_path)
    write(tmp_path, ["d"], overwrite=True)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["00000.tar"]


def test_a_failed_writing_leaves_no_half_shard(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, samples_per_shard=2) as writer:  # noqa: PT012
        for key in ("a", "b", "c"):
            writer.write(Sample(key, b"x", "jpg"))
        raise RuntimeError("stop")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar"]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a.b", b"", "jpg"), r"key 'a\.b': expected letters"),
        (Sample("seen", b"", "jpg"), "was written before"),
        (Sample("new", b"", "tiff"), "image extension 'tiff', expected one of"),
    ],
)
def test_bad_samples_are_refused(tmp_path, sample, message):
    with ShardWriter(tmp_path) as writer:
        writer.write(Sample("seen", b"", "jpg"))
        with pytest.raises(ValueError, match=message):
            writer.write(sample)


def test_shards_need_at_least_one_sample(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ShardWriter(tmp_path, samples_per_shard=0)


@pytest.mark.parametrize(
    ("name", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{9..11}.tar", ["a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{x,y}-{0..1}", ["x-0", "x-1", "y-0", "y-1"]),
    ],
)
def test_braces(name, expanded):
    assert expand_braces(name) == expanded


def test_names_of_shards(tmp_path):
    write(tmp_path, ["a", "b", "c"], samples_per_shard=1)
    names = [str(tmp_path / f"0000{number}.tar") for number in range(3)]
    assert expand_shards(tmp_path) == names
    assert expand_shards(str(tmp_path / "*.tar")) == names
    assert expand_shards(f"{tmp_path}/{{00002..00000}}.tar") == names[::-1]
    assert expand_shards([names[0], tmp_path]) == names
    Path(f"{names[0]}.idx").touch()  # readers leave it beside the shard
    assert expand_shards(str(tmp_path / "0*")) == names
    assert expand_shards("http://host/{0..1}.tar") == ["http://host/0.tar", "http://host/1.tar"]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "the shard list is empty"),
        ("", "the name of a shard is empty"),
        (["{d}", " "], "the name of a shard is empty"),
        ("{d}/none-*.tar", "no shards found"),
        ("{d}/0{{1..2}}.tar", "no shards at"),
        (["{d}/0.tar", "{d}/empty"], "no shards found: .*empty matches no .tar file"),
        (["{d}/0.tar", "{d}/{{0,none}}*.tar"], r"no shards found: .*none\*.tar matches no .tar file"),
    ],
)
def test_no_shards(tmp_path, shards, message):
    (tmp_path / "0.tar").touch()
    (tmp_path / "empty").mkdir()
    words = [shards] if isinstance(shards, str) else shards
    given = [word.format(d=tmp_path) for word in words]
    with pytest.raises(ValueError, match=message):
        expand_shards(given)
