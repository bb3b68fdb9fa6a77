"""Which way of pretraining wins on a small set, from equally many pairs: a table over seeds, paired by seed.

Every setting sees the same pictures in the same order (a seed's), for as many pairs. `lit`, `lit_gradcache` (the batch
four times as large) and `distillation` build on the packaged towers of the recipe `flickr8k_pretrained_cpu` and on a
run of it; the other settings start from random weights. A run that is there is not made again, so the command can be
stopped and repeated.

    python benchmarks/pretraining_study.py --data runs/flickr8k/shards --teacher runs/flickr8k_pretrained_cpu
    python benchmarks/pretraining_study.py --data runs/quickstart/shards --val test --name scenes_8000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from pairstream.recipe import find_recipe

T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student, 95 %, for so many seeds
RECALLS = (
    "image_to_text/recall@10",
    "text_to_image/recall@10",
    "image_to_text/recall@1",
    "text_to_image/recall@1",
)
STUDENT = {
    "kind": "towers",
    "embed_dim": 256,
    "image_tower": {"kind": "resnet", "image_size": 64, "width": 16, "layers": [1, 1, 1, 1]},
    "text_tower": {"kind": "transformer", "context_length": 24, "width": 192, "heads": 3, "layers": 1},
}
BATCH = 256


def settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each setting changes in the common recipe."""
    found: dict[str, dict[str, Any]] = {
        "info_nce": {},
        "sigmoid": {"loss": {"kind": "sigmoid"}},
        "multi_positive": {"loss": {"kind": "multi_positive"}, "data": {"captions_per_image": 2}},
    }
    if args.teacher:
        found["distillation"] = {
            "loss": {"kind": "distillation", "stored": ["teacher"]},
            "data": {"train": str(args.out / "reinforced")},
        }
        model = yaml.safe_load(
            find_recipe("pretrain", "flickr8k_pretrained_cpu").read_text(encoding="utf-8")
        )["model"]
        model["image_tower"]["image_size"] = 96  # 3 x 3 cells of the tower; at 64 px there would be 2 x 2
        # A locked tower's projection learns at AdamW's rate for it.
        optim = {"kind": "adamw", "lr": 1.0e-3, "weight_decay": 3.0, "clip_norm": 1.0}
        phases = [{"step": 0, "image_groups": 0, "text_groups": 0}]
        found["lit"] = {"model": model, "optim": optim, "phases": phases}
        # Micro-batches want rows that do not depend on each other: a locked tower's batch norms do not.
        larger = {"batch_size": 4 * BATCH, "micro_batch": BATCH, "steps": args.steps // 4}
        found["lit_gradcache"] = {**found["lit"], **larger}
    unknown = sorted(set(args.only or ()) - set(found))
    if unknown:
        raise SystemExit(f"--only {' '.join(unknown)}: expected some of {' '.join(found)}")
    return {
        name: changes for name, changes in found.items() if name == "info_nce" or name in (args.only or found)
    }


def recipe_of(args: argparse.Namespace, changes: dict[str, Any], seed: int, run: Path) -> dict[str, Any]:
    """The recipe of one run."""
    recipe: dict[str, Any] = {
        "run": str(run),
        "model": deepcopy(STUDENT),
        "data": {"train": f"{args.data}/train", "workers": 0, "crop_scale": [0.5, 1.0], "hflip": args.hflip},
        "batch_size": BATCH,
        "steps": args.steps,
        "optim": {"kind": "muon", "lr": 2.0e-3, "weight_decay": 1.0, "clip_norm": 1.0},
        "schedule": {"kind": "cosine"},
        "checkpoint": {"every": 100_000, "keep": 1},
        "evaluate": [
            {
                "use": "retrieval.evaluator:RetrievalEvaluator",
                "every": 100_000,
                "options": {"shards": f"{args.data}/{args.val}"},
            }
        ],
        "log_every": 10,
        "seed": seed,
    }
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if key == "data" else value
    recipe["schedule"]["warmup"] = recipe["steps"] // 10
    return recipe


def command(*words: str | Path) -> float:
    """Run a command of ours; returns its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "pairstream", *map(str, words)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def result_of(args: argparse.Namespace, name: str, changes: dict[str, Any], seed: int) -> dict[str, float]:
    """The numbers of one run, which is made if it is not there."""
    run = args.out / f"{name}-{seed}"
    kept = run / "study.json"
    if not kept.exists():
        if name == "distillation" and not (args.out / "reinforced").exists():
            crop = ("--crop-scale", "0.5", "1", "--hflip", str(args.hflip))
            places = (f"{args.data}/train", "--out", args.out / "reinforced")
            spent = command(
                "pretrain",
                "reinforce",
                *places,
                "--views",
                "2",
                *crop,
                "--teachers",
                f"teacher={args.teacher}",
            )
            (args.out / "reinforce.json").write_text(json.dumps({"cpu_s": spent}))
        path = args.out / f"{name}-{seed}.yaml"
        path.write_text(yaml.safe_dump(recipe_of(args, changes, seed, run)), encoding="utf-8")
        spent = command("pretrain", path, "--overwrite")
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        kept.write_text(
            json.dumps({**metrics["evaluation"], "cpu_s": spent, "samples_seen": metrics["samples_seen"]})
        )
    return json.loads(kept.read_text(encoding="utf-8"))


def summary(runs: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the seeds, their range, and the difference to InfoNCE of the same seed with its interval."""
    found: dict[str, Any] = {
        "seeds": len(runs),
        "cpu_s": round(statistics.mean(run["cpu_s"] for run in runs)),
    }
    for name in RECALLS:
        values = [run[name] for run in runs]
        differences = [run[name] - other[name] for run, other in zip(runs, base, strict=True)]
        half = T[len(runs)] * statistics.stdev(differences) / len(runs) ** 0.5
        mean = statistics.mean(differences)
        found[name] = {
            "mean": round(statistics.mean(values), 4),
            "range": [min(values), max(values)],
            "over_info_nce": [round(mean, 4), round(mean - half, 4), round(mean + half, 4)],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="these settings beside info_nce; all when left out")
    parser.add_argument("--data", required=True, help="folder of the shards `train` and of the held-out ones")
    parser.add_argument("--val", default="dev", help="name of the held-out shards")
    parser.add_argument("--name", default="flickr8k")
    parser.add_argument("--teacher", help="a run of flickr8k_pretrained_cpu; adds distillation and LiT")
    parser.add_argument(
        "--hflip", type=float, default=0.0, help="0.5 where captions do not say left and right"
    )
    parser.add_argument("--steps", type=int, default=80, help=f"of {BATCH} pairs")
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(T))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "pretraining_study.jsonl"
    )
    args = parser.parse_args()
    args.out = args.out / args.name
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):  # a stopped study has whole seeds
        for name, changes in settings(args).items():
            runs.setdefault(name, []).append(result_of(args, name, changes, seed))
    rows = {name: summary(found, runs["info_nce"]) for name, found in runs.items()}
    print(f"{'setting':16} {'recall@10 i2t':>24} {'recall@10 t2i':>24} {'CPU s':>7}")
    for name, row in rows.items():
        cells = (f"{row[key]['mean']:.3f} ({row[key]['over_info_nce'][0]:+.3f})" for key in RECALLS[:2])
        print(f"{name:16} {'':>8}{'  '.join(f'{cell:>22}' for cell in cells)} {row['cpu_s']:7}")
    line = {"benchmark": "pretraining_study", "set": args.name, "steps": args.steps, "settings": rows}
    line |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    args.results.parent.mkdir(exist_ok=True)
    with args.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
