"""DeepSpeed's ZeRO on two processes: clipping, norms, steps left out, resuming, and what is trained in bf16.

`test_two_processes.py` has losses, terms, phases and uneven ranks under it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.adapters import plain_state

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        not importlib.util.find_spec("deepspeed"), reason="needs pip install 'pairstream[deepspeed]'"
    ),
    pytest.mark.usefixtures("fresh_accelerate"),
]
WORKER = Path(__file__).with_name("zero_worker.py")
spec = importlib.util.spec_from_file_location("zero_worker", WORKER)
assert spec is not None
assert spec.loader is not None
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
STAGES = {
    stage: {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    for stage in (1, 2)
}
ALIKE = ("clip 1", "parts 1", "parts 2", "skip 2", "rollback 1", "ema", "lora", "file")
STEPS = 6


@pytest.fixture(scope="module")
def jobs(tiny_shards, tiny_models):
    """Jobs by name for a folder of runs; those of `ALIKE` are also trained by one process."""

    def make(folder: Path) -> dict[str, dict]:
        base = {
            "data": {"train": str(tiny_shards), "workers": 0, "hflip": 0.5, "color_jitter": 0.2},
            "model": tiny_models["vit"],
            "batch_size": 12,  # the fourth batch of an epoch has 4
            "steps": STEPS,
            "schedule": {"warmup": 1},
            "optim": {"lr": 1e-3, "clip_norm": 0.5},
            "max_logit_scale": 14.0,  # it begins at 1 / 0.07: the first steps are held back
            "log_every": 1,
            "checkpoint": {"every": STEPS // 2},
        }
        config = folder / "deepspeed.json"
        buckets = {"overlap_comm": True, "contiguous_gradients": False, "reduce_bucket_size": 1000}
        zero = {"stage": 2, "allgather_bucket_size": 1000, **buckets}
        auto = dict.fromkeys(
            ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto"
        )
        config.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}, **auto}))
        in_file = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
        parts, bf16 = {"micro_batch": 2}, {"precision": "bf16"}
        found = {
            "clip 1": ({}, STAGES[1], {}),
            "parts 1": (parts, STAGES[1], {}),
            "parts 2": (parts, STAGES[2], {}),
            "skip 2": ({"on_divergence": {"action": "skip"}}, STAGES[2], {"bad": 3}),
            "rollback 1": ({"on_divergence": {"action": "rollback"}, **parts}, STAGES[1], {"bad": 5}),
            "ema": ({"ema": {"decay": 0.9}}, STAGES[1], {}),
            "lora": ({"lora": {"rank": 2}}, STAGES[2], {}),
            "file": ({}, in_file, {}),
            "bf16": (bf16, {}, {}),
            "bf16 zero": (bf16, STAGES[2], {}),
            "no texts": ({}, STAGES[2], {"no texts": True}),
            "resumed 1": (parts, STAGES[1], {"resume": True}),
            "resumed 2": (parts, STAGES[2], {"resume": True}),
            "onward": (parts, STAGES[2], {"resume": True}),
        }
        return {
            name: {
                "recipe": {**base, "run": str(folder / name), **keys},
                "environment": environment,
                **options,
            }
            for name, (keys, environment, options) in found.items()
        }

    return make


def copy_half(run: Path, to: Path) -> None:
    """A run as if it had been stopped in its middle."""
    shutil.copytree(run, to)
    shutil.rmtree(to / f"checkpoints/step-{STEPS:08d}")


@pytest.fixture(scope="module")
def one(tmp_path_factory, jobs):
    """`one(name) -> folder, weights at the start, all at the end`: a job in this process, without DeepSpeed."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def train(name: str) -> tuple[Path, dict, dict]:
        if name not in made:
            trainer = worker.make_trainer(jobs(folder)[name])
            start = {key: value.clone() for key, value in plain_state(trainer.model).items()}
            trainer.train()
            made[name] = folder / name, start, ended(folder / name)
        return made[name]

    return train


@pytest.fixture(scope="module")
def two(tmp_path_factory, jobs, one, torchrun) -> Path:
    """What two processes left: one start for what needs no earlier run, and one to resume."""
    folder = tmp_path_factory.mktemp("two_zero")
    later = ("resumed 1", "resumed 2", "onward")
    for resumes in (False, True):
        now = {name: job for name, job in jobs(folder).items() if (name in later) == resumes}
        (folder / "job.json").write_text(json.dumps(now))
        if resumes:
            for stage in STAGES:
                copy_half(folder / f"parts {stage}", folder / f"resumed {stage}")
            copy_half(one("parts 1")[0], folder / "onward")
        torchrun(WORKER, folder)
        (folder / "errors.json").rename(folder / f"errors-{resumes}.json")
    assert (folder / "errors-True.json").read_text() == "{}"
    return folder


