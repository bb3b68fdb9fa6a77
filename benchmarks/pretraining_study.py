"""Which way of pretraining wins on a small set, from equally many pairs: runs over seeds, and a table of them.

Five settings see the same pictures for as many pairs. From random weights, a small ViT and text transformer with
InfoNCE (`info_nce`), with the sigmoid loss (`sigmoid`), with InfoNCE tiled over a batch four times as large by
GradCache, so in a quarter of the steps (`gradcache`), and with what the set's `lit` run of seed 0 says of one view a
picture (`distillation`). `lit` has the packaged EfficientNet and MiniLM (extra `towers`), locked, under projections
that train.

Each run that ends adds its row to --results. A row that is there is not made again, so the command can be stopped and
repeated, and parts of it can be run apart (--only, --seeds). With --table nothing is run: the rows become a table with
Student's intervals over seeds, between the markers of a page.

    python benchmarks/pretraining_study.py --data runs/flickr8k/shards --hflip 0.5
    python benchmarks/pretraining_study.py --data runs/scenes_2000 --val val --name scenes_2000 --steps 32
    python benchmarks/pretraining_study.py --table docs/pretraining.md
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
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from pairstream.atomic import write_text
from pairstream.recipe import find_recipe

BASE = "info_nce"
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's 97.5 % quantile for so many seeds."""
RECALLS = (
    "image_to_text/recall@10",
    "text_to_image/recall@10",
    "image_to_text/recall@1",
    "text_to_image/recall@1",
)
BEGIN, END = "<!-- pretraining_study -->", "<!-- /pretraining_study -->"
STUDENT = {
    "kind": "towers",
    "embed_dim": 256,
    # No batch norm, which micro-batches do not go with: one tower for all settings.
    "image_tower": {
        "kind": "vit",
        "image_size": 64,
        "patch_size": 8,
        "width": 128,
        "layers": 3,
        "head_width": 64,
        "pool": "avg",
    },
    "text_tower": {"kind": "transformer", "context_length": 24, "width": 192, "heads": 3, "layers": 1},
}
BATCH = 256
LARGER = 4


