"""A run that was killed and resumed ends as one that was not: the same weights, bit for bit, and the same log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

WORKER = Path(__file__).with_name("training_worker.py")
KILLED = -9
LEFT = 75

# The place of the kill and at which of its calls; saves are at steps 2, 4 and 6.
KILLS = [
    ("backward", 4),
    ("half of the optimizer's step", 5),
    ("log", 6),  # one line at step 0 would make it step 5; there is no evaluator, so step 6
    ("model file", 2),
    ("optimizer file", 2),
    ("before the rename", 2),
    ("after the rename", 2),
    ("while old ones are dropped", 1),
    ("backward", 2),  # before the first checkpoint
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_shards, tiny_models, tiny_bert) -> dict[str, Path]:
    """All trainings of this module, done by one worker; the folder of each by name."""
    folder = tmp_path_factory.mktemp("resume")
    augmented = {"train": str(tiny_shards), "hflip": 0.5, "color_jitter": 0.3, "workers": 0}
    bert = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    base = {
        "model": {**tiny_models["vit"], "text_tower": bert},  # dropout in the text tower
        "data": augmented,
        "batch_size": 8,
        "steps": 6,
        "schedule": {"warmup": 2},
        "log_every": 1,
        "checkpoint": {"every": 2, "keep": 1},
        "preempted_exit_code": LEFT,
    }
    unlocking = {
        "model": tiny_models["resnet"],
        "checkpoint": {"every": 1, "keep": 1},
        "phases": [
            {"image_groups": 0, "text_groups": 0},
            {"step": 3, "image_groups": 1, "text_groups": "all", "tower_lr": 0.5},
        ],
    }
    chains, expected = {}, {}

    def add(name: str, keys: dict, kill=None, world: int = 1) -> None:
        recipe = {**base, **keys, "run": str(folder / name)}
        resumed = {"recipe": recipe, "resume": bool(kill), "world": world}
        killed = {"recipe": recipe, "kill": kill, "world": world}
        ended = LEFT if kill and kill[0] == "told to leave" else KILLED
        chains[name], expected[name] = ([killed, resumed], [ended, 0]) if kill else ([resumed], [0])

    workers = {"data": {**augmented, "workers": 1}}
    add("whole", {})
    for number, kill in enumerate(KILLS):
        add(f"killed-{number}", workers if number in (0, 3) else {}, kill)
    add("left", {**workers, "checkpoint": {"every": 4, "keep": 1}}, ("told to leave", 3))
    add("phases", unlocking)
    for step in (3, 4, 5):  # in the last step before the phase, in its first, and in its second
        add(f"phases-{step}", unlocking, ("backward", step))
    growing = {
        "ema": {"decay": 0.5},
        "checkpoint": {"every": 1, "keep": 1},
        "phases": [{"image_size": 16, "patch_dropout": 0.5}, {"step": 3, "image_size": 32}],
        "model": {
            **tiny_models["vit"],
            "image_tower": {**tiny_models["vit"]["image_tower"], "patch_size": 8},
        },
    }
    add("growing", growing)
    for step in (3, 4, 5):
        add(f"growing-{step}", growing, ("backward", step))
    average = {"model": tiny_models["resnet"], "ema": {"decay": 0.5}}
    add("average", average)
    for number, kill in enumerate([("backward", 4), ("trained weights' file", 2)]):
        add(f"average-{number}", average, kill)
    two = {"model": tiny_models["resnet"], "ema": {"decay": 0.5}}
    add("two", two, world=2)
    add("two-killed", two, ("backward", 4), world=2)
    add("two-left", two, ("told to leave", 3), world=2)

    one = {"model": tiny_models["vit"]}  # without dropout, which each rank draws for itself
    add("one", one)
    # Written before the kill for certain: from scratch one process would reach the same weights.
    foreground = {"checkpoint": {"every": 2, "keep": 1, "background": False}}
    add("elastic", {**one, **foreground}, ("backward", 4), world=2)
    chains["elastic"][1]["world"] = 1
    (folder / "chains.json").write_text(json.dumps(chains))
    said = folder / "said.txt"
    with said.open("w") as file:  # not a pipe: a killed run's loader would hold it open
        subprocess.run(
            [sys.executable, str(WORKER), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=file,
            stderr=file,
            check=False,
            timeout=500,
        )
    codes = [json.loads(path.read_text()) for path in sorted(folder.glob("codes-*.json"))]
    assert {name: code for half in codes for name, code in half.items()} == expected, said.read_text()[-3000:]
    return {path.name: path for path in folder.iterdir() if path.is_dir()} | {"said": said}


def content(run: Path) -> tuple[dict, dict, list[dict]]:
    """Weights, training state and log of a run, without what a clock or the memory says."""
    last = run / "checkpoints" / "step-00000006"
    varying = ("samples_per_s", "tflops_per_s", "data_wait_s", "data_wait_share", "memory_mb")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in record.items() if key not in varying} for record in log]
    state = load_file(last / "training" / "optimizer.safetensors")
    if (last / "training" / "weights.safetensors").is_file():
        state |= load_file(last / "training" / "weights.safetensors")
    return load_file(last / "model" / "open_clip_model.safetensors"), state, log


def assert_same_run(one: Path, other: Path) -> None:
    (weights, moments, log), (other_weights, other_moments, other_log) = content(one), content(other)
    for ours, theirs in ((weights, other_weights), (moments, other_moments)):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert log == other_log  # loss, learning rate, gradient norm of each step, equal to the last digit
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["step-00000006"]  # no leftovers


@pytest.mark.parametrize("number", range(len(KILLS)), ids=[f"{place}, call {n}" for place, n in KILLS])
def test_killed_and_resumed_is_as_never_killed(runs, number):
    assert_same_run(runs["whole"], runs[f"killed-{number}"])


@pytest.mark.parametrize("step", [3, 4, 5])
def test_around_the_step_that_unlocks_a_tower(runs, step):
    assert_same_run(runs["phases"], runs[f"phases-{step}"])


@pytest.mark.parametrize("step", [3, 4, 5])
def test_around_the_step_from_which_pictures_are_larger(runs, step):
    assert_same_run(runs["growing"], runs[f"growing-{step}"])


@pytest.mark.parametrize("number", [0, 1])
def test_with_an_average_of_the_weights(runs, number):
    assert_same_run(runs["average"], runs[f"average-{number}"])
    model, state, _ = content(runs["average"])
    apart = {name for name, value in model.items() if value.tobytes() != state[name].tobytes()}
    assert {"visual.conv1.weight", "visual.bn1.running_mean", "logit_scale"} <= apart


@pytest.mark.dist
def test_with_two_ranks(runs):
    assert_same_run(runs["two"], runs["two-killed"])


def test_told_to_leave_with_loader_processes(runs):
    """SIGTERM in step 3, long before the checkpoint at step 4, to the loader processes as well."""
    assert_same_run(runs["whole"], runs["left"])


@pytest.mark.dist
def test_two_ranks_of_which_one_is_told_to_leave(runs):
    assert_same_run(runs["two"], runs["two-left"])


@pytest.mark.dist
def test_a_checkpoint_of_two_ranks_goes_on_with_one(runs):
    """What one process reaches alone, up to the rounding of sums over ranks; and it is said what is exact."""
    (weights, _, log), (other_weights, _, other_log) = content(runs["one"]), content(runs["elastic"])
    assert all(weights[name] == pytest.approx(other_weights[name], abs=1e-5) for name in weights)
    losses = [[record["loss"] for record in lines] for lines in (log, other_log)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [record["samples_seen"] for record in log] == [record["samples_seen"] for record in other_log]
    said = runs["said"].read_text()
    assert "the checkpoint is of 2 processes, here are 1. Exact: weights, optimiser, the samples" in said


def test_the_comparison_can_fail(runs):
    """Two runs of different models differ in all that is compared."""
    with pytest.raises(AssertionError):
        assert_same_run(runs["phases"], runs["two"])
