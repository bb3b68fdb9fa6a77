"""The doctor names each sample that is planted as bad, and nothing else."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from data.check import check_shards
from data.cli import main
from data.doctor import as_text, examine
from data.shards import Sample, ShardWriter
from pairstream.cli import run_stage


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def sick(tmp_path, make_picture) -> Path:
    """Three shards: nine bad samples, a key that two shards share, and a shard that is cut short."""
    good = make_picture(0)
    samples = {
        "fine": [("jpg", good), ("txt", b"a text")],
        "questions": [("jpg", good), ("json", b'{"questions": [{"question": "?"}]}')],
        "broken": [("jpg", good[: len(good) // 2]), ("txt", b"a text")],
        "page": [("jpg", b"<html>"), ("txt", b"a text")],
        "nobytes": [("jpg", b""), ("txt", b"a text")],
        "heavy": [("png", make_picture(1, (200, 200), "PNG")), ("txt", b"a text")],
        "wide": [("png", make_picture(1, (2000, 5), "PNG")), ("txt", b"a text")],
        "silent": [("jpg", good)],
        "blank": [("jpg", good), ("txt", b"  \n")],
        "json": [("jpg", good), ("json", b"{")],
        "twice": [("jpg", good), ("txt", b"a text"), ("jpg", good)],
        "noimage": [("txt", b"a text")],
    }
    folder = tmp_path / "sick"
    files = [(f"{key}.{extension}", content) for key, own in samples.items() for extension, content in own]
    write_tar(folder / "0.tar", files)
    write_tar(
        folder / "1.tar", [("fine.jpg", good), ("fine.txt", b"a"), ("other.jpg", good), ("other.txt", b"a")]
    )
    cut = write_tar(folder / "2.tar", [(f"cut{n}.{end}", good) for n in range(3) for end in ("jpg", "txt")])
    cut.write_bytes(cut.read_bytes()[: 4 * (512 + -(-len(good) // 512) * 512) + 600])
    return folder


FOUND = {
    ("0.tar", "broken"): "undecodable_image",
    ("0.tar", "page"): "undecodable_image",
    ("0.tar", "nobytes"): "empty_image",
    ("0.tar", "heavy"): "oversized_image",
    ("0.tar", "wide"): "oversized_image",
    ("0.tar", "silent"): "empty_caption",
    ("0.tar", "blank"): "empty_caption",
    ("0.tar", "json"): "bad_json",
    ("0.tar", "twice"): "duplicate_key",
    ("0.tar", "noimage"): "missing_image",
    ("1.tar", "fine"): "duplicate_key",
    ("2.tar", ""): "truncated_tar",
}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_bad_sample_is_named(sick, workers):
    bad_text = [("cut0", "bad_text"), ("cut1", "bad_text")]  # a picture where a text should be
    limits = {"max_pixels": 9_999, "max_bytes": 20_000}
    findings = examine(sick, workers=workers, **limits)
    named = {(Path(one["shard"]).name, one["key"]): one["cause"] for one in findings["problems"]}
    assert named == {**FOUND, **{("2.tar", key): cause for key, cause in bad_text}}
    assert findings["samples"] == 12 + 2 + 2
    assert findings["sound"] == findings["samples"] - 13
    assert findings["causes"]["oversized_image"] == 2
    detail = next(one["detail"] for one in findings["problems"] if one["key"] == "fine")
    assert detail == f"the same key is in {sick / '0.tar'}"


def test_oversized_by_bytes(sick):
    causes = examine(sick, max_bytes=1, decode=False)["causes"]
    assert causes["oversized_image"] == 11  # all pictures that get so far


def test_exit_code_text_and_json(sick, tmp_path, make_picture, capsys, monkeypatch):
    assert main(["doctor", str(sick), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert main(["doctor", str(sick), "--json", str(tmp_path / "found.json")]) == 1
    text = capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text()) == printed
    assert "sample 'blank': no caption in KEY.json and no text in KEY.txt" in text
    with ShardWriter(tmp_path / "well") as writer:
        writer.write(Sample("a", make_picture(0), "jpg", ["a text"]))
    assert main(["doctor", str(tmp_path / "well")]) == 0
    assert "nothing found" in capsys.readouterr().out
    monkeypatch.setattr("data.doctor.examine", None)  # told before the work
    monkeypatch.setattr("data.check.check_shards", None)
    (tmp_path / "file").touch()
    for command in ("doctor", "check"):
        with pytest.raises(ValueError, match=r"--json .*well is a folder: name a file"):
            main([command, str(sick), "--json", str(tmp_path / "well")])
        with pytest.raises(ValueError, match=r"--json .*: no file can be written in .*file"):
            main([command, str(sick), "--json", str(tmp_path / "file/found.json")])
    with pytest.raises(ValueError, match=r"--json takes one file, got .*: put SHARDS before it"):
        main(["doctor", str(sick), "--json", "a", "b"])


def test_shards_without_a_sample_and_those_that_cannot_be_read(tmp_path, make_picture):
    good = make_picture(0)
    folder = tmp_path / "odd"
    write_tar(folder / "0.tar", [])
    write_tar(folder / "1.tar", [("README", b"x"), (".hidden.jpg", good), ("folder/.jpg", good)])
    (folder / "2.tar").write_bytes(b"")
    (folder / "3.tar").write_bytes(b"<html>" * 100)
    (folder / "4.tar").mkdir()
    (folder / "5.tar").symlink_to(tmp_path / "gone.tar")
    write_tar(folder / "6.tar", [("\u65e5\u672c/\u0436 1.jpg", good), ("\u65e5\u672c/\u0436 1.txt", b"a")])
    again = write_tar(folder / "7.tar", [("caf\udce9.jpg", good), ("caf\udce9.txt", b"a text")])
    again.with_name("8.tar").write_bytes(again.read_bytes())
    findings = examine(folder)
    named = [(Path(one["shard"]).name, one["cause"], one["key"]) for one in findings["problems"]]
    assert named == [
        ("0.tar", "empty_shard", ""),
        ("1.tar", "empty_shard", ""),
        ("2.tar", "bad_shard", ""),
        ("3.tar", "bad_shard", ""),
        ("4.tar", "unreadable_shard", ""),
        ("5.tar", "unreadable_shard", ""),
        ("8.tar", "duplicate_key", r"caf\xe9"),
    ]
    assert (findings["samples"], findings["sound"]) == (3, 2)
    assert "holds no sample: no file in it has a name such as KEY.jpg" in as_text(findings)
    assert check_shards(folder)["faults"]["unreadable_shard"]["samples"] == 2


def test_a_shard_whose_name_is_not_utf8(tmp_path, make_picture, capsys):
    (tmp_path / "set").mkdir()
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", make_picture(0))])
    name = os.fsencode(tmp_path / "set") + b"/caf\xe9.tar"
    shard.rename(os.fsdecode(name))
    for command in ("doctor", "check"):
        assert run_stage(main, [command, str(tmp_path / "set"), "--json", str(tmp_path / "found.json")]) == 1
        assert r"/caf\udce9.tar, sample 'a': no caption" in capsys.readouterr().out
        assert r"/caf\udce9.tar" in json.dumps(json.loads((tmp_path / "found.json").read_bytes()))


def test_a_set_elsewhere_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    findings = examine("memory://no/shard.tar")
    assert findings["causes"] == {"unreadable_shard": 1}
    with pytest.raises(ValueError, match=r"shard nosuch://a\.tar: .*got the scheme 'nosuch'"):
        examine("nosuch://a.tar")


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_pixels": 0}, "--max-pixels must be at least 1, got 0"),
        ({"max_bytes": -1}, "--max-bytes must be at least 1, got -1"),
        ({"workers": -1}, "--workers is a number of processes, at least 0, got -1"),
    ],
)
def test_limits_that_cannot_be(sick, limits, says):
    with pytest.raises(ValueError, match=says):
        examine(sick, **limits)
    if "max_bytes" not in limits:
        with pytest.raises(ValueError, match=says):
            check_shards(sick, **limits)


def test_a_manifest_that_promises_nonsense_promises_nothing(tmp_path, make_picture):
    with ShardWriter(tmp_path) as writer:
        writer.write(Sample("a", make_picture(0), "jpg", ["a text"]))
    for entry in ({"samples": "five", "bytes": [], "sha256": 7}, {"samples": -5}, {"samples": True}, 3, None):
        (tmp_path / "manifest.json").write_text(json.dumps({"shards": {"00000.tar": entry}}))
        assert examine(tmp_path)["problems"] == []
        assert check_shards(tmp_path)["faults"] == {}


def test_the_text_names_some_and_counts_the_rest():
    problem = {"cause": "empty_caption", "shard": "a.tar", "detail": "none", "count": 1}
    problems = [{**problem, "key": f"k{n}"} for n in range(25)]
    text = as_text(
        {"shards": 1, "samples": 30, "sound": 5, "causes": {"empty_caption": 25}, "problems": problems}
    )
    assert "a.tar, sample 'k19': none" in text
    assert "k20" not in text
    assert "... and 5 more" in text
