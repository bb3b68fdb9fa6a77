"""Being told to leave, and where a run goes on."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

import pretrain.objectives as module
from pretrain.checkpoint import complete_checkpoints
from pretrain.preemption import SIGNALS, Preempted, StopRequest
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import OpenClipModel, TimmTower, TowersModel
from pretrain.resume import beginning
from pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Probe:
    """An evaluator of which every call can be told apart by the weights."""

    def run(self, encoder) -> dict[str, float]:
        return {"probe": float(encoder.model.logit_scale.detach())}


@pytest.fixture
def start(tiny_recipe, fresh_accelerate, monkeypatch):
    """`start(resume=..., **recipe_keys) -> Trainer`, with an evaluator that is due at every other step."""
    monkeypatch.setattr("pretrain.evaluator.load_evaluator", lambda config: Probe())

    def make(*, resume: bool | str = False, **keys) -> Trainer:
        fresh_accelerate()
        keys = {"evaluate": [{"use": "a:B", "every": 2}], **keys}
        return Trainer(PretrainRecipe.model_validate(tiny_recipe(**keys)), resume=resume)

    return make


def signal_in_step(monkeypatch, step: int, number: signal.Signals) -> None:
    """Let a signal come in the middle of a step."""
    exact, calls = module.distributed_info_nce, []

    def signals(*features, **options):
        calls.append(None)
        if len(calls) == step:
            signal.raise_signal(number)
        return exact(*features, **options)

    monkeypatch.setattr(module, "distributed_info_nce", signals)


def log_of(run: Path) -> list[dict]:
    varying = ("samples_per_s", "tflops_per_s", "data_wait_s", "data_wait_share", "memory_mb")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in varying} for line in lines]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_its_step_and_a_resume_ends_as_one_that_had_none(
    start, tmp_path, monkeypatch, capsys, number
):
    """The signal comes in step 4, whose evaluation is due and left out for lack of time."""
    whole = start(run=str(tmp_path / "whole"))
    whole.train()
    keys = {"checkpoint": {"every": 3}, "run": str(tmp_path / "left")}
    with monkeypatch.context() as patch:
        signal_in_step(patch, 4, number)
        with pytest.raises(Preempted) as left:
            start(**keys).train()
    assert (left.value.step, left.value.code) == (4, 0)
    assert complete_checkpoints(tmp_path / "left/checkpoints")[0].name == "step-00000004"
    assert not (tmp_path / "left/metrics.json").exists()
    assert "told to leave: saved step 4 of 6" in capsys.readouterr().err
    resumed = start(resume=True, **keys)
    resumed.train()
    assert whole.evaluations.history == resumed.evaluations.history
    assert sorted(resumed.evaluations.history) == ["0", "2", "4", "6"]
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "left")
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_signal_in_the_last_step_lets_the_run_finish(start, tmp_path, monkeypatch):
    signal_in_step(monkeypatch, 6, signal.SIGTERM)
    assert start().train()["steps"] == 6


def test_the_exit_code_is_the_recipes(start, monkeypatch):
    signal_in_step(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        start(preempted_exit_code=75).train()
    assert left.value.code == 75


def test_handlers_are_put_back_and_other_threads_have_none():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with StopRequest() as stop:
        assert not stop.requested
        for _ in range(2):
            signal.raise_signal(signal.SIGUSR1)
        assert stop.requested
    assert {number: signal.getsignal(number) for number in SIGNALS} == before

    seen = []

    def elsewhere() -> None:
        with StopRequest() as stop:
            seen.append(stop.before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [{}]


# Where a run goes on


def test_the_runs_own_checkpoint_goes_before_a_given_one(start, tmp_path, capsys):
    start(steps=3, run=str(tmp_path / "other")).train()
    given = str(tmp_path / "other")
    capsys.readouterr()
    trainer = start(steps=3, resume=given)
    assert trainer.step == 3
    assert "resuming at step 3 from " in (said := capsys.readouterr().err)
    assert "(2: the given one; the run has no checkpoint)" in said
    assert (tmp_path / "run/recipe.resolved.yaml").is_file()
    shutil.rmtree(tmp_path / "run")
    by_step = start(steps=3, resume=f"{given}/checkpoints/step-00000002")
    assert by_step.step == 2
    by_step.train()
    capsys.readouterr()
    assert start(steps=3, resume=f"{given}/checkpoints/step-00000002").step == 3
    assert "(1: the run's own newest checkpoint)" in capsys.readouterr().err


def test_a_given_place_without_a_checkpoint_and_one_of_another_run(start, tmp_path):
    with pytest.raises(
        ValueError, match=r"--resume .*absent: no checkpoint to go on from: expected a folder"
    ):
        start(resume=str(tmp_path / "absent"))
    start(steps=3, run=str(tmp_path / "other")).train()
    with pytest.raises(ValueError, match="cannot resume with another batch_size"):
        start(steps=3, batch_size=4, resume=str(tmp_path / "other"))


def test_the_beginning_is_told(start, capsys):
    start(resume=True)
    assert "starting at step 0 (4: from scratch, random weights)" in capsys.readouterr().err
    assert beginning(OpenClipModel(name="ViT-B-32")) == "(4: from scratch, random weights)"
    assert "(3: initial weights, ViT-B-32 openai)" in beginning(
        OpenClipModel(name="ViT-B-32", pretrained="openai")
    )
    assert "runs/mine" in beginning(OpenClipModel(name="runs/mine"))
    tower = TimmTower(name="resnet18", weights="package:x/y.pth")
    assert "package:x/y.pth" in beginning(TowersModel(image_tower=tower))
