"""The loop itself, in this process: what it writes, what it refuses, what a diverging run leaves."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pretrain.objectives as module
from pretrain.checkpoint import complete_checkpoints
from pretrain.encoder import load_encoder
from pretrain.recipe import Phase, PretrainRecipe
from pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def train(tiny_recipe, fresh_accelerate):
    """`train(resume=False, overwrite=False, **recipe_keys) -> Trainer` after its run."""

    def run(*, resume: bool = False, overwrite: bool = False, **keys) -> Trainer:
        fresh_accelerate()
        trainer = Trainer(
            PretrainRecipe.model_validate(tiny_recipe(**keys)), resume=resume, overwrite=overwrite
        )
        trainer.train()
        return trainer

    return run


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Probe:
    """An evaluator that counts its calls."""

    def run(self, encoder) -> dict[str, float]:
        assert not encoder.encode_texts(["a word"]).requires_grad
        return {"probe/recall@1": 0.5}


def test_a_run_leaves_recipe_log_metrics_report_and_checkpoints(train, tmp_path):
    trainer = train(checkpoint={"every": 2, "keep": 2})
    folder = tmp_path / "run"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert [record["samples_seen"] for record in log] == [8, 16, 24, 32, 40, 48]
    assert [record["epoch"] for record in log] == [0, 0, 0, 0, 0, 1]
    assert [record["lr"] for record in log[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in log)
    for record in log:  # a line for each step, which took 8 pairs
        waited = record["data_wait_s"] * record["samples_per_s"] / 8
        assert 0 <= record["data_wait_share"] <= 1
        assert record["data_wait_share"] == pytest.approx(waited)
    assert [path.name for path in complete_checkpoints(folder / "checkpoints")] == [
        "step-00000006",
        "step-00000004",
    ]
    assert json.loads((folder / "metrics.json").read_text())["samples_seen"] == 48
    assert (folder / "report.html").stat().st_size > 1000
    assert (folder / "recipe.resolved.yaml").is_file()
    assert load_encoder(folder).fingerprint == trainer.encoder.fingerprint
    assert "step 6" in (trainer.model_folder / "README.md").read_text()


def test_evaluators_run_at_the_start_when_due_and_at_the_end(train, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.evaluator.load_evaluator", lambda config: Probe())
    trainer = train(steps=5, evaluate=[{"use": "some:Thing", "every": 2}])
    assert sorted(trainer.evaluations.history, key=int) == ["0", "2", "4", "5"]
    assert "| probe/recall@1 | 0.5 |" in (trainer.model_folder / "README.md").read_text()
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["evaluation"] == {"probe/recall@1": 0.5}


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(train, tmp_path):
    first = weights(train(run=str(tmp_path / "a"), steps=3))
    assert same(first, weights(train(run=str(tmp_path / "b"), steps=3)))
    assert not same(first, weights(train(run=str(tmp_path / "c"), steps=3, seed=1)))


def test_evaluating_and_logging_leave_the_weights_alone(train, tmp_path, monkeypatch):
    class Greedy(Probe):
        def run(self, encoder):
            torch.rand(17)  # an evaluator that draws from the global generator
            return super().run(encoder)

    monkeypatch.setattr("pretrain.evaluator.load_evaluator", lambda config: Greedy())
    plain = weights(train(run=str(tmp_path / "a"), steps=3))
    watched = train(run=str(tmp_path / "b"), steps=3, evaluate=[{"use": "a:B", "every": 1}], log_every=3)
    assert same(plain, weights(watched))


def test_every_trained_tensor_gets_a_gradient_and_moves(train, tiny_models):
    for name, model in tiny_models.items():
        terms = {"captioning": {}} if name == "coca" else None  # a decoder is locked without
        trainer = train(model=model, terms=terms, steps=2, overwrite=True, schedule={"warmup": 0})
        moved = trainer.optimizer.state
        for name, parameter in trainer.model.named_parameters():
            assert parameter.requires_grad, name
            assert float(moved[parameter]["exp_avg_sq"].sum()) > 0, f"{name} never had a gradient"


def test_a_tensor_that_the_loss_does_not_reach_stops_the_run(tiny_recipe, fresh_accelerate):
    """It would silently stay as it was, as an adapter in the wrong place does."""
    trainer = Trainer(PretrainRecipe.model_validate(tiny_recipe()))
    trainer.model.visual.spare = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"visual.spare.weight, visual.spare.bias: to be trained, but .* no gradient"
    ):
        trainer.train()
    assert trainer.step == 0


def test_logit_scale_is_clamped_after_each_step(train, tmp_path):
    trainer = train(steps=1, max_logit_scale=10.0, schedule={"warmup": 0})
    assert float(trainer.model.logit_scale.detach()) == pytest.approx(math.log(10.0))  # began at ln 14.3
    (record,) = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert record["logit_scale"] == pytest.approx(10.0)


def test_a_batch_of_one_pair_is_left_out(train, tmp_path):
    trainer = train(batch_size=39, steps=2, schedule={"warmup": 1})  # 39 + 1 samples
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["samples_seen"] for record in log] == [39, 39]
    assert log[1]["loss"] is None
    assert trainer.step == 2


def test_fault_counts_are_carried_over_a_resume(train, tmp_path, make_picture):
    from data.shards import Sample, ShardWriter

    folder = tmp_path / "faulty"
    with ShardWriter(folder) as writer:
        for number in range(16):
            image = b"no picture" if number == 3 else make_picture(number)
            writer.write(Sample(f"{number}", image, "jpg", ("a thing",)))
    data = {"train": str(folder), "max_faults": 0.5}
    counts = train(data=data, steps=6, checkpoint={"every": 3, "keep": 3}).stream.faults
    assert counts == {"undecodable_image": 3}  # once an epoch
    drop_after(tmp_path / "run", 3)
    assert train(data=data, steps=6, checkpoint={"every": 3}, resume=True).stream.faults == counts


def drop_after(run: Path, step: int) -> None:
    """Make a finished run look as if it had been killed after a checkpoint."""
    for path in complete_checkpoints(run / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def test_a_run_killed_before_its_first_checkpoint_begins_its_log_anew(train, tmp_path):
    train(steps=4)
    drop_after(tmp_path / "run", 0)
    train(steps=4, resume=True)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["muon", "lion", "adafactor"])
def test_every_optimiser_goes_on_bit_for_bit_over_phases_and_a_resume(train, tmp_path, tiny_models, kind):
    """Accelerate loads a new optimiser's own state into it, which each kind must stand."""
    keys = {
        "model": tiny_models["vit"],
        "optim": {"kind": kind, "lr": 1e-3},
        "phases": [{"step": 0, "image_groups": 1}, {"step": 3}],
        "checkpoint": {"every": 2, "keep": 4},
    }
    whole = train(run=str(tmp_path / "whole"), **keys)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000006")
    resumed = train(run=str(tmp_path / "cut"), resume=True, **keys)
    assert same(weights(whole), weights(resumed))
    moments = [
        load_file(run.model_folder.parent / "training/optimizer.safetensors") for run in (whole, resumed)
    ]
    assert same(*moments)