def ended(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a run's last checkpoint."""
    last = run / f"checkpoints/step-{STEPS:08d}"
    names = ("model/open_clip_model.safetensors", "training/optimizer.safetensors")
    return {key: value for name in names for key, value in load_file(last / name).items()}


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def distance(came: dict, expected: dict, start: dict) -> float:
    """How far apart two trainings ended, as a share of the way."""
    moved = torch.cat([(expected[key] - start[key]).flatten().double() for key in start]).norm()
    apart = torch.cat([(expected[key] - came[key]).flatten().double() for key in start]).norm()
    assert float(moved) > 0.01
    return float(apart / moved)


@pytest.mark.parametrize("name", ALIKE)
def test_weights_moments_and_log_are_those_of_one_process(two, one, name):
    """Clipping in each step, GradCache, a step left out, a way back, an average, adapters, small buckets."""
    assert name not in json.loads((two / "errors-False.json").read_text())
    folder, start, weights = one(name)
    came, expected = ended(two / name), ended(folder)
    assert distance(came, weights, start) < 1e-4
    assert float(came["logit_scale"]) == pytest.approx(float(weights["logit_scale"]), abs=1e-5)
    assert came.keys() == expected.keys()
    assert {key: value.shape for key, value in came.items()} == {
        key: value.shape for key, value in expected.items()
    }
    moments = [key for key in expected if "|exp_avg" in key]
    for kind in ("exp_avg", "exp_avg_sq"):
        both = [
            torch.cat([found[key].flatten() for key in moments if key.endswith(kind)])
            for found in (came, expected)
        ]
        assert float((both[0] - both[1]).norm() / both[1].norm()) < 1e-4
    assert all(torch.equal(came[key], expected[key]) for key in expected if key.endswith("|step"))
    logs = log_of(two / name), log_of(folder)
    assert len(logs[0]) == len(logs[1]) == STEPS
    for ours, theirs in zip(*logs, strict=True):
        assert ours["samples_seen"] == theirs["samples_seen"]
        assert (ours["loss"] is None) == (theirs["loss"] is None)
        if theirs["loss"] is None:
            continue
        norms = [key for key in theirs if key.startswith("grad_norm")]
        assert len(norms) == 3
        for key in ("loss", *norms):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)
        assert theirs["grad_norm"] > 0.5  # each step was clipped
    if name.startswith(("skip", "rollback")):
        lines = [json.loads((run / "divergence.jsonl").read_text()) for run in (two / name, folder)]
        assert lines[0]["step"] == lines[1]["step"] == (3 if name == "skip 2" else 5)


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_is_exact(two, stage):
    came, expected = ended(two / f"resumed {stage}"), ended(two / f"parts {stage}")
    assert came.keys() == expected.keys()
    assert all(torch.equal(came[key], value) for key, value in expected.items())
    assert len(log_of(two / f"resumed {stage}")) == STEPS


def test_one_process_goes_on_without_deepspeed_and_two_with_it(two, one, jobs, tmp_path):
    """From step 3 of two processes in one, and the other way round: the weights of one process throughout."""
    _, start, weights = one("parts 1")
    assert distance(ended(two / "onward"), weights, start) < 1e-4
    copy_half(two / "parts 2", tmp_path / "parts 2")
    trainer = worker.make_trainer({**jobs(tmp_path)["parts 2"], "resume": True})
    assert trainer.step == STEPS // 2
    trainer.train()
    assert distance(trainer.model.state_dict(), weights, start) < 1e-4


def test_bf16_autocast_is_that_of_replicas(two):
    """Two processes each; the same rounding in the same places, which float32 would be far from."""
    replicas, shares, exact = (log_of(two / name) for name in ("bf16", "bf16 zero", "clip 1"))
    for ours, theirs in zip(shares, replicas, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
    assert shares[0]["loss"] == replicas[0]["loss"] != exact[0]["loss"]


def test_parameters_without_a_gradient_are_refused(two):
    errors = json.loads((two / "errors-False.json").read_text())
    assert "to be trained, but the loss does not depend on them" in errors.pop("no texts")
    assert errors == {}
