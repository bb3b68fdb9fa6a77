"""A run killed at random moments, again and again, ends bit for bit as one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

WORKER = Path(__file__).with_name("random_kills_worker.py")


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, tiny_shards, tiny_models, kills):
    """A save at every step, so that many kills strike one; a step that diverges is left out on the way."""
    recipe = {
        "model": tiny_models["vit"],
        "data": {"train": str(tiny_shards), "hflip": 0.5, "color_jitter": 0.3, "workers": 1},
        "batch_size": 8,
        "steps": 12,
        "schedule": {"warmup": 2},
        "optim": {"lr": 1e-3},
        "log_every": 1,
        "checkpoint": {"every": 1, "keep": 2, "copy_keep": 1},
        "on_divergence": {"action": "skip", "spike": 1.001, "window": 3, "limit": 12},
    }
    (tmp_path / "job.json").write_text(json.dumps({"recipe": recipe, "kills": kills, "seed": kills}))
    said = tmp_path / "said.txt"
    with said.open("w") as file:  # not a pipe: a killed run's loader would hold it open
        outcome = subprocess.run(
            [sys.executable, str(WORKER), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            check=False,
            timeout=550,
        )
    assert outcome.returncode == 0, said.read_text()[-3000:]
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["kills"] >= kills
    print(f"{done['kills']} kills of {len(done['runs'])} runs, {done['in_saves']} in a save")
    whole = content(tmp_path / "whole")
    assert (tmp_path / "whole/divergence.jsonl").is_file()  # or leaving out would not have been tried
    for name in done["runs"]:
        assert content(tmp_path / name) == whole
        assert list((tmp_path / name / "checkpoints").glob(".tmp-*")) == []


def content(run: Path) -> tuple:
    """Weights, moments, log and incidents of a run, without what a clock or the memory says."""
    last = run / "checkpoints" / "step-00000012"
    varying = ("samples_per_s", "tflops_per_s", "data_wait_s", "data_wait_share", "memory_mb")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return (
        *(
            {name: value.tobytes() for name, value in load_file(last / file).items()}
            for file in ("model/open_clip_model.safetensors", "training/optimizer.safetensors")
        ),
        [{key: value for key, value in record.items() if key not in varying} for record in log],
        (run / "divergence.jsonl").read_text(),
    )
