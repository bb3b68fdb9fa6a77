"""What the adversarial alignment term does to the modality gap: the same small training with and without it.

Scenes, made on the spot; a small ResNet and text transformer; weight 0 (the critic only measures) against others, all
with the same seeds, batches and steps. Gap, critic's accuracy and loss are of the last log line, recalls of
held-out scenes. This is no timing: it says what the term trades for what, at this scale.

    python benchmarks/modality_gap.py [--weights 0 0.1 1] [--seeds 2] [--steps 150] [--run FOLDER]   (about 4 minutes)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
HERE = Path(__file__).resolve().parent
# benchmarks/retrieval.py would hide the package that the evaluator is in
sys.path[:] = [str(HERE.parent), *(each for each in sys.path if Path(each or ".").resolve() != HERE)]

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from data.prepare import prepare  # noqa: E402
from pretrain.recipe import PretrainRecipe  # noqa: E402
from pretrain.trainer import Trainer  # noqa: E402

NUMBERS = ("modality_gap", "critic_accuracy", "critic_loss")
RECALLS = ("image_to_text/recall@1", "text_to_image/recall@1")


def recipe_of(folder: Path, name: str, weight: float, seed: int, steps: int) -> PretrainRecipe:
    return PretrainRecipe.model_validate(
        {
            "run": str(folder / name),
            "model": {
                "kind": "towers",
                "embed_dim": 128,
                "image_tower": {"kind": "resnet", "image_size": 64, "width": 16},
                "text_tower": {
                    "kind": "transformer",
                    "context_length": 32,
                    "width": 128,
                    "heads": 2,
                    "layers": 2,
                },
            },
            "data": {"train": str(folder / "train"), "workers": 0, "captions_per_image": 2},
            "batch_size": 64,
            "loss": {"kind": "multi_positive"},
            "terms": {"alignment": {"weight": weight}},
            "steps": steps,
            "optim": {"kind": "muon", "lr": 2e-3, "weight_decay": 0.1, "clip_norm": 1.0},
            "schedule": {"kind": "cosine", "warmup": min(20, steps // 5)},
            "seed": seed,
            "log_every": 25,
            "checkpoint": {"every": 10**6},
            "evaluate": [
                {
                    "use": "retrieval.evaluator:RetrievalEvaluator",
                    "every": 10**6,
                    "options": {"shards": str(folder / "test"), "limit": 200},
                }
            ],
        }
    )


def train(recipe: PretrainRecipe) -> dict[str, float]:
    """The last log line's numbers and the recalls of a run."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    metrics = Trainer(recipe, overwrite=True).train()
    lines = [json.loads(line) for line in (Path(recipe.run) / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if "modality_gap" in line][-1]
    recalls = {name: metrics["evaluation"][name] for name in RECALLS}
    return {name: last[name] for name in NUMBERS} | recalls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 1.0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--run", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.run or Path(temporary)
        for split, limit in (("train", 2000), ("test", 200)):
            prepare("scenes", out=folder / split, split=split, limit=limit, quiet=True, overwrite=True)
        found: dict[str, Any] = {}
        for weight in options.weights:
            runs = [
                train(recipe_of(folder, f"weight-{weight:g}-{seed}", weight, seed, options.steps))
                for seed in range(options.seeds)
            ]
            found[f"{weight:g}"] = {
                name: {
                    "mean": statistics.fmean(run[name] for run in runs),
                    "runs": [run[name] for run in runs],
                }
                for name in runs[0]
            }
            told = ", ".join(f"{name} {value['mean']:.3f}" for name, value in found[f"{weight:g}"].items())
            print(f"weight {weight:g}: {told}", flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(json.dumps({"commit": commit, "steps": options.steps, "seeds": options.seeds, "weights": found}))


if __name__ == "__main__":
    main()
