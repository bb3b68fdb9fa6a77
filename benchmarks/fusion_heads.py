"""The fusion heads on the same data: held-out accuracy, parameters, and latency of the head.

Every head is trained from the same frozen encoder, on the same batches, for as many steps, with each of the seeds.
Samples without a label are left out of both sets first, so that none is encoded in vain. `tanh` is the classic late
fusion, which the others should beat; the pooled heads take the towers' embeddings, `gated_tokens` the mean and the
largest of the image tokens, standardised. Latency is CPU time of the head alone, features given,
for one picture with its text: one thread, the median of 50 calls, heads in turns.

    python benchmarks/fusion_heads.py --model runs/quickstart/pretrain --train runs/quickstart/shards/train \\
        --val runs/quickstart/shards/test
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from data.shards import Sample, ShardWriter
from data.stream import PairStream
from finetune.fusion.model import FusionClassifier
from finetune.fusion.saved import load_classifier
from finetune.recipe import FinetuneRecipe
from finetune.trainer import Finetuner
from pairstream.recipe import validate

HEADS: dict[str, dict[str, Any]] = {
    "tanh": {"kind": "tanh", "width": 128},
    "concat": {"kind": "concat", "width": 128},
    "gated": {"kind": "gated", "width": 128},
    "product": {"kind": "product", "width": 128},
    "single_stream": {"kind": "single_stream", "width": 128, "layers": 2, "heads": 4},
    "co_attention": {"kind": "co_attention", "width": 128, "layers": 1, "heads": 4},
    "cross_attention": {"kind": "cross_attention", "width": 128, "layers": 1, "heads": 4},
    "gated_tokens": {"kind": "gated", "width": 128, "picture": "mean_max"},
}
STANDARDISED = ("gated_tokens",)


def labelled(shards: str, out: Path) -> int:
    """Copy the samples that have a label to shards of their own; their number."""
    stream = PairStream(
        shards,
        lambda sample, rng: sample,
        lambda rows: {"rows": rows},
        batch_size=64,
        shuffle=False,
        workers=0,
    )
    count = 0
    with ShardWriter(out) as writer:
        for sample in (sample for batch in stream.epoch() for sample in batch["rows"]):
            if "label" in sample.record:
                count += 1
                record = {key: sample.record[key] for key in ("text", "label") if key in sample.record}
                writer.write(Sample(f"{count:08d}", sample.image, sample.extension, ("x",), record))
    return count


def train(args: argparse.Namespace, kind: str, seed: int, shards: Path, run: Path) -> dict[str, Any]:
    """Metrics of one run."""
    content = {
        "run": str(run),
        "model": {"name": args.model},
        "task": {
            "kind": "classify",
            "fusion": HEADS[kind],
            "standardise": kind in STANDARDISED,
            "freeze_text_tower": True,
        },
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "cache_image_tokens": True},
        "batch_size": 64,
        "steps": args.steps,
        "schedule": {"warmup": args.steps // 10},
        "evaluate": {"wall": 0},
        "precision": "fp32",
        "seed": seed,
    }
    with contextlib.redirect_stderr(io.StringIO()):
        return Finetuner(validate(FinetuneRecipe, content, "benchmark"), overwrite=True).train()


def inputs_of(model: FusionClassifier) -> tuple[torch.Tensor, ...]:
    """Features of one picture and one text, as the head gets them."""
    blank = torch.zeros(1, 3, *model.encoder.image_size, dtype=torch.uint8)
    words = model.encoder.tokenize(["what a lovely day this is"])
    image, text = model.image_features(blank), model.text_features(words)
    seen = words[:, : text.shape[1]].ne(0) if not model.pooled else torch.ones(1, 1, dtype=torch.bool)
    return image, text, seen, torch.zeros(1, dtype=torch.int64)


def latencies(models: dict[str, FusionClassifier], calls: int) -> dict[str, float]:
    """Microseconds of CPU time of each head."""
    spent: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        inputs = {name: inputs_of(model) for name, model in models.items()}
        for number in range(calls + 3):
            for name, model in models.items():
                start = time.process_time()
                for _ in range(10):
                    model.head(*inputs[name])
                if number >= 3:  # the first ones warm up
                    spent[name].append((time.process_time() - start) * 1e5)
    return {name: statistics.median(values) for name, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the dual encoder")
    parser.add_argument("--train", required=True, help="shards with text and label")
    parser.add_argument("--val", required=True, help="shards to measure on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each head")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    models: dict[str, FusionClassifier] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        counts = {split: labelled(getattr(args, split), root / split) for split in ("train", "val")}
        for kind in HEADS:
            runs = [train(args, kind, seed, root, root / f"{kind}{seed}") for seed in range(args.seeds)]
            models[kind] = load_classifier(root / f"{kind}0", device="cpu")
            accuracies = [run["accuracy"] for run in runs]
            found[kind] = {
                "accuracy": round(statistics.mean(accuracies), 4),
                "accuracy_range": [round(min(accuracies), 4), round(max(accuracies), 4)],
                "macro_f1": round(statistics.mean(run["macro_f1"] for run in runs), 4),
                "parameters": sum(parameter.numel() for parameter in models[kind].head.parameters()),
            }
            print(kind, found[kind], flush=True)
    for kind, value in latencies(models, 50).items():
        found[kind]["latency_us"] = round(value, 1)
    print(
        json.dumps(
            {
                "benchmark": "fusion_heads",
                "heads": found,
                "majority": round(runs[0]["majority_baseline"], 4),  # pyright: ignore[reportPossiblyUnboundVariable]
                "samples": counts,
                "steps": args.steps,
                "seeds": args.seeds,
                "machine": f"{platform.machine()}, torch {torch.__version__}",
            }
        )
    )


if __name__ == "__main__":
    main()
