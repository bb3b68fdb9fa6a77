"""Tars by three generations of webdataset's writer, and by the installed one, read identically."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset import tariterators

from data.samples import index_shards, read_sample
from data.tar import ShardReader, scan_shard

pytestmark = pytest.mark.parity

FIXTURES = Path(__file__).parent.parent / "fixtures"
SCRIPT = importlib.util.spec_from_file_location("make_webdataset_tars", FIXTURES / "make_webdataset_tars.py")
assert SCRIPT is not None
assert SCRIPT.loader is not None
make = importlib.util.module_from_spec(SCRIPT)
SCRIPT.loader.exec_module(make)


def read(path: Path) -> list[tuple]:
    (index,) = index_shards(str(path))
    assert index.faults == ()
    with ShardReader() as reader:
        samples = [read_sample(index, number, number, reader) for number in range(len(index))]
    return [(one.key, one.extension, one.image, one.record, one.text) for one in samples]


def expected(pngs: list[bytes]) -> list[tuple]:
    return [
        (one["__key__"], "png", png, one["json"], one.get("txt"))
        for one, png in zip(make.samples(), pngs, strict=True)
    ]


@pytest.mark.parametrize("version", ["0.2.86", "0.2.111", "1.0.2"])
def test_committed_tars(version, tmp_path):
    path = tmp_path / "s.tar"  # readers keep their index beside a shard
    path.write_bytes((FIXTURES / f"webdataset-{version}.tar").read_bytes())
    found = read(path)
    assert found == expected([image for _, _, image, _, _ in found])
    for (_, _, image, _, _), sample in zip(found, make.samples(), strict=True):
        pixels = [np.array(Image.open(io.BytesIO(data))) for data in (image, sample["png"])]
        np.testing.assert_array_equal(*pixels)


def test_the_installed_writer(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for sample in make.samples():
            writer.write(sample)
    assert read(tmp_path / "s.tar") == expected([sample["png"] for sample in make.samples()])


def test_webdatasets_own_reader_sees_the_same(tmp_path):
    path = FIXTURES / "webdataset-0.2.111.tar"
    with path.open("rb") as stream:
        files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        theirs = {
            sample["__key__"]: {name: data for name, data in sample.items() if not name.startswith("__")}
            for sample in tariterators.group_by_keys(files)
        }
    index = scan_shard(path)
    with ShardReader() as reader:
        ours = {
            index.key(number): {
                extension: reader.read(index, *place) for extension, place in index.members(number).items()
            }
            for number in range(len(index))
        }
    assert ours == theirs
    assert json.loads(ours["0000"]["json"]) == {"caption": "picture 0"}
