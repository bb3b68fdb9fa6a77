"""Checkpoints written beside the training, and their copies elsewhere."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

import pretrain.saver
from pretrain.checkpoint import complete_checkpoints, read_training_state
from pretrain.copies import copy_checkpoint, fetch_newest, open_place, whole_copies
from pretrain.encoder import build_encoder, load_encoder
from pretrain.optim import build_optimizer
from pretrain.recipe import PretrainCheckpoints, PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.recipe_optim import AdamW
from pretrain.saver import Saver, snapshot
from pretrain.trainer import Trainer


@pytest.fixture
def memory():
    """A URL of an empty file system in memory."""
    yield "memory://copies/run"
    files = fsspec.filesystem("memory")
    if files.exists("/copies"):
        files.rm("/copies", recursive=True)


@pytest.fixture
def parts(tiny_models):
    encoder = build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu")
    optimizer = build_optimizer(encoder.model.named_parameters(), AdamW())
    for parameter in encoder.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return encoder, optimizer


def small_checkpoint(folder: Path, step: int, size: int = 3) -> Path:
    path = folder / f"step-{step:08d}"
    (path / "training").mkdir(parents=True)
    (path / "model").mkdir()
    (path / "training" / "state.json").write_text(json.dumps({"step": step}))
    (path / "model" / "weights").write_bytes(b"w" * size)
    return path


def test_what_is_written_is_of_the_step_that_saved(parts, tmp_path, monkeypatch):
    """Training changes model, moments and history while the files are still to be written."""
    encoder, optimizer = parts
    gate, write = threading.Event(), pretrain.saver.save_checkpoint

    def late(*args, **keys):
        assert gate.wait(60)
        return write(*args, **keys)

    monkeypatch.setattr(pretrain.saver, "save_checkpoint", late)
    before = snapshot(encoder.model.state_dict())
    history = {"1": {"recall": 0.5}}
    with Saver(tmp_path, PretrainCheckpoints()) as saver:
        saver.save(1, encoder, optimizer, card="a card", state={"history": history})
        assert complete_checkpoints(tmp_path) == []
        saver.poll()  # not done yet: nothing to raise, nothing to wait for
        optimizer.step()
        history["2"] = {}
        gate.set()
    (folder,) = complete_checkpoints(tmp_path)
    state, moments = read_training_state(folder)
    assert state["history"] == {"1": {"recall": 0.5}}
    assert float(moments["logit_scale|step"]) == 1.0
    after = load_encoder(folder / "model").model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(before[name], value) for name, value in encoder.model.state_dict().items())


def test_a_snapshot_shares_no_memory_and_is_contiguous():
    weight = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).weight
    taken = snapshot({"weight": weight})["weight"]
    assert taken.is_contiguous()
    assert torch.equal(taken, weight)
    assert taken.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


def test_a_save_that_failed_is_raised_by_the_next_look(parts, tmp_path, monkeypatch):
    def full(*args, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrain.saver, "save_checkpoint", full)
    with Saver(tmp_path, PretrainCheckpoints()) as saver:
        saver.save(1, *parts, card="", state={})
        assert saver.under_way is not None
        saver.under_way.exception(60)
        with pytest.raises(OSError, match="No space left"):
            saver.poll()
    with pytest.raises(OSError, match="No space left"), Saver(tmp_path, PretrainCheckpoints()) as saver:
        saver.save(1, *parts, card="", state={})
    with pytest.raises(OSError, match="No space left"):
        Saver(tmp_path, PretrainCheckpoints(background=False)).save(1, *parts, card="", state={})


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_save(parts, tmp_path, monkeypatch, capsys):
    def full(*args, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrain.saver, "save_checkpoint", full)

    def train() -> None:
        with Saver(tmp_path, PretrainCheckpoints()) as saver:
            saver.save(1, *parts, card="", state={})
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        train()
    assert "the last checkpoint could not be written: the disk is full" in capsys.readouterr().err


# Copies


def test_copies_are_rotated_and_brought_back(memory, tmp_path):
    for step in (1, 2, 3):
        copy_checkpoint(small_checkpoint(tmp_path / "run", step), memory, keep=2)
    files, root = open_place(memory)
    assert whole_copies(files, root) == ["step-00000003", "step-00000002"]
    assert not files.exists(f"{root}/step-00000001")
    found = fetch_newest(memory, tmp_path / "new")
    assert found == tmp_path / "new/step-00000003"
    assert {path.relative_to(found): path.read_bytes() for path in found.rglob("*") if path.is_file()} == {
        Path("training/state.json"): b'{"step": 3}',
        Path("model/weights"): b"www",
    }
    assert fetch_newest("memory://copies/elsewhere", tmp_path / "other") is None


def test_a_copy_that_broke_off_is_not_taken_for_one(memory, tmp_path, monkeypatch):
    copy_checkpoint(small_checkpoint(tmp_path / "run", 1), memory)
    newer = small_checkpoint(tmp_path / "run", 2)
    files, root = open_place(memory)
    put = type(files).put_file

    def breaks(self, local, remote, **keys):
        if remote.endswith("state.json"):
            raise ConnectionError("the line is dead")
        return put(self, local, remote, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(type(files), "put_file", breaks)
        with pytest.raises(ConnectionError):
            copy_checkpoint(newer, memory)
    assert files.exists(f"{root}/step-00000002/model/weights")
    assert whole_copies(files, root) == ["step-00000001"]
    copy_checkpoint(newer, memory)
    assert whole_copies(files, root) == ["step-00000002", "step-00000001"]


def test_a_copy_of_another_size_is_an_error(memory, tmp_path, monkeypatch):
    files, _ = open_place(memory)
    monkeypatch.setattr(type(files), "size", lambda self, path: 1)
    with pytest.raises(OSError, match=r"has 1 bytes, .*weights 3"):
        copy_checkpoint(small_checkpoint(tmp_path, 1), memory)


def test_places_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.copy_to 'nowhere://x': expected a folder or a URL"):
        Saver(tmp_path, PretrainCheckpoints(copy_to="nowhere://x"))
    with pytest.raises(ValueError, match="copy_keep 2 without copy_to"):
        PretrainCheckpoints(copy_keep=2)


def test_a_run_whose_machine_is_lost_goes_on_from_its_copies(tiny_recipe, tmp_path, fresh_accelerate, capsys):
    """To a folder by its path, as to any URL."""
    copies = tmp_path / "bucket"
    content = tiny_recipe(checkpoint={"every": 2, "copy_to": str(copies), "copy_keep": 1})
    recipe = PretrainRecipe.model_validate(content)
    whole = Trainer(recipe)
    whole.train()
    assert [path.name for path in copies.iterdir()] == ["step-00000006"]
    shutil.rmtree(tmp_path / "run")
    fresh_accelerate()
    resumed = Trainer(recipe, resume=True)
    assert resumed.step == 6
    said = capsys.readouterr().err
    assert f"brought step-00000006 back from {copies}" in said
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_copy_that_fails_is_told_and_ends_the_run_only_when_it_was_the_last(
    tiny_recipe, tmp_path, fresh_accelerate, monkeypatch, capsys
):
    recipe = PretrainRecipe.model_validate(
        tiny_recipe(steps=4, checkpoint={"every": 2, "copy_to": str(tmp_path / "bucket")})
    )
    failing = {2}

    def copy(folder, url, *, keep):
        if int(folder.name[5:]) in failing:
            raise ConnectionError("the line is dead")

    monkeypatch.setattr(pretrain.saver, "copy_checkpoint", copy)
    Trainer(recipe).train()
    assert "could not copy" in capsys.readouterr().err
    failing.add(4)
    fresh_accelerate()
    with pytest.raises(OSError, match=r"could not be copied to .*bucket: the line is dead"):
        Trainer(recipe, overwrite=True).train()
    assert complete_checkpoints(tmp_path / "run/checkpoints")[0].name == "step-00000004"
