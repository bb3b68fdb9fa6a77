"""Kills trainings at random moments; test_random_kills.py starts it with a folder that holds job.json.

{recipe, kills, seed}. One run is left alone. Then runs of the same recipe are started, killed after a random time,
and started again with `resume`, until so many kills have struck; a run that comes to its end makes room for the next.
Writes done.json: the runs that were killed, and for each kill whether it struck a save.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pretrain.trainer
from benchmarks.communication import fork
from pretrain.recipe import PretrainRecipe


def start(recipe: dict, run: Path) -> int:
    """Fork a training that resumes what there is in a run folder; returns its process id."""
    checkpoint = {**recipe["checkpoint"], "copy_to": f"{run}-copies"}
    recipe = {**recipe, "run": str(run), "checkpoint": checkpoint}

    def train() -> None:
        os.setpgid(0, 0)  # so that its loader processes go with it
        pretrain.trainer.Trainer(PretrainRecipe.model_validate(recipe), resume=True).train()

    return fork(train, wait=False)


def ended(child: int, seconds: float) -> bool:
    """Whether a training comes to its end within a time; it must not fail."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"a training failed: {os.waitstatus_to_exitcode(status)}")
            return True
        time.sleep(0.002)
    return False


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    chance = random.Random(job["seed"])
    began = time.monotonic()
    if not ended(start(job["recipe"], folder / "whole"), 300):
        raise SystemExit("the whole run did not end")
    whole = time.monotonic() - began
    runs, kills = [], []
    while len(kills) < job["kills"]:
        run = folder / f"killed-{len(runs)}"
        runs.append(run.name)
        while True:
            child = start(job["recipe"], run)
            # After the last kill each run is let go to its end.
            patience = chance.uniform(0, whole) if len(kills) < job["kills"] else 300
            if ended(child, patience):
                break
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills.append(any((run / "checkpoints").glob(".tmp-*")))
    (folder / "done.json").write_text(json.dumps({"runs": runs, "in_saves": sum(kills), "kills": len(kills)}))


if __name__ == "__main__":
    main()
