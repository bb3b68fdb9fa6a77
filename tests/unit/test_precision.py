"""fp16's loss scale (torch's scaler runs on CPUs too) and what a machine gives."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
import torch

import pretrain.objectives as objectives
import pretrain.trainer
from pretrain.checkpoint import complete_checkpoints
from pretrain.loop import make_accelerator
from pretrain.precision import accelerate_precision
from pretrain.recipe import PretrainRecipe
from pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def train(tiny_recipe, fresh_accelerate, monkeypatch, tmp_path):
    """`train(name, scale=None, resume=False, half=False, **recipe_keys) -> Trainer`; a scale brings a scaler along."""

    def run(
        name: str, *, scale: float | None = None, resume: bool = False, half: bool = False, **keys
    ) -> Trainer:
        fresh_accelerate()

        def make(recipe, **options):
            accelerator: Any = make_accelerator(recipe, **options)
            if scale:
                accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
            if half:
                accelerator.autocast = lambda: torch.autocast("cpu", torch.float16)
            return accelerator

        monkeypatch.setattr(pretrain.trainer, "make_accelerator", make)
        content = tiny_recipe(**{"run": str(tmp_path / name), "steps": 4, **keys})
        trainer = Trainer(PretrainRecipe.model_validate(content), resume=resume)
        trainer.train()
        return trainer

    return run


@pytest.fixture
def overflow_at(monkeypatch):
    """`overflow_at(*calls, loss=1.0)`: the loss's gradient is not finite at these calls; its value is times `loss`."""
    exact = objectives.distributed_info_nce

    def break_at(*calls: int, loss: float = 1.0) -> None:
        count = 0

        def breaks(images, texts, scale, **options):
            nonlocal count
            count += 1
            value = exact(images, texts, scale, **options)
            kink = torch.sqrt((images - images.detach()).sum())  # 0, and no slope there
            return value * loss + kink if count in calls else value

        monkeypatch.setattr(objectives, "distributed_info_nce", breaks)

    return break_at


