"""The doctor names each sample that is planted as bad, and nothing else."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from data.cli import main
from data.doctor import as_text, examine
from data.shards import Sample, ShardWriter


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


def test_exit_code_text_and_json(sick, tmp_path, make_picture, capsys):
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
    with pytest.raises(ValueError, match=r"--json takes one file, got .*: put SHARDS before it"):
        main(["doctor", str(sick), "--json", "a", "b"])


def test_the_text_names_some_and_counts_the_rest():
    problem = {"cause": "empty_caption", "shard": "a.tar", "detail": "none", "count": 1}
    problems = [{**problem, "key": f"k{n}"} for n in range(25)]
    text = as_text(
        {"shards": 1, "samples": 30, "sound": 5, "causes": {"empty_caption": 25}, "problems": problems}
    )
    assert "a.tar, sample 'k19': none" in text
    assert "k20" not in text
    assert "... and 5 more" in text