def test_a_finished_run_resumed_stays_as_it_is(train, tmp_path, capsys):
    before = weights(train(steps=3))
    log = (tmp_path / "run/log.jsonl").read_text()
    assert same(before, weights(train(steps=3, resume=True)))
    assert (tmp_path / "run/log.jsonl").read_text() == log
    assert "resuming at step 3" in capsys.readouterr().err


@pytest.mark.parametrize("every", [1, 2])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(train, tmp_path, monkeypatch, every):
    """The loss turns NaN at step 3; nothing of it may be saved, however seldom the log is written."""
    exact, calls = module.distributed_info_nce, []

    def breaks(*features, **options):
        calls.append(None)
        return exact(*features, **options) * (math.nan if len(calls) >= 3 else 1.0)

    monkeypatch.setattr(module, "distributed_info_nce", breaks)
    with pytest.raises(
        ValueError, match=r"the loss is nan .* diverged. The last checkpoint in .* is from before"
    ):
        train(steps=40, log_every=20, checkpoint={"every": every})
    kept = complete_checkpoints(tmp_path / "run/checkpoints")
    assert kept[0].name == "step-00000002"
    good = load_encoder(kept[0] / "model")
    assert all(bool(torch.isfinite(value).all()) for value in good.model.state_dict().values())


