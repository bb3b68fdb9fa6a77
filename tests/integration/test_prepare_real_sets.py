"""`pairstream data prepare` on the real sets beside the repository."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from data.prepare import prepare
from pairstream.cli import main


def records(folder: Path) -> list[dict]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append(json.loads(file.read()))
    return found


@pytest.mark.parametrize(("split", "count"), [("train", 6000), ("dev", 1000)])
def test_flickr8k(shared: Path, tmp_path: Path, split: str, count: int) -> None:
    summary = prepare("flickr8k", root=shared / "flickr8k", split=split, out=tmp_path / "out", quiet=True)
    assert (summary.samples, summary.captions, summary.faults) == (count, 5 * count, 0)
    written = records(tmp_path / "out")
    assert all(len(record["captions"]) == 5 for record in written)
    listed = (shared / "flickr8k" / f"Flickr_8k.{split}Images.txt").read_text().split()
    assert [record["name"] for record in written] == listed


@pytest.mark.parametrize(("split", "pictures", "questions"), [("train", 1669, 2506), ("val", 377, 564)])
def test_vqav2(shared: Path, tmp_path: Path, split: str, pictures: int, questions: int) -> None:
    summary = prepare("vqav2", root=shared / "vqav2_small", split=split, out=tmp_path / "out", quiet=True)
    assert (summary.samples, summary.questions, summary.faults) == (pictures, questions, 0)
    asked = {
        question["question_id"]: question
        for record in records(tmp_path / "out")
        for question in record["questions"]
    }
    annotations = json.loads((shared / "vqav2_small" / f"v2_mscoco_{split}2014_annotations.json").read_text())
    for row in annotations["annotations"]:
        assert asked[row["question_id"]]["answers"] == [answer["answer"] for answer in row["answers"]]


def test_the_command(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "data",
        "prepare",
        "flickr8k",
        "--root",
        str(shared / "flickr8k"),
        "--split",
        "dev",
        "--limit",
        "20",
    ]
    assert main([*words, "--image-size", "64", "--out", str(tmp_path / "out")]) == 0
    assert "20 samples, 100 captions" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "out"), "--overwrite"]) == 0
