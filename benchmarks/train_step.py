"""A training step of `pretrain` beside open_clip's own: samples per CPU second, GradCache, two processes.

Both trainers run their own loops, `Trainer.train_phase` and `open_clip_train.train.train_one_epoch`, over the same
batches that lie ready in memory (uint8 for ours; for theirs already normalised floats, as its loader makes them), from
the same weights, with AdamW, clipping at norm 1 and the same learning rate, each in a process of its own with one
thread. The losses of all steps of a first run must agree. Runs are interleaved A B B A; a ratio is theirs / ours in CPU
seconds a step, so above 1 ours is faster.

`gradcache` compares one batch of 16 parts with one of a part's size, per sample, and its gradients with those of the
undivided batch in float64. `two_processes` is wall time: samples per second of two processes with one thread each
against one process, twice the global batch; it means something only on two free cores.

    python benchmarks/train_step.py [--quick] [--only small]      (about 12 minutes)

On a machine with a GPU the same command runs there, in bf16 on both sides, and its times are wall times.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.shards import Sample, ShardWriter
from data.stream import Batch
from pairstream.progress import ProgressBar
from pretrain.encoder import build_encoder
from pretrain.gradcache import cached_backward
from pretrain.losses import info_nce
from pretrain.recipe import PretrainRecipe
from pretrain.trainer import DualEncoder, Trainer

GPU = torch.cuda.is_available()
SMALL = {
    "kind": "towers",
    "embed_dim": 128,
    "image_tower": {
        "kind": "vit",
        "image_size": 64,
        "patch_size": 8,
        "width": 128,
        "layers": 4,
        "head_width": 32,
    },
    "text_tower": {"kind": "transformer", "context_length": 32, "width": 128, "heads": 4, "layers": 2},
}
VIT_B32 = {"kind": "open_clip", "name": "ViT-B-32"}
LR = 1e-4


def recipe_of(model: dict[str, Any], folder: Path, batch_size: int, steps: int) -> PretrainRecipe:
    return PretrainRecipe.model_validate(
        {
            "run": str(folder / "run"),
            "model": model,
            "data": {"train": str(folder / "shards"), "workers": 0},
            "batch_size": batch_size,
            "steps": steps,
            "optim": {"kind": "adamw", "lr": LR},
            "schedule": {"kind": "cosine", "warmup": 0, "final": 1.0},
            "log_every": steps,
            "checkpoint": {"every": 10**6},
        }
    )


def write_shards(folder: Path, count: int) -> None:
    """The trainer wants shards to open; it is given other batches."""
    with ShardWriter(folder) as writer:
        for number in range(count):
            path = folder.parent / "one.jpg"
            Image.new("RGB", (32, 32), (number % 256, 0, 0)).save(path)
            writer.write(Sample(f"{number:05d}", path.read_bytes(), "jpg", [f"picture {number}"]))


def make_batches(encoder: Any, batch_size: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """uint8 pictures `(b, 3, h, w)` and tokens `(b, context)` of captions of nine words."""
    rng = np.random.default_rng(0)
    words = ["dog", "boat", "hill", "red", "two", "small", "on", "near", "grass", "street", "man", "ball"]
    found = []
    for _ in range(steps):
        pixels = rng.integers(0, 256, (batch_size, 3, *encoder.image_size), dtype=np.uint8)
        texts = [" ".join(rng.choice(words, 9)) for _ in range(batch_size)]
        found.append((torch.from_numpy(pixels), encoder.tokenize(texts)))
    return found


class Clock:
    """Seconds of each step: from when the loop asks for a batch until it asks for the next."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def through(self, batches: Iterable[Any]) -> Iterator[Any]:
        self.marks = []
        for batch in batches:
            self.marks.append(now())
            yield batch
        self.marks.append(now())

    def seconds(self) -> float:
        """Of the steps but the first, which sets things up."""
        return self.marks[-1] - self.marks[1]


def now() -> float:
    """CPU seconds of this process; with a GPU wall seconds, when it has done all that was asked."""
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Ours:
    """`Trainer` over given batches."""

    def __init__(self, model: dict[str, Any], folder: Path, batch_size: int, steps: int):
        recipe = recipe_of(model, folder, batch_size, steps)
        self.trainer = Trainer(recipe, overwrite=True)
        self.batches = make_batches(self.trainer.encoder, batch_size, steps)
        self.losses, self.clock = [], Clock()
        objective = self.trainer.objective

        def told(features: Any, images: Tensor, tokens: Tensor) -> Tensor:
            loss = objective(features, images, tokens)
            self.losses.append(loss.detach())
            return loss

        self.trainer.objective = told
        self.trainer.stream.iterate = lambda *_: self.clock.through(self.ready())  # pyright: ignore

    def ready(self) -> Iterator[Batch]:
        rank, world = self.trainer.rank, self.trainer.world
        for step, (images, tokens) in enumerate(self.batches):
            data = {"images": images[rank::world], "tokens": tokens[rank::world]}
            zeros = torch.zeros(len(data["images"]), dtype=torch.int64)
            yield Batch(step, 0, [str(row) for row in range(len(zeros))], zeros, data, zeros)

    def run(self) -> float:
        self.trainer.step = 0
        with ProgressBar("step", len(self.batches), show=False) as bar:
            self.trainer.train_phase(len(self.batches), bar)
        return self.clock.seconds()