def settings(steps: int, reinforced: Path) -> dict[str, dict[str, Any]]:
    """What each setting changes in the common recipe, in the order in which they run."""
    model = yaml.safe_load(find_recipe("pretrain", "flickr8k_pretrained_cpu").read_text(encoding="utf-8"))[
        "model"
    ]
    model["image_tower"]["image_size"] = 96  # 3 x 3 cells of the tower; at 64 px there would be 2 x 2
    return {
        BASE: {},
        "sigmoid": {"loss": {"kind": "sigmoid"}},
        "gradcache": {
            "loss": {"kind": "info_nce", "tile": BATCH},
            "batch_size": LARGER * BATCH,
            "micro_batch": BATCH,
            "steps": steps // LARGER,
        },
        "lit": {
            "model": model,
            # A locked tower's projection learns at AdamW's rate for it.
            "optim": {"kind": "adamw", "lr": 1.0e-3, "weight_decay": 3.0, "clip_norm": 1.0},
            "phases": [{"step": 0, "image_groups": 0, "text_groups": 0}],
        },
        "distillation": {
            "loss": {"kind": "distillation", "stored": ["teacher"]},
            "data": {"train": str(reinforced)},
        },
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


def store_teacher(args: argparse.Namespace, reinforced: Path) -> None:
    """Keep what the `lit` run of seed 0 says of one view a picture beside the pictures, once."""
    noted = args.out / "reinforce.json"
    if noted.exists():
        return
    words = ["pretrain", "reinforce", f"{args.data}/train", "--out", reinforced, "--views", "1"]
    words += ["--crop-scale", "0.5", "1", "--hflip", str(args.hflip), "--workers", "1"]
    spent = command(*words, "--teachers", f"teacher={args.out / 'lit-0'}")
    noted.write_text(json.dumps({"cpu_s": spent}), encoding="utf-8")


def run_one(args: argparse.Namespace, name: str, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train one setting with one seed; returns its row."""
    run = args.out / f"{name}-{seed}"
    path = args.out / f"{name}-{seed}.yaml"
    path.write_text(yaml.safe_dump(recipe_of(args, changes, seed, run)), encoding="utf-8")
    spent = command("pretrain", path, "--overwrite")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {
        "benchmark": "pretraining_study",
        "set": args.name,
        "setting": name,
        "seed": seed,
        "steps": args.steps,  # of the common recipe: what makes rows comparable
        "pairs": metrics["pairs"],
        "pairs_seen": metrics["samples_seen"],
        **{recall: metrics["evaluation"][recall] for recall in RECALLS},
        "cpu_s": round(spent, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit(),
    }


def commit() -> str:
    """Of the code that runs; empty outside a checkout."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def study(args: argparse.Namespace) -> None:
    """Make the rows that are missing, whole seeds first."""
    args.out.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    reinforced = args.out / "reinforced"
    found = settings(args.steps, reinforced)
    unknown = sorted(set(args.only or ()) - set(found))
    if unknown:
        raise SystemExit(f"--only {' '.join(unknown)}: expected some of {' '.join(found)}")
    keys = ("set", "setting", "seed", "steps")
    done = {tuple(row[key] for key in keys) for row in read_rows(args.results)}
    for seed in args.seeds:
        for name, changes in found.items():
            if name not in (args.only or found) or (args.name, name, seed, args.steps) in done:
                continue
            if name == "distillation":
                if not (args.out / "lit-0" / "metrics.json").exists():
                    raise SystemExit(
                        f"distillation: its teacher {args.out / 'lit-0'} is not there: run --only lit first"
                    )
                store_teacher(args, reinforced)
            row = run_one(args, name, changes, seed)
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean over seeds; None of a single one."""
    if len(values) not in T:
        return None
    half = T[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return mean - half, mean + half


def told(values: Sequence[float], sign: str = "") -> str:
    """A mean and its interval."""
    if not values:
        return ""
    bounds = interval(values)
    mean = format(statistics.mean(values), f"{sign}.3f")
    return mean if bounds is None else f"{mean} [{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]"


def mean_recall(row: dict[str, Any]) -> float:
    """Recall@10, the mean of both directions."""
    return statistics.mean(row[name] for name in RECALLS[:2])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One set's rows as Markdown, with the difference to InfoNCE of the same seed."""
    by_setting: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], {})[row["seed"]] = row
    base = by_setting.get(BASE, {})
    lines = [
        "| setting | seeds | recall@10 image to text | text to image | mean of both over InfoNCE | recall@1 | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    best = max(by_setting, key=lambda name: statistics.mean(map(mean_recall, by_setting[name].values())))
    for name, runs in by_setting.items():
        over = [mean_recall(row) - mean_recall(base[seed]) for seed, row in runs.items() if seed in base]
        cells = [told([row[recall] for row in runs.values()]) for recall in RECALLS]
        lines.append(
            f"| {f'**{name}**' if name == best else name} | {len(runs)} | {cells[0]} | {cells[1]} | "
            f"{'' if name == BASE else told(over, '+')} | {cells[2].split()[0]} / {cells[3].split()[0]} | "
            f"{statistics.mean(row['cpu_s'] for row in runs.values()):.0f} |"
        )
    return "\n".join(lines)


def page_part(rows: Sequence[dict[str, Any]]) -> str:
    """All sets, each with its table."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["steps"]), []).append(row)
    parts = []
    for (name, steps), found in groups.items():
        parts.append(
            f"`{name}`: {found_pairs(found):,} pictures, {steps} steps of {BATCH} pairs (or as many pairs).\n\n"
            f"{table(found)}"
        )
    return "\n\n".join(parts)


def found_pairs(rows: Sequence[dict[str, Any]]) -> int:
    """Pictures of a set."""
    return rows[0]["pairs"]


def write_table(page: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put the tables between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{page}: expected the markers {BEGIN} and {END}, once and in this order")
    if not rows:
        raise SystemExit("no rows yet: run the study first, or name other --results")
    before, rest = text.split(BEGIN)
    write_text(page, f"{before}{BEGIN}\n{page_part(rows)}\n{END}{rest.split(END)[1]}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the shards `train` and of the held-out ones")
    parser.add_argument("--val", default="dev", help="name of the held-out shards")
    parser.add_argument("--name", default="flickr8k", help="what the set is called in rows and folders")
    parser.add_argument("--only", nargs="+", help="these settings; all when left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--hflip", type=float, default=0.0, help="0.5 where captions do not say left and right"
    )
    parser.add_argument("--steps", type=int, default=64, help=f"of {BATCH} pairs, a multiple of {LARGER}")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "pretraining_study.jsonl"
    )
    parser.add_argument(
        "--table", type=Path, metavar="PAGE", help="write the table into this page; run nothing"
    )
    args = parser.parse_args(argv)
    if args.table:
        write_table(args.table, read_rows(args.results))
        return
    if not args.data:
        parser.error("expected --data (to run) or --table (to write the page)")
    if args.steps % LARGER:
        parser.error(f"--steps {args.steps}: expected a multiple of {LARGER}, the factor of the larger batch")
    args.out = args.out / f"{args.name}-{args.steps}"
    study(args)


if __name__ == "__main__":
    main()