def test_a_gradient_that_is_not_finite_stops_before_a_save(train, tmp_path, monkeypatch):
    """The loss of the last step is fine, its gradient is not: the weights are NaN already."""
    exact, calls = module.distributed_info_nce, []

    def breaks(images, texts, scale, **options):
        calls.append(None)
        kink = torch.sqrt((images - images.detach()).sum())  # sqrt has no slope at 0
        return exact(images, texts, scale, **options) + (kink if len(calls) == 2 else 0)

    monkeypatch.setattr(module, "distributed_info_nce", breaks)
    with pytest.raises(ValueError, match=r"gradient norm (nan|inf) at step 2"):
        train(steps=2, schedule={"warmup": 1})
    assert complete_checkpoints(tmp_path / "run/checkpoints") == []


def test_trackers_get_the_recipe_and_the_log(train, monkeypatch):
    from accelerate.tracking import GeneralTracker

    class Notebook(GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = False
        tracker = None

        def __init__(self):
            super().__init__()
            self.config, self.values, self.finished = {}, [], False

        def __str__(self):
            return self.name

        def start(self):
            pass

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **_):
            self.values.append((step, values))

        def finish(self):
            self.finished = True

    notebook = Notebook()
    monkeypatch.setattr("pretrain.loop.get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [notebook])
    train(trackers=["tensorboard"], steps=3)
    assert [step for step, _ in notebook.values] == [1, 2, 3]
    assert notebook.values[0][1]["loss"] > 0
    assert notebook.config["optim.lr"] == "0.001"  # TensorBoard takes flat settings only
    assert notebook.finished


# Locked parts


def frozen_and_moved(trainer: Trainer, before: dict[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    after = weights(trainer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    return set(after) - moved, moved


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_locked_towers_stay_bit_for_bit_with_their_batch_statistics(
    tiny_recipe, tiny_models, fresh_accelerate, kind
):
    recipe = PretrainRecipe.model_validate(
        tiny_recipe(
            model=tiny_models[kind], phases=[{"image_groups": 0, "text_groups": 0}], schedule={"warmup": 0}
        )
    )
    trainer = Trainer(recipe)
    before = weights(trainer)
    trainer.train()
    _, moved = frozen_and_moved(trainer, before)
    heads = {"vit": {"visual.proj"}, "resnet": {name for name in before if "attnpool" in name}}[kind]
    assert moved == {*heads, "text_projection", "logit_scale"}


def test_a_step_unlocks_the_last_groups(tiny_recipe, fresh_accelerate, tiny_models):
    """From step 3 the last ResNet stage and the last text block train as well, batch statistics too."""
    content = tiny_recipe(
        model=tiny_models["resnet"],
        schedule={"warmup": 0},
        phases=[
            {"image_groups": 0, "text_groups": 0},
            {"step": 3, "image_groups": 1, "text_groups": 1, "tower_lr": 0.5, "keep_statistics": False},
        ],
    )
    trainer = Trainer(PretrainRecipe.model_validate(content))
    before = weights(trainer)
    trainer.train()
    frozen, moved = frozen_and_moved(trainer, before)
    assert {"visual.layer4.0.conv1.weight", "visual.layer4.0.bn1.running_mean"} <= moved
    assert {"transformer.resblocks.1.mlp.c_fc.weight", "ln_final.weight"} <= moved
    assert {
        "visual.layer3.0.conv1.weight",
        "visual.layer3.0.bn1.running_mean",
        "visual.conv1.weight",
    } <= frozen
    assert {"transformer.resblocks.0.mlp.c_fc.weight", "token_embedding.weight"} <= frozen
    rates = {name: group["lr_scale"] for group in trainer.optimizer.param_groups for name in group["names"]}
    assert rates["model.visual.layer4.0.conv1.weight"] == rates["model.ln_final.weight"] == 0.5
    assert rates["model.visual.attnpool.c_proj.weight"] == rates["model.text_projection"] == 1.0
    assert rates["model.logit_scale"] == 1.0


def test_an_unlocked_tower_trains_with_the_statistics_it_has(tiny_recipe, fresh_accelerate, tiny_models):
    """By default its last groups' weights and gains move, the statistics they normalise with do not."""
    locks = [{"image_groups": 0}, {"step": 1, "image_groups": 1}]
    content = tiny_recipe(model=tiny_models["resnet"], schedule={"warmup": 0}, steps=3, phases=locks)
    trainer = Trainer(PretrainRecipe.model_validate(content))
    before = weights(trainer)
    trainer.train()
    frozen, moved = frozen_and_moved(trainer, before)
    assert {"visual.layer4.0.conv1.weight", "visual.layer4.0.bn1.weight"} <= moved
    assert {name for name in before if "running" in name or "num_batches" in name} <= frozen


def test_tower_lr_is_for_all_of_both_towers(tiny_recipe, fresh_accelerate):
    content = tiny_recipe(steps=1, schedule={"warmup": 0}, phases=[{"tower_lr": 0.1}])
    trainer = Trainer(PretrainRecipe.model_validate(content))
    trainer.train()
    full = {
        name
        for group in trainer.optimizer.param_groups
        if group["lr_scale"] == 1.0
        for name in group["names"]
    }
    assert full == {"model.visual.proj", "model.text_projection", "model.logit_scale"}


def test_layer_decay_and_tower_lr_multiply(train):
    trainer = train(steps=1, schedule={"warmup": 0}, optim={"layer_decay": 0.5}, phases=[{"tower_lr": 0.1}])
    rates = {name: group["lr_scale"] for group in trainer.optimizer.param_groups for name in group["names"]}
    assert rates["model.visual.proj"] == rates["model.logit_scale"] == 1.0
    assert rates["model.visual.ln_post.weight"] == pytest.approx(0.05)
    assert rates["model.visual.conv1.weight"] == pytest.approx(0.0125)


def test_more_groups_than_a_tower_has_are_refused(train):
    with pytest.raises(ValueError, match="image_groups 9: expected 0 to 3 or 'all'"):
        train(phases=[Phase(image_groups=9).model_dump()])


# What a run folder refuses


def test_an_overwrite_that_cannot_work_leaves_the_old_run(train, tmp_path):
    train(steps=3)
    with pytest.raises(ValueError, match="batch_size 64 is larger than the whole set"):
        train(steps=3, batch_size=64, overwrite=True)
    assert complete_checkpoints(tmp_path / "run/checkpoints")


def test_resume_refuses_another_run_but_not_another_speed(train, tiny_shards):
    train(steps=3)
    for named, change in {
        "batch_size": 4,
        "seed": 7,
        "optim": {"lr": 2e-3},
        "max_logit_scale": 50.0,
        "data": {"train": str(tiny_shards), "hflip": 0.0},
    }.items():
        with pytest.raises(ValueError, match=f"cannot resume with another {named}: .*Change it back"):
            train(**{"steps": 3, "resume": True, named: change})
    faster = {"train": str(tiny_shards), "hflip": 0.5, "color_jitter": 0.2, "workers": 1, "max_faults": 0.5}
    assert train(steps=3, resume=True, data=faster, log_every=2).step == 3