class Theirs:
    """open_clip's loop over the same batches, with the model, optimiser and loss that its `main` makes."""

    def __init__(self, model: dict[str, Any], folder: Path, batch_size: int, steps: int):
        from open_clip.loss import ClipLoss

        torch.manual_seed(0)
        encoder = build_encoder(recipe_of(model, folder, batch_size, steps).model)
        self.model, self.clock, self.losses = encoder.model, Clock(), []
        self.model.output_dict = True
        with torch.no_grad():
            self.batches = Loader(
                (encoder.normalize(images.to(encoder.device)).cpu().contiguous(), tokens)
                for images, tokens in make_batches(encoder, batch_size, steps)
            )
        self.batches.clock = self.clock
        named = [item for item in self.model.named_parameters() if item[1].requires_grad]
        words = ("bn", "ln", "bias", "logit_scale")
        small = [value for name, value in named if value.ndim < 2 or any(word in name for word in words)]
        ids = {id(value) for value in small}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": small, "weight_decay": 0.0},
                {"params": [value for _, value in named if id(value) not in ids], "weight_decay": 0.2},
            ],
            lr=LR,
            betas=(0.9, 0.98),
            eps=1e-6,
        )
        clip = ClipLoss(cache_labels=True)

        def told(**features: Any) -> Any:
            found = clip(**features)
            self.losses.append(found["contrastive_loss"].detach())
            return found

        self.loss = told
        self.args = Namespace(
            device=str(encoder.device),
            precision="amp_bf16" if GPU else "fp32",
            distill=False,
            accum_freq=1,
            skip_scheduler=False,
            grad_clip_norm=1.0,
            horovod=False,
            log_every_n_steps=steps,
            batch_size=batch_size,
            world_size=1,
            rank=0,
            local_rank=0,
            wandb=False,
        )

    def run(self) -> float:
        from open_clip_train.train import train_one_epoch

        data = {"train": Namespace(dataloader=self.batches, set_epoch=lambda epoch: None)}
        train_one_epoch(
            self.model, data, self.loss, 0, self.optimizer, None, lambda step: None, None, self.args
        )
        return self.clock.seconds()


class Loader(list):
    """A list with the counts that open_clip's loop asks its loader for."""

    clock: Clock

    def __iter__(self) -> Iterator[Any]:
        return self.clock.through(super().__iter__())

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return sum(len(images) for images, _ in super().__iter__())


