"""`pairstream quickstart`: the whole path, from pictures to numbers, by the commands anybody would type."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairstream.atomic import write_text
from pairstream.recipe import find_recipe
from pairstream.report import Report
from pairstream.run import finite

HOME = Path("runs/quickstart")
KINDS = "40"  # of objects, of the 73 there are: within minutes a captioner learns to name all that it sees


@dataclass(frozen=True)
class Stage:
    """One command of the quickstart and what it is for."""

    name: str
    why: str
    command: tuple[str, ...]


def stages(out: Path = HOME, *, tiny: bool = False) -> list[Stage]:
    """The commands, in order.

    Args:
        out: The folder of everything; for another than the default, copies of the recipes are written there.
        tiny: A few pictures and steps: it proves that the path is open and says nothing about quality.

    Returns:
        What `quickstart` runs.
    """
    pairs, test, pretrain = (str(out / name) for name in ("shards/train", "shards/test", "pretrain"))
    counts = ("48", "24") if tiny else ("8000", "600")
    short = ("--steps", "4", "--schedule.warmup", "1", "--batch-size", "8") if tiny else ()

    def train(stage: str, name: str) -> tuple[str, ...]:
        if out != HOME:  # the recipes name the default folder: run copies that name this one
            content = find_recipe(stage, name).read_text(encoding="utf-8").replace(str(HOME), str(out))
            write_text(out / f"{name}.yaml", content)
            name = str(out / f"{name}.yaml")
        return (stage, name, "--overwrite", *short)

    def scenes(split: str, folder: str, count: str) -> tuple[str, ...]:
        return (
            "data",
            "prepare",
            "scenes",
            "--split",
            split,
            "--count",
            count,
            "--kinds",
            KINDS,
            "--out",
            folder,
            "--overwrite",
        )

    return [
        Stage(
            "shards",
            "compose pictures with captions and questions, and pack them into shards",
            scenes("train", pairs, counts[0]),
        ),
        Stage(
            "held out",
            "pictures of object combinations that never occur in training",
            scenes("test", test, counts[1]),
        ),
        Stage(
            "pretrain",
            "train an image and a text tower to agree, from random weights",
            train("pretrain", "scenes_cpu"),
        ),
        Stage(
            "caption",
            "teach a small language model to describe what the image tower sees",
            train("finetune", "scenes_caption"),
        ),
        Stage(
            "vqa",
            "teach it to answer questions about pictures",
            train("finetune", "scenes_vqa"),
        ),
        Stage(
            "retrieval",
            "find held-out pictures by their captions, and captions by their pictures",
            (
                "retrieval",
                "eval",
                "--model",
                pretrain,
                "--data",
                test,
                "--run",
                pretrain,
                "--out",
                str(out / "retrieval"),
            ),
        ),
    ]


def quickstart(*, out: Path = HOME, tiny: bool = False) -> None:
    """Run the whole path and write metrics.json and report.html.

    Args:
        out: The folder of everything; what an earlier quickstart left there is replaced.
        tiny: A few pictures and steps, in about a minute: proves that the path is open, says nothing about quality.
    """
    from pairstream.cli import main as command

    # Before torch is loaded: threads that spin while they wait took seven times the CPU time on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    plan = stages(out, tiny=tiny)
    seconds: dict[str, float] = {}
    for number, stage in enumerate(plan, 1):
        print(f"\n[{number}/{len(plan)}] {stage.why}\n$ pairstream {shlex.join(stage.command)}", flush=True)
        began = time.monotonic()
        code = command(["--debug", *stage.command])
        seconds[stage.name] = round(time.monotonic() - began, 1)
        if code:
            raise ValueError(f"`pairstream {shlex.join(stage.command)}` ended with exit code {code}")
    metrics = collect(out, seconds)
    write_text(out / "metrics.json", json.dumps(finite(metrics), indent=2) + "\n")
    page = report(out, metrics, plan).write(out)
    print(f"\n{summary(metrics)}\n\nLook at {page}")


def collect(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Gather the numbers of the stages into one dictionary."""

    def read(folder: str) -> dict[str, Any]:
        return json.loads((out / folder / "metrics.json").read_text(encoding="utf-8"))

    found, caption, vqa, trained = read("retrieval"), read("caption"), read("vqa"), read("pretrain")
    retrieval = found["retrieval"]
    return {
        "retrieval": {
            "image_to_text": retrieval["image_to_text"],
            "text_to_image": retrieval["text_to_image"],
            "chance": retrieval["chance"]["text_to_image"]["recall@1"],
            "pictures": found["images"],
        },
        "captioning": {
            name: caption[name] for name in ("cider", "bleu4", "baseline_cider", "baseline_bleu4")
        },
        "vqa": {name: vqa[name] for name in ("accuracy", "majority_baseline", "question_only_baseline")},
        "pretraining": {name: trained[name] for name in ("steps", "samples_seen")},
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
    }


def headline(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that matter, each beside what a trivial answer scores."""
    retrieval, captioning, vqa = metrics["retrieval"], metrics["captioning"], metrics["vqa"]
    chance = f"chance {retrieval['chance']:.4f}"
    return [
        ("image → text, recall@1", f"{retrieval['image_to_text']['recall@1']:.3f}", chance),
        ("text → image, recall@1", f"{retrieval['text_to_image']['recall@1']:.3f}", chance),
        (
            "captions, CIDEr-D",
            f"{captioning['cider']:.2f}",
            f"most frequent caption {captioning['baseline_cider']:.2f}",
        ),
        (
            "VQA accuracy",
            f"{vqa['accuracy']:.3f}",
            f"question only {vqa['question_only_baseline']:.3f}, majority {vqa['majority_baseline']:.3f}",
        ),
    ]


def summary(metrics: dict[str, Any]) -> str:
    """The headline as lines of text."""
    lines = [f"{label:<24}{value:>7}   ({note})" for label, value, note in headline(metrics)]
    return "\n".join([*lines, f"{metrics['seconds']['total']:.0f} s in all"])


def report(out: Path, metrics: dict[str, Any], plan: Sequence[Stage]) -> Report:
    """One page: the headline, what the model does with held-out pictures, the curves, the commands."""
    page = Report(
        "PairStream quickstart",
        f"From random weights to these numbers in {metrics['seconds']['total'] / 60:.1f} minutes on this machine. "
        f"All are measured on {metrics['retrieval']['pictures']:,} held-out pictures, whose combinations of objects "
        "never occur in training.",
    )
    page.numbers(headline(metrics))
    for heading, folder in (
        ("Retrieval", "retrieval"),
        ("Captions", "caption"),
        ("Questions and answers", "vqa"),
    ):
        page.heading(heading)
        part = Report.load(out / folder)
        part.blocks = [block for block in part.blocks if block["kind"] != "heading"]
        page.extend(part)
    page.heading("How it was made")
    page.table(
        ["command", "what for", "seconds"],
        [[f"pairstream {shlex.join(s.command)}", s.why, metrics["seconds"][s.name]] for s in plan],
    )
    page.text(
        "Pictures are composed from OpenMoji drawings, the open-source emoji project (CC BY-SA 4.0, openmoji.org)."
    )
    return page


def main(argv: list[str]) -> None:
    """`pairstream quickstart`."""
    import tyro

    tyro.cli(quickstart, args=argv, prog="pairstream quickstart")