def log_of(trainer: Trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.folder.path / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_scaled_loss_trains_the_same_weights(train, micro_batch, clip_norm, same, weights_of):
    """Scales are powers of two: without the unscaling, or with it twice, clipping and norms would be others."""
    keys = {"micro_batch": micro_batch, "optim": {"lr": 1e-3, "clip_norm": clip_norm}}
    plain = train("plain", **keys)
    scaled = train("scaled", scale=2.0**12, **keys)
    assert same(weights_of(plain), weights_of(scaled))
    for one, other in zip(log_of(plain), log_of(scaled), strict=True):
        assert one["loss"] == other["loss"]
        for name in ("grad_norm", "grad_norm_image_tower", "grad_norm_text_tower"):
            assert one[name] == other[name]
    # Raised once in two steps without an overflow.
    assert [record["loss_scale"] for record in log_of(scaled)] == [2.0**12, 2.0**13, 2.0**13, 2.0**14]
    assert log_of(scaled)[-1]["overflows"] == 0
    assert "loss_scale" not in log_of(plain)[0]


def test_an_overflow_is_skipped_counted_and_no_divergence(train, overflow_at, weights_of):
    overflow_at(2)
    trainer = train("run", scale=2.0**12)
    log = log_of(trainer)
    assert [record["overflows"] for record in log] == [0, 1, 1, 1]
    assert [record["loss_scale"] for record in log] == [2.0**12, 2.0**11, 2.0**11, 2.0**12]
    assert [record["samples_seen"] for record in log] == [8, 8, 16, 24]
    assert log[1]["loss"] is None
    assert not (trainer.folder.path / "divergence.jsonl").exists()
    assert all(bool(torch.isfinite(value).all()) for value in weights_of(trainer).values())


def test_without_a_scaler_or_with_a_scale_of_one_it_is_a_divergence(train, overflow_at):
    for name, scale in (("none", None), ("one", 1.0)):
        overflow_at(2)
        with pytest.raises(ValueError, match=r"gradient norm (nan|inf) at step 2: training has diverged"):
            train(name, scale=scale)


def test_a_loss_that_is_not_finite_is_left_out_as_the_recipe_says(train, overflow_at):
    overflow_at(2, loss=math.nan)
    trainer = train("run", scale=2.0**12, on_divergence={"action": "skip"})
    assert trainer.watch.left_out == {2}
    assert log_of(trainer)[-1]["overflows"] == 0
    assert log_of(trainer)[-1]["samples_seen"] == 24


def test_a_rolled_back_run_takes_the_scale_of_its_checkpoint(train, overflow_at):
    overflow_at(4, loss=math.nan)
    trainer = train("run", scale=2.0**12, steps=5, on_divergence={"action": "rollback"})
    assert trainer.watch.left_out == {4}
    (last,) = [record for record in log_of(trainer) if record["step"] == 5]
    assert (
        last["loss_scale"] == 2.0**14
    )  # two good steps to the checkpoint of step 2, then the third and the fifth


def test_a_resumed_run_has_the_scale_and_the_count(train, overflow_at, capsys, same, weights_of):
    overflow_at(2)
    whole = train("run", scale=2.0**12, steps=6)
    expected, log = weights_of(whole), log_of(whole)[-1]
    for path in complete_checkpoints(whole.folder.path / "checkpoints")[:1]:
        shutil.rmtree(path)
    overflow_at()
    resumed = train("run", scale=2.0**5, steps=6, resume=True)
    assert "resuming at step 4" in capsys.readouterr().err
    assert same(expected, weights_of(resumed))
    for name in ("loss_scale", "overflows", "loss"):
        assert log_of(resumed)[-1][name] == log[name]
    # And without a scaler, as when the machine is another one.
    shutil.rmtree(whole.folder.path / "checkpoints/step-00000006")
    assert train("run", steps=6, resume=True).step == 6


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("vit", {}),
        ("coca", {"terms": {"alignment": {}, "self_supervision": {"hidden": 24}, "captioning": {}}}),
    ],
)
def test_fp16_itself_trains_as_fp32_does(train, tiny_models, model, keys):
    """Autocast to fp16 runs on CPUs; only Accelerate keeps it to GPUs."""
    keys = {**keys, "model": tiny_models[model]}
    wide, half = log_of(train("wide", **keys)), log_of(train("half", scale=2.0**12, half=True, **keys))
    assert [record["loss"] for record in half] == pytest.approx([record["loss"] for record in wide], rel=2e-2)
    assert half[0]["loss"] != wide[0]["loss"]
    assert half[0]["grad_norm"] == pytest.approx(wide[0]["grad_norm"], rel=5e-2)


# What a machine gives


def pretend_gpu(monkeypatch, capability: tuple[int, int], bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_auto_takes_what_the_machine_has(monkeypatch):
    assert accelerate_precision("auto") == accelerate_precision("fp32") == "no"
    assert accelerate_precision("bf16") == "bf16"
    pretend_gpu(monkeypatch, (7, 5), bf16=False)
    assert (accelerate_precision("auto"), accelerate_precision("fp16")) == ("no", "fp16")
    pretend_gpu(monkeypatch, (9, 0))
    assert accelerate_precision("auto") == "bf16"


def test_fp16_without_a_gpu_is_refused(train):
    with pytest.raises(ValueError, match=r"precision: fp16 needs a GPU, and there is none here.*Take bf16"):
        train("run", precision="fp16")


def test_fp8_says_what_it_needs(train, monkeypatch):
    with pytest.raises(
        ValueError, match=r"fp8 needs a GPU of compute capability 8.9 or more .*, here is no GPU"
    ):
        train("run", precision="fp8")
    pretend_gpu(monkeypatch, (8, 0))
    with pytest.raises(ValueError, match=r"here is one of capability 8\.0\. Take bf16"):
        accelerate_precision("fp8")
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr("pretrain.precision.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="not installed: pip install torchao"):
        accelerate_precision("fp8")
    monkeypatch.setattr("pretrain.precision.find_spec", lambda name: name)
    assert accelerate_precision("fp8") == "fp8"