def serve(pipe: Connection, kind: str, *job: Any) -> None:
    """One trainer in a process of its own, as it would be: makes it, and runs it whenever it is told to."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    trainer = (Ours if kind == "ours" else Theirs)(*job)
    trainer.run()  # warm; and the losses of a start from the same weights
    pipe.send([float(loss) for loss in trainer.losses])
    while pipe.recv():
        pipe.send(trainer.run())


def compare(model: dict[str, Any], folder: Path, batch_size: int, steps: int, pairs: int) -> dict[str, Any]:
    """Ratio of CPU seconds, theirs / ours, and whether the losses of all steps from the same weights agree."""
    folder.mkdir()
    write_shards(folder / "shards", batch_size)
    context, pipes, first = multiprocessing.get_context("spawn"), {}, {}
    for kind in ("ours", "theirs"):
        pipes[kind], end = context.Pipe()
        job = (end, kind, model, folder, batch_size, steps)
        context.Process(target=serve, args=job, daemon=True).start()
        first[kind] = pipes[kind].recv()
    apart = [abs(a - b) / b for a, b in zip(first["ours"], first["theirs"], strict=True)]
    ratios, taken = [], {kind: [] for kind in pipes}
    for number in range(pairs):
        for kind in list(pipes) if number % 2 == 0 else list(pipes)[::-1]:
            pipes[kind].send(True)
            taken[kind].append(pipes[kind].recv())
        ratios.append(taken["theirs"][-1] / taken["ours"][-1])
    for pipe in pipes.values():
        pipe.send(False)
    ratios.sort()
    samples = batch_size * (steps - 1)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "low": round(ratios[0], 3),
        "high": round(ratios[-1], 3),
        "pairs": pairs,
        "loss_equal": max(apart) < (1e-2 if GPU else 1e-4),
        "largest_loss_difference": max(apart),
        "batch_size": batch_size,
        "samples_per_s": {kind: round(samples / statistics.median(each), 2) for kind, each in taken.items()},
    }


def seconds(run: Callable[[], Any]) -> float:
    start = now()
    run()
    return now() - start


def gradcache(part: int, parts: int, pairs: int) -> dict[str, Any]:
    """Time a sample of `parts` parts against one part alone, and the error of the gradients."""
    torch.manual_seed(0)
    encoder = build_encoder(PretrainRecipe.model_validate(recipe_dict()).model, device="cpu")
    network = DualEncoder(encoder)
    images, tokens = make_batches(encoder, part * parts, 1)[0]

    def loss(features: Any) -> Tensor:
        return info_nce(*features)

    def undivided(rows: int) -> None:
        network.zero_grad(set_to_none=True)
        loss(network(images[:rows], tokens[:rows])).backward()

    def cached() -> None:
        network.zero_grad(set_to_none=True)
        cached_backward(network, (images, tokens), loss, micro_batch=part)

    encoder.model.train()
    undivided(part)
    cached()
    ratios = []
    for number in range(pairs):
        both = [lambda: undivided(part), cached]
        taken = [seconds(run) for run in (both if number % 2 == 0 else both[::-1])]
        alone, divided = taken if number % 2 == 0 else taken[::-1]
        ratios.append(divided / parts / alone)
    ratios.sort()
    network.double()
    few = 4 * part
    images, tokens = images[:few], tokens[:few]
    cached()
    mine = {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}
    undivided(few)
    errors = [
        float((mine[name] - value.grad).norm() / value.grad.norm().clamp(min=1e-12))
        for name, value in network.named_parameters()
        if value.grad is not None
    ]
    return {
        "time_ratio": round(statistics.median(ratios), 3),
        "low": round(ratios[0], 3),
        "high": round(ratios[-1], 3),
        "pairs": pairs,
        "gradient_error": max(errors),
        "batch_size": part * parts,
        "micro_batch": part,
    }


def recipe_dict() -> dict[str, Any]:
    return {
        "run": "unused",
        "model": SMALL,
        "data": {"train": "unused"},
        "steps": 1,
        "schedule": {"warmup": 0},
    }


def child(folder: Path, batch_size: int, steps: int) -> None:
    """Wall seconds of the steps of this process (one of one or two); prints them on rank 0."""
    torch.set_num_threads(1)
    ours = Ours(SMALL, folder, batch_size, steps)
    ours.run()  # warm
    start = time.perf_counter()
    ours.run()
    if ours.trainer.main:
        print(json.dumps(time.perf_counter() - start))


def two_processes(folder: Path, batch_size: int, steps: int, pairs: int) -> dict[str, Any]:
    """Samples per second of two processes against one."""
    folder.mkdir()
    write_shards(folder / "shards", 2 * batch_size)
    ratios = []
    for number in range(pairs):
        taken = {}
        for count in (1, 2) if number % 2 == 0 else (2, 1):
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            words = ["--child", str(folder), str(batch_size * count), str(steps)]
            done = subprocess.run(
                [sys.executable, *launch, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
            )
            taken[count] = json.loads(done.stdout.splitlines()[-1])
        ratios.append(2 * taken[1] / taken[2])
    ratios.sort()
    return {
        "ratio": round(statistics.median(ratios), 3),
        "low": round(ratios[0], 3),
        "high": round(ratios[-1], 3),
        "pairs": pairs,
        "batch_size_a_process": batch_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few pairs, for trying the command")
    parser.add_argument(
        "--only", choices=["small", "vit_b32", "gradcache", "two_processes"], help="one figure"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.child:
        child(Path(args.child[0]), int(args.child[1]), int(args.child[2]))
        return
    torch.set_num_threads(1)
    pairs = 2 if args.quick else 7
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        figures = {
            "small": lambda: compare(SMALL, folder / "small", 128 if not GPU else 4096, 4, pairs),
            "vit_b32": lambda: compare(
                VIT_B32, folder / "b32", 16 if not GPU else 512, 1 if not GPU else 8, pairs
            ),
            "gradcache": lambda: gradcache(32, 16, pairs),
            "two_processes": lambda: two_processes(folder / "two", 128, 12, min(pairs, 5)),
        }
        result: dict[str, Any] = {"benchmark": "train_step", "quick": args.quick}
        for name, figure in figures.items():
            if args.only in (None, name):
                result[name] = figure()
                print(f"{name}: {result[name]}", flush=True)
    result["machine"] = (
        f"{platform.machine()}, {torch.cuda.get_device_name() if GPU else 'cpu'}, torch {torch.__version__}"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
