import io
import json
import tarfile
from pathlib import Path

import pytest

from data.check import check_shards
from data.cli import main
from data.shards import Sample, ShardWriter
from pairstream.cli import main as pairstream


@pytest.fixture
def sound(tmp_path, make_picture) -> Path:
    """Three shards of ten pictures, 30 to 39 pixels wide, with one to three captions."""
    folder = tmp_path / "sound"
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for n in range(10):
            captions = [f"a text of {'many ' * n}words"] * (1 + n % 3)
            format, extension = [("JPEG", "jpg"), ("PNG", "png")][n % 2]
            picture = make_picture(n, (30 + n, 20), format)
            writer.write(Sample(f"{n:05d}", picture, extension, captions, {"url": "u"}))
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(("decode", "workers"), [(True, 1), (False, 1), (True, 2)])
def test_a_sound_set(sound, decode, workers):
    findings = check_shards(sound, decode=decode, workers=workers)
    assert findings["faults"] == {}
    assert (findings["shards"], findings["samples"], findings["usable"]) == (3, 10, 10)
    assert findings["captions"] == 4 * 1 + 3 * 2 + 3 * 3
    assert findings["bytes"] == sum(path.stat().st_size for path in sound.glob("*.tar"))
    assert findings["formats"] == {"jpeg": 5, "png": 5}
    assert findings["json_keys"] == {"caption": 10, "captions": 10, "url": 10}
    assert findings["statistics"]["width"] == {
        "min": 30,
        "median": 34.5,
        "p95": 38.55,
        "max": 39,
        "mean": 34.5,
    }
    assert findings["statistics"]["height"]["max"] == 20
    assert findings["statistics"]["captions per picture"]["mean"] == 1.9
    assert findings["statistics"]["words per caption"]["max"] == 13
    assert findings["statistics"]["characters per caption"]["min"] == len("a text of words")
    assert findings["manifest"] is True


def test_the_command_prints_a_table_and_writes_json(sound, tmp_path, capsys):
    assert main(["check", str(sound), "--json", str(tmp_path / "f.json")]) == 0
    out = capsys.readouterr().out
    assert "samples    10\n" in out
    assert "pictures   jpeg 5, png 5" in out
    assert "no faults" in out
    assert "compared with manifest.json" in out
    assert json.loads((tmp_path / "f.json").read_text())["samples"] == 10


def test_damage_is_counted_with_examples_and_gives_exit_code_1(sound, make_picture, tmp_path, capsys):
    whole = (sound / "00001.tar").read_bytes()
    (sound / "00001.tar").write_bytes(whole[: len(whole) // 2])
    with tarfile.open(sound / "extra.tar", "w") as tar:
        add(tar, "text.jpg", b"a text file")
        add(tar, "text.txt", b"a text")
        add(tar, "mute.jpg", make_picture(0))
        add(tar, "cut.jpg", make_picture(0, (200, 200))[:900])
        add(tar, "cut.txt", b"a text")
        add(tar, "00000.jpg", make_picture(0))
        add(tar, "00000.txt", b"a text")
    (sound / "not.tar").write_bytes(b"nothing of the kind" * 100)
    assert main(["check", str(sound), "--json", str(tmp_path / "f.json")]) == 1
    findings = json.loads((tmp_path / "f.json").read_text())
    faults = findings["faults"]
    left = findings["samples"] - 6 - 4
    assert {cause: entry["samples"] for cause, entry in faults.items()} == {
        "undecodable_image": 2,
        "missing_caption": 1,
        "bad_shard": 1,
        "truncated_tar": 4 - left,
    }
    assert 1 <= left <= 2
    assert findings["usable"] == findings["samples"] - 3
    assert findings["repeated_keys"] == 1
    out = capsys.readouterr().out
    assert "of the 4 that the manifest promises" in out
    assert "sample 'mute': no caption" in out
    assert "not.tar: not a tar" in out
    assert "1 occur in more than one shard (allowed)" in out


def test_headers_alone_do_not_find_cut_pictures(make_picture, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "cut.jpg", make_picture(0, (200, 200))[:900])
        add(tar, "cut.txt", b"a text")
    assert check_shards(tmp_path, decode=False)["faults"] == {}
    assert set(check_shards(tmp_path)["faults"]) == {"undecodable_image"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 3}, "has 4 samples, the manifest promises 3"),
        ({"bytes": 5}, "bytes, the manifest promises 5"),
        ({"sha256": "0" * 64}, "the manifest promises 000000000000..."),
    ],
)
def test_a_shard_that_differs_from_its_manifest(sound, change, words):
    path = sound / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"]["00000.tar"].update(change)
    path.write_text(json.dumps(manifest))
    faults = check_shards(sound)["faults"]
    assert set(faults) == {"manifest_mismatch"}
    assert words in faults["manifest_mismatch"]["examples"][0]


def test_a_shard_that_the_manifest_names_is_gone(sound):
    (sound / "00001.tar").unlink()
    assert check_shards(sound)["faults"]["bad_shard"] == {
        "samples": 4,
        "examples": [f"{sound / '00001.tar'}: is in manifest.json but not in the folder"],
    }


def test_large_pictures_are_faults_as_in_training(sound):
    faults = check_shards(sound, max_pixels=35 * 20)["faults"]
    assert faults["too_large_image"]["samples"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data", "chekc"],
            "no command 'chekc': expected one of list, prepare, download, curate, check, doctor; did you mean 'check'?",
        ),
        (["data", "check"], "the shard list is empty"),
        (["data", "check", "/nowhere/at/all"], "no shards at /nowhere/at/all"),
    ],
)
def test_user_errors_are_one_message_and_exit_code_2(words, message, capsys):
    assert pairstream(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    assert "check" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["check", "--help"])
    assert "--no-decode" in capsys.readouterr().out
