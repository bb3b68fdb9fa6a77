"""A loss that is not finite or spikes: what is written down, what is left out, when the run stops."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import pretrain.objectives as module
from pretrain.checkpoint import complete_checkpoints
from pretrain.recipe import PretrainRecipe
from pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def run(tiny_recipe, fresh_accelerate, monkeypatch):
    """`run(bad={step: factor}, **recipe_keys) -> Trainer`: the loss of those steps is multiplied, then it trains."""

    def make(bad: dict[int, float], *, resume: bool = False, **keys) -> Trainer:
        fresh_accelerate()
        content = tiny_recipe(**{"checkpoint": {"every": 2, "keep": 4}, **keys})
        trainer = Trainer(PretrainRecipe.model_validate(content), resume=resume)
        exact = distributed_info_nce

        def loss(*features, **options):
            return exact(*features, **options) * bad.get(trainer.step + 1, 1.0)

        monkeypatch.setattr(module, "distributed_info_nce", loss)
        trainer.train()
        return trainer

    return make


distributed_info_nce = module.distributed_info_nce


def incidents(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "divergence.jsonl").read_text().splitlines()]


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(one: Trainer, other: Trainer) -> bool:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_step_that_is_skipped_leaves_no_trace_but_its_line(run, tmp_path, tiny_models, kind, monkeypatch):
    """As a run whose step 3 was never taken: weights, moments, and a ResNet's batch statistics."""
    keys = {"on_divergence": {"action": "skip"}, "model": tiny_models[kind]}
    skipped = run({3: math.nan}, run=str(tmp_path / "skipped"), **keys)
    take = Trainer.train_step

    def omit(trainer, *args):
        return 0 if trainer.step + 1 == 3 else take(trainer, *args)

    monkeypatch.setattr(Trainer, "train_step", omit)
    omitted = run({}, run=str(tmp_path / "omitted"), **keys)
    assert same(skipped, omitted)
    (line,) = incidents(tmp_path / "skipped")
    assert (line["step"], line["action"], line["loss"]) == (3, "skip", None)
    assert line["keys"] == next(skipped.stream.iterate(2, 3)).keys
    assert skipped.samples_seen == 5 * 8
    assert json.loads((tmp_path / "skipped/metrics.json").read_text())["batches_left_out"] == 1
    assert not (tmp_path / "omitted/divergence.jsonl").exists()


def test_a_step_that_is_skipped_is_not_remembered_of_its_samples(
    tiny_recipe, fresh_accelerate, tmp_path, monkeypatch
):
    """The averages of a global estimator are those of a run whose step 3 was never taken."""
    exact, ends = module.global_info_nce, []
    for run in ("skipped", "omitted"):
        fresh_accelerate()
        keys = {
            "run": str(tmp_path / run),
            "loss": {"kind": "global_contrast"},
            "on_divergence": {"action": "skip"},
        }
        trainer = Trainer(PretrainRecipe.model_validate(tiny_recipe(**keys)))

        def loss(*features, trainer=trainer, **options):
            return exact(*features, **options) * (math.nan if trainer.step == 2 else 1.0)

        monkeypatch.setattr(module, "global_info_nce", loss)
        if run == "omitted":
            trainer.watch.left_out.add(3)
        trainer.train()
        ends.append(trainer)
    assert same(*ends)
    ours, theirs = (trainer.beside.state_dict() for trainer in ends)
    for name in ("sample_means.image", "sample_means.text"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    assert len(incidents(tmp_path / "skipped")) == 1
    assert not (tmp_path / "omitted/divergence.jsonl").exists()


@pytest.mark.parametrize("step", [1, 4])
def test_a_roll_back_ends_as_a_run_that_left_the_batch_out(run, tmp_path, step):
    """Step 4 diverges after the checkpoint of step 2, step 1 before there would be any."""
    rolled = run({step: math.inf}, run=str(tmp_path / "a"), on_divergence={"action": "rollback"})
    skipped = run({step: math.inf}, run=str(tmp_path / "b"), on_divergence={"action": "skip"})
    assert same(rolled, skipped)
    logs = [
        [(r["step"], r["loss"], r["samples_seen"]) for r in log_of(path)]
        for path in (tmp_path / "a", tmp_path / "b")
    ]
    assert logs[0] == logs[1]
    assert [number for number, _, _ in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert [line["action"] for line in incidents(tmp_path / "a")] == ["rollback"]


def test_a_spike_is_judged_by_the_median_of_the_steps_before(run, tmp_path):
    """Window 3: step 2 comes too early to be a spike, step 5 is one, and does not count into the median."""
    rule = {"action": "skip", "spike": 2.0, "window": 3}
    trainer = run({2: 4.0, 5: 4.0}, on_divergence=rule)
    (line,) = incidents(tmp_path / "run")
    assert line["step"] == 5
    assert line["loss"] > 2 * line["median"]
    log = {r["step"]: r["loss"] for r in log_of(tmp_path / "run")}
    assert log[5] is None
    assert list(trainer.watch.losses) == pytest.approx([log[3], log[4], log[6]])
    assert line["median"] == pytest.approx(sorted([log[2], log[3], log[4]])[1])


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_run_killed_after_an_incident_goes_on_as_if_it_had_not_been(run, tmp_path, action):
    keys = {"on_divergence": {"action": action, "spike": 2.0, "window": 2}, "steps": 8}
    bad = {3: math.nan, 6: 9.0}
    whole = run(bad, run=str(tmp_path / "whole"), **keys)
    for kept in (4, 2):  # killed after step 4; and in a way that took the newer checkpoints along
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "killed")
        for folder in complete_checkpoints(tmp_path / "killed/checkpoints"):
            if int(folder.name[5:]) > kept:
                shutil.rmtree(folder)
        resumed = run(bad, run=str(tmp_path / "killed"), resume=True, **keys)
        assert same(whole, resumed)
        assert incidents(tmp_path / "killed") == incidents(tmp_path / "whole")


def test_the_limit_stops_the_run(run, tmp_path):
    rule = {"action": "skip", "limit": 2}
    with pytest.raises(
        ValueError, match=r"the loss is nan .* at step 5: .* 2 batches \(on_divergence.limit\) were left out"
    ):
        run({2: math.nan, 3: math.nan, 5: math.nan}, on_divergence=rule)
    assert [line["step"] for line in incidents(tmp_path / "run")] == [2, 3, 5]
    assert complete_checkpoints(tmp_path / "run/checkpoints")[0].name == "step-00000004"


def test_a_run_that_stopped_names_the_samples_and_can_be_resumed_with_another_rule(run, tmp_path):
    """The last checkpoint is from before, and the step that diverged is tried again."""
    with pytest.raises(
        ValueError, match=r"loss [\d.]+ times its median .*The batch's samples: .*divergence\.jsonl"
    ):
        run({4: 9.0}, on_divergence={"spike": 3.0, "window": 2})
    assert [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000002"]
    (line,) = incidents(tmp_path / "run")
    assert (line["action"], len(line["keys"])) == ("stop", 8)
    trainer = run({4: 9.0}, on_divergence={"action": "skip", "spike": 3.0, "window": 2}, resume=True)
    assert trainer.watch.left_out == {4}
    assert [line["action"] for line in incidents(tmp_path / "run")] == ["stop", "skip"]


def test_a_run_that_begins_anew_forgets_its_incidents(run, tmp_path):
    with pytest.raises(ValueError, match="training has diverged"):
        run({1: math.nan})
    run({}, resume=True)
    assert not (tmp_path / "run/divergence.jsonl").exists()
