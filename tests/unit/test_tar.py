import gzip
import io
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from data.faults import Fault
from data.tar import ShardReader, scan_shard

FILES = {"a.txt": b"one", "a.jpg": b"x" * 700, "b.jpg": b"y" * 512, "b.txt": b"", "b.JSON": b"{}"}


def write_tar(path: Path, files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(path: Path) -> dict[str, dict[str, bytes]]:
    index = scan_shard(path)
    assert index.faults == ()
    with ShardReader() as reader:
        return {
            index.key(sample): {
                extension: reader.read(index, *place) for extension, place in index.members(sample).items()
            }
            for sample in range(len(index))
        }


EXPECTED = {
    "a": {"txt": b"one", "jpg": b"x" * 700},
    "b": {"jpg": b"y" * 512, "txt": b"", "json": b"{}"},
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_every_format_with_long_and_foreign_names(tmp_path, format):
    long = "folder/" * 20 + "größe"  # beyond 100 bytes: ustar prefix, GNU long name, PAX path
    files = {**FILES, f"{long}.jpg": b"long", f"{long}.txt": b"z" * 1025}
    found = contents(write_tar(tmp_path / "s.tar", files, format))
    assert found == {**EXPECTED, long: {"jpg": b"long", "txt": b"z" * 1025}}


def test_a_name_beyond_ustar_in_gnu_and_pax(tmp_path):
    long = "k" * 300
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "s.tar", {f"{long}.jpg": b"1", "b.jpg": b"2"}, format)
        assert contents(path) == {long: {"jpg": b"1"}, "b": {"jpg": b"2"}}


def test_key_ends_at_the_first_dot_of_the_last_part_as_in_webdataset(tmp_path):
    from webdataset.tariterators import base_plus_ext

    names = ["a.b/c.seg.png", "d.x.y.z", "e", ".hidden", "h.", "i j.k"]
    found = contents(write_tar(tmp_path / "s.tar", dict.fromkeys(names, b"1")))
    expected = [base_plus_ext(name) for name in names]
    assert [(key, extension) for key, files in found.items() for extension in files] == [
        pair for pair in expected if pair[0] is not None
    ]


def test_skips_everything_but_regular_files(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [
            ("dir.d", tarfile.DIRTYPE),
            ("l.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
        for name in ("__meta__", "__meta__/b.jpg", "c/._d.jpg", "a.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert contents(path) == {"a": {"jpg": b"abc"}}


def test_files_of_one_key_need_not_be_neighbours(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"a.jpg": b"1", "b.jpg": b"2", "a.txt": b"3"})
    assert contents(path) == {"a": {"jpg": b"1", "txt": b"3"}, "b": {"jpg": b"2"}}


def test_reads_what_the_system_tar_writes(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    for format in ("gnu", "pax", "ustar", "v7"):
        command = ["tar", f"--format={format}", "-C", tmp_path, "-cf", tmp_path / f"{format}.tar", *FILES]
        subprocess.run(command, check=True)
        assert contents(tmp_path / f"{format}.tar") == EXPECTED


def test_gnu_headers_have_no_prefix_field(tmp_path):
    """There GNU tar keeps access times of incremental archives."""
    path = write_tar(tmp_path / "s.tar", {"a.jpg": b"abc"}, tarfile.GNU_FORMAT)
    raw = bytearray(path.read_bytes())
    raw[345:356] = b"14371573522"
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    assert contents(path) == {"a": {"jpg": b"abc"}}


def test_size_in_base_256(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"a.jpg": b"abc", "b.jpg": b"d"})
    raw = bytearray(path.read_bytes())
    raw[124:136] = b"\x80" + (3).to_bytes(11, "big")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    assert contents(path) == {"a": {"jpg": b"abc"}, "b": {"jpg": b"d"}}


def test_a_cut_inside_a_file_loses_that_sample_and_says_so(tmp_path):
    path = write_tar(tmp_path / "s.tar", {f"{n}.{e}": b"x" * 600 for n in range(4) for e in ("jpg", "txt")})
    path.write_bytes(path.read_bytes()[: 3 * 1536 + 1000])  # the fourth file is 1.txt
    index = scan_shard(path, expected=4)
    assert [index.key(n) for n in range(len(index))] == ["0"]
    (fault,) = index.faults
    assert (fault.cause, fault.count) == ("truncated_tar", 3)
    assert "inside '1.txt'" in fault.detail
    assert "1 whole samples of the 4 that the manifest promises" in fault.detail


def test_a_cut_may_take_a_sample_in_the_middle(tmp_path):
    """Its other files came earlier: those behind it close up, and without a manifest one is known to be lost."""
    path = write_tar(
        tmp_path / "s.tar", {name: name.encode() * 200 for name in ("a.jpg", "b.jpg", "b.txt", "a.txt")}
    )
    path.write_bytes(path.read_bytes()[: 3 * 1536 + 1000])
    index = scan_shard(path)
    assert [index.key(number) for number in range(len(index))] == ["b"]
    (fault,) = index.faults
    assert (fault.cause, fault.count) == ("truncated_tar", 1)
    with ShardReader() as reader:
        found = {name: reader.read(index, *place) for name, place in index.members(0).items()}
    assert found == {"jpg": b"b.jpg" * 200, "txt": b"b.txt" * 200}


def test_a_cut_between_files_is_damage_too(tmp_path):
    path = write_tar(tmp_path / "s.tar", {f"{n}.{e}": b"x" * 600 for n in range(4) for e in ("jpg", "txt")})
    whole = path.read_bytes()
    for files, left in [(2, 1), (3, 1), (8, 4)]:
        path.write_bytes(whole[: files * 1536])
        index = scan_shard(path)
        assert len(index) == left
        assert "without the end-of-archive mark" in index.faults[0].detail
    path.write_bytes(whole[: 8 * 1536 + 512])  # one block of zeros ends an archive as well
    assert scan_shard(path).faults == ()


def test_a_cut_inside_a_long_name(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"a.jpg": b"1", "k" * 700 + ".jpg": b"2"}, tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[: 1024 + 512 + 100])
    index = scan_shard(path)
    assert len(index) == 1
    assert "inside a header" in index.faults[0].detail


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello", "not a tar: 5 bytes"),
        (b"\x1f\x8b" + b"1" * 2000, "not a tar but gzip"),
        (gzip.compress(random.Random(0).randbytes(2000)), "not a tar but gzip"),
        (b"PK\3\4" + b"\0" * 2000, "not a tar but zip"),
        (b"<html>" * 200, "not a tar"),
    ],
)
def test_what_is_not_a_tar(tmp_path, content, words):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    index = scan_shard(path, expected=7)
    assert len(index) == 0
    (fault,) = index.faults
    assert (fault.cause, fault.count) == ("bad_shard", 7)
    assert words in fault.detail


def test_a_damaged_header_in_the_middle(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"a.jpg": b"1", "b.jpg": b"2", "c.jpg": b"3"})
    raw = bytearray(path.read_bytes())
    raw[1024] ^= 1
    path.write_bytes(raw)
    index = scan_shard(path)
    assert len(index) == 1
    assert "damaged header at byte 1024; 1 samples before" in index.faults[0].detail


