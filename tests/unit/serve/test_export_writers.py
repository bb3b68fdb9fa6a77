"""Exported captioners and VQA models write what the model writes, without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from finetune.model import load_task_model
from pairstream.cli import main as pairstream
from serve.export.runtime import EdgeEncoder
from serve.export.task_models import check_writing, compare_writing, export_task_model
from serve.export.writer import EdgeWriter


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load_task_model(folders[name], device="cpu") for name in ("captioner", "vqa")}


@pytest.fixture(scope="module")
def exported(loaded, folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("writers")
    assert (
        pairstream(["export", "--captioner", str(folders["captioner"]), "--out", str(root / "captioner")])
        == 0
    )
    export_task_model(loaded["vqa"], root / "vqa", name="vqa")
    export_task_model(loaded["captioner"], root / "openvino", to="openvino")
    return root


def test_captions_are_the_model_s_for_any_batch(loaded, exported, make_picture):
    model = loaded["captioner"]
    for folder in ("captioner", "openvino"):
        edge = EdgeWriter(exported / folder)
        for batch in (1, 2, 5):
            pixels = torch.stack([model.encoder.preprocess(make_picture(seed)) for seed in range(batch)])
            expected = model.caption(list(pixels))
            assert any(expected)
            assert edge.caption(pixels.numpy()) == expected
            assert edge.predict(pixels.numpy()) == expected


def test_answers_are_the_model_s_for_questions_of_unequal_length(loaded, exported, make_picture):
    model, edge = loaded["vqa"], EdgeWriter(exported / "vqa")
    questions = ["Is there a dog?", "how many cats are there in the picture?", "yes"]
    pixels = torch.stack([model.encoder.preprocess(make_picture(seed)) for seed in range(3)])
    assert edge.answer(pixels.numpy(), questions) == model.answer(list(pixels), questions)


def test_writing_needs_no_torch(loaded, exported, make_picture, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(make_picture(1, (32, 32), "PNG"))
    code = f"""
import sys
for name in ("torch", "torchvision", "open_clip", "transformers", "pretrain", "finetune", "data"):
    sys.modules[name] = None  # importing it fails
from serve.export.writer import EdgeWriter
print(ascii(EdgeWriter({str(exported / "captioner")!r}).predict([{str(path)!r}])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ascii(loaded["captioner"].caption([path.read_bytes()]))


def test_the_gate_sees_another_language_model(loaded, exported):
    edge = EdgeWriter(exported / "captioner")
    card = json.loads((exported / "captioner/export.json").read_text())
    assert card["parity"]["different"] == 0
    assert card["bytes"]["export"] > card["bytes"]["model"] * 0.9
    real = edge.next
    edge.next = lambda prefix, ids: np.roll(real(prefix, ids), 1, axis=1)
    report = compare_writing(loaded["captioner"], edge)
    assert report["texts"] == 12
    assert report["different"] >= 10  # a text may be chance
    with pytest.raises(ValueError, match=r"refused: 1[0-2] of 12 texts differ"):
        check_writing(report)


def test_what_is_wrong_is_said(exported, folders, tmp_path, make_picture, capsys):
    captioner, vqa = EdgeWriter(exported / "captioner"), EdgeWriter(exported / "vqa")
    picture = make_picture(1)
    with pytest.raises(ValueError, match=r"answers questions: use answer"):
        vqa.caption([picture])
    with pytest.raises(ValueError, match=r"writes captions: use caption"):
        captioner.predict([picture], ["a?"])
    with pytest.raises(ValueError, match=r"expected one question for each picture"):
        vqa.answer([picture], ["a?", "b?"])
    with pytest.raises(ValueError, match=r"an empty question"):
        vqa.answer([picture], [" "])
    with pytest.raises(ValueError, match=r"the prompt does not fit"):
        vqa.answer([picture], ["zqxjkvbw " * 40])
    with pytest.raises(
        ValueError, match=r"holds an exported writer: open it with serve.export.writer.EdgeWriter"
    ):
        EdgeEncoder(exported / "vqa")
    for words, message in (
        ([], "give one of --model, --captioner, --vqa; got none"),
        (["--captioner", "a", "--vqa", "b"], "got --captioner and --vqa"),
        (["--captioner", "a", "--int8"], "is exported in float32"),
        (["--vqa", str(folders["captioner"])], "was trained for caption, expected a model for vqa"),
    ):
        assert pairstream(["export", *words, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
