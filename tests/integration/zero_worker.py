"""One rank of test_zero.py: trains the recipes of job.json one after the other; torchrun starts two of it.

Argument: a folder with job.json, a list of jobs: the recipe's content, variables of the environment, whether to resume,
a step whose loss is to be NaN, and whether the loss is to leave out the texts. Rank 0 leaves errors.json.
"""

from __future__ import annotations

import atexit
import gc
import json
import math
import os
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState

from pretrain.recipe import PretrainRecipe
from pretrain.trainer import Trainer
from pretrain.zero import Zero


def make_trainer(job: dict) -> Trainer:
    """The trainer of a job, which the test makes in one process as well."""
    trainer = Trainer(PretrainRecipe.model_validate(job["recipe"]), resume=job.get("resume", False))
    exact = trainer.objective

    def objective(features, *inputs):
        if job.get("no texts"):
            return features[0].square().sum() * features[2]
        bad = job.get("bad") == trainer.step + 1
        return exact(features, *inputs) * (math.nan if bad else 1.0)

    trainer.objective = objective
    return trainer


def main() -> None:
    gc.freeze()  # Accelerate collects garbage after each training
    atexit.register(gc.unfreeze)
    folder = Path(sys.argv[1])
    errors = {}
    for name, job in json.loads((folder / "job.json").read_text()).items():
        for variable in [key for key in os.environ if "DEEPSPEED" in key]:
            del os.environ[variable]
        os.environ |= job["environment"]
        AcceleratorState._reset_state()  # another job may have another precision
        try:
            trainer = make_trainer(job)
            trainer.train()
            assert isinstance(trainer.wrap, Zero) == bool(job["environment"])
        except ValueError as error:
            errors[name] = str(error)
    if int(os.environ["RANK"]) == 0:
        (folder / "errors.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