def test_damaged_pax_records(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"ü" * 80 + ".jpg": b"1"}, tarfile.PAX_FORMAT)
    raw = bytearray(path.read_bytes())
    raw[512:515] = b"abc"
    path.write_bytes(raw)
    assert "damaged PAX header" in scan_shard(path).faults[0].detail


def test_a_file_that_comes_twice(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for content in (b"first", b"other"):
            info = tarfile.TarInfo("a.jpg")
            info.size = 5
            tar.addfile(info, io.BytesIO(content))
    index = scan_shard(path)
    assert [fault.cause for fault in index.faults] == ["duplicate_key"]
    with ShardReader() as reader:
        assert reader.read(index, *index.members(0)["jpg"]) == b"first"


def test_fewer_samples_than_the_manifest_promises(tmp_path):
    index = scan_shard(write_tar(tmp_path / "s.tar", FILES), expected=5)
    (fault,) = index.faults
    assert (fault.cause, fault.count) == ("bad_shard", 3)
    assert "holds 2 samples of the 5" in fault.detail


def test_reader_keeps_few_shards_open(tmp_path):
    indices = [scan_shard(write_tar(tmp_path / f"{n}.tar", {"a.jpg": b"%d" % n})) for n in range(6)]
    with ShardReader(capacity=2) as reader:
        for _ in range(2):
            for number, index in enumerate(indices):
                assert reader.read(index, *index.members(0)["jpg"]) == b"%d" % number
                assert len(reader.open) <= 2
    assert not reader.open


def test_a_shard_that_changes_after_it_was_indexed(tmp_path):
    path = write_tar(tmp_path / "s.tar", FILES)
    index = scan_shard(path)
    path.write_bytes(b"")
    with ShardReader() as reader, pytest.raises(Fault, match="shorter now than when it was indexed"):
        reader.read(index, *index.members(0)["jpg"])
    path.unlink()
    with ShardReader() as reader, pytest.raises(Fault, match="cannot be opened any more"):
        reader.read(index, *index.members(0)["jpg"])


def test_more_extensions_than_an_index_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("data.tar.EXTENSIONS", 3)
    files = {**FILES, "photo.0001.jpg": b"", "photo.0002.jpg": b""}
    index = scan_shard(write_tar(tmp_path / "s.tar", files))
    assert [fault.cause for fault in index.faults] == ["bad_shard"]
    assert "more than 3 different extensions; a sample's key ends at the first dot" in index.faults[0].detail
    assert [index.key(sample) for sample in range(len(index))] == ["a", "b"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_hard_link_has_the_content_of_the_file_that_it_names(tmp_path, format):
    """tar writes one for the second of two names of a file; the picture of its sample would be lost otherwise."""
    long = ("k" if format == tarfile.USTAR_FORMAT else "k" * 150) + ".jpg"
    links = [("b.JPG", "a.jpg"), (long, "a.jpg"), ("c.jpg", long), ("d.jpg", "gone.jpg"), ("README", "a.jpg")]
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in {"a.jpg": b"picture", "a.txt": b"one", "b.txt": b"two"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    assert contents(path) == {
        "a": {"jpg": b"picture", "txt": b"one"},
        "b": {"jpg": b"picture", "txt": b"two"},
        long.removesuffix(".jpg"): {"jpg": b"picture"},
        "c": {"jpg": b"picture"},
    }


def test_what_lies_behind_the_end_is_told(tmp_path):
    """As in shards that were joined by `cat`; zeros behind the end are padding."""
    path = write_tar(tmp_path / "s.tar", {"a.jpg": b"1", "a.txt": b"one"})
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100_000))
    assert scan_shard(path).faults == ()
    path.write_bytes(whole + write_tar(tmp_path / "t.tar", {"b.jpg": b"2"}).read_bytes())
    index = scan_shard(path)
    (fault,) = index.faults
    assert (len(index), fault.cause) == (1, "bad_shard")
    assert fault.detail.startswith(
        "goes on behind its end-of-archive mark at byte 2048: tars are joined by `tar -A`"
    )
