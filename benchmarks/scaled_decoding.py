"""What scaled DCT decoding does to a small training run: the same training with and without it, paired by seed.

Flickr8k's photographs at the size of their shards, a small ViT of 64 px, the default crops; both modes of a seed have
the same weights, batches, crops and captions, so that only the pixels differ. The loss is the mean of the last quarter
of the log, the recalls those of the first 500 dev photographs, decoded in full in both modes. Intervals are Student's
t over the pairs, 95 %. This is no timing.

    python benchmarks/scaled_decoding.py [--seeds 4] [--steps 120] [--shards runs/flickr8k/shards]
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

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
# benchmarks/retrieval.py would hide the package that the evaluator is in
sys.path[:] = [str(HERE.parent), *(each for each in sys.path if Path(each or ".").resolve() != HERE)]

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from benchmarks.pretraining_study import interval as student  # noqa: E402
from benchmarks.timing import machine  # noqa: E402
from pretrain.recipe import PretrainRecipe  # noqa: E402
from pretrain.trainer import Trainer  # noqa: E402

RECALLS = ("image_to_text/recall@10", "text_to_image/recall@10")


def recipe_of(run: Path, shards: Path, scaled: bool, seed: int, steps: int) -> PretrainRecipe:
    size = {"width": 128, "layers": 3}
    return PretrainRecipe.model_validate(
        {
            "run": str(run),
            "model": {
                "kind": "towers",
                "embed_dim": 128,
                "image_tower": {"kind": "vit", "image_size": 64, "patch_size": 8, "head_width": 64, **size},
                "text_tower": {"kind": "transformer", "context_length": 20, "heads": 2, **size},
            },
            "data": {"train": str(shards / "train"), "workers": 0, "scaled_decode": scaled},
            "batch_size": 64,
            "steps": steps,
            "optim": {"kind": "adamw", "lr": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0},
            "schedule": {"kind": "cosine", "warmup": min(20, steps // 5)},
            "seed": seed,
            "log_every": 5,
            "checkpoint": {"every": 10**6},
            "evaluate": [
                {
                    "use": "retrieval.evaluator:RetrievalEvaluator",
                    "every": 10**6,
                    "options": {"shards": str(shards / "dev"), "limit": 500},
                }
            ],
        }
    )


def train(recipe: PretrainRecipe) -> dict[str, float]:
    """Last loss and mean recall@10 of a run."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    metrics = Trainer(recipe, overwrite=True).train()
    lines = [json.loads(line) for line in (Path(recipe.run) / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line and line["step"] > recipe.steps * 3 // 4]
    recall = statistics.fmean(metrics["evaluation"][name] for name in RECALLS)
    return {"loss": statistics.fmean(losses), "recall@10": recall}


def interval(differences: list[float]) -> dict[str, float]:
    """Mean of paired differences with Student's 95 % interval."""
    low, high = student(differences) or (float("nan"),) * 2  # of one pair there is none
    return {"mean": round(statistics.fmean(differences), 4), "low": round(low, 4), "high": round(high, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--shards", type=Path, default=Path("runs/flickr8k/shards"))
    asked = parser.parse_args()
    if asked.seeds < 2:
        parser.error("an interval needs two seeds or more")
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(asked.seeds):
            for scaled in found:
                recipe = recipe_of(Path(folder) / f"{seed}-{scaled}", asked.shards, scaled, seed, asked.steps)
                found[scaled].append(train(recipe))
                print(f"seed {seed}, scaled {scaled}: {found[scaled][-1]}", file=sys.stderr, flush=True)
    figures = {
        name: {
            "exact": round(statistics.fmean(run[name] for run in found[False]), 4),
            "scaled_minus_exact": interval(
                [one[name] - other[name] for one, other in zip(found[True], found[False], strict=True)]
            ),
        }
        for name in found[False][0]
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        json.dumps(
            {
                "benchmark": "scaled_decoding",
                "seeds": asked.seeds,
                "steps": asked.steps,
                **figures,
                **machine(),
                "commit": commit,
            }
        )
    )


if __name__ == "__main__":
    main()
