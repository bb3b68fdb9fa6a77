"""A training step of `pretrain` beside open_clip's own: samples per CPU second, GradCache, two processes.

Both trainers run their own loops, `Trainer.train_phase` and `open_clip_train.train.train_one_epoch`, over the same
batches that lie ready in memory (uint8 for ours; for theirs already normalised floats, as its loader makes them), from
the same weights, with AdamW, clipping at norm 1 and the same learning rate, each in a process of its own with one
thread. The losses of all steps of a first run must agree. Runs are interleaved A B C C B A; a ratio is theirs / ours in
CPU seconds a step, so above 1 ours is faster. `compiled` in it is the same for `compile: true`, against the same peer.

`gradcache` compares one batch of 16 parts with one of a part's size, per sample, and its gradients with those of the
undivided batch in float64. `two_processes` is wall time: samples per second of two processes with one thread each
against one process, twice the global batch; it means something only on two free cores.

    python benchmarks/train_step.py [--quick] [--only small]      (about 9 minutes on two free cores)

A figure that fails is `{"error": ...}` in the last line, the others are there, and the exit code is 1. On a machine
with a GPU the same command runs there, in bf16 on both sides, with MFU beside the ratios, and its times are wall times.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import traceback
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


def recipe_of(
    model: dict[str, Any], folder: Path, batch_size: int, *, compiled: bool = False
) -> PretrainRecipe:
    return PretrainRecipe.model_validate(
        {
            "run": str(folder / ("compiled" if compiled else "run")),
            "compile": compiled,
            "model": model,
            "data": {"train": str(folder / "shards"), "workers": 0},
            "batch_size": batch_size,
            # More than are run: the last one saves, and counts FLOPs for the log, which is no part of a step.
            "steps": 10**6,
            "optim": {"kind": "adamw", "lr": LR},
            "schedule": {"kind": "cosine", "warmup": 0, "final": 1.0},
            "log_every": 10**6,
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

    def __init__(
        self, model: dict[str, Any], folder: Path, batch_size: int, steps: int, *, compiled: bool = False
    ):
        recipe = recipe_of(model, folder, batch_size, compiled=compiled)
        self.trainer = Trainer(recipe, overwrite=True)
        self.batches = make_batches(self.trainer.encoder, batch_size, steps)
        self.losses, self.clock = [], Clock()
        objective = self.trainer.objective

        def told(features: Any, images: Tensor, tokens: Tensor) -> Tensor:
            loss = objective(features, images, tokens)
            self.losses.append(loss.detach())
            return loss

        self.trainer.objective = told
        self.trainer.stream.iterate = lambda *_, **__: self.clock.through(self.ready())  # pyright: ignore

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

    def mfu_of_a_sample(self) -> float | None:
        """Share of a GPU's peak that one sample a second is."""
        meter = self.trainer.meter
        return meter.flops_per_pair() / meter.peak if meter.peak else None


class Theirs:
    """open_clip's loop over the same batches, with the model, optimiser and loss that its `main` makes."""

    def __init__(self, model: dict[str, Any], folder: Path, batch_size: int, steps: int):
        from open_clip.loss import ClipLoss

        torch.manual_seed(0)
        encoder = build_encoder(recipe_of(model, folder, batch_size).model)
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


def serve(pipe: Connection, kind: str, ranks: tuple[int, int, int], *job: Any) -> None:
    """One rank of a trainer, in a process of its own as it would be: makes it, and runs it whenever it is told to."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rank, world, port = ranks
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        trainer = Theirs(*job) if kind == "theirs" else Ours(*job, compiled=kind == "compiled")
        trainer.run()  # warm; and the losses of a start from the same weights
        share = trainer.mfu_of_a_sample() if isinstance(trainer, Ours) else None
        pipe.send(([float(loss) for loss in trainer.losses], share))
        while pipe.recv():
            pipe.send(trainer.run())
    except Exception as error:
        pipe.send(RuntimeError(f"{kind}, rank {rank}: {error}\n{traceback.format_exc()[-1500:]}"))


class Ranks:
    """The processes of one trainer, which wait between runs."""

    def __init__(self, kind: str, *job: Any, world: int = 1):
        context, self.pipes, self.processes = multiprocessing.get_context("spawn"), [], []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(world):
            pipe, end = context.Pipe()
            self.pipes.append(pipe)
            self.processes.append(
                context.Process(target=serve, args=(end, kind, (rank, world, port), *job), daemon=True)
            )
            self.processes[-1].start()
            end.close()  # so that its death ends our waiting
        self.losses, self.mfu_of_a_sample = self.hear()

    def hear(self) -> Any:
        """What rank 0 says, when all have said something."""
        try:
            said = [pipe.recv() for pipe in self.pipes]
        except EOFError:
            raise RuntimeError("a process of the benchmark died; see its error above") from None
        for word in said:
            if isinstance(word, Exception):
                raise word
        return said[0]

    def run(self) -> float:
        """Seconds of one run on rank 0, without its first step."""
        for pipe in self.pipes:
            pipe.send(True)
        return self.hear()

    def end(self) -> None:
        """Whatever has happened before."""
        for process in self.processes:
            process.terminate()


def compare(model: dict[str, Any], folder: Path, batch_size: int, steps: int, pairs: int) -> dict[str, Any]:
    """Ratio of CPU seconds, theirs / ours, and whether the losses of all steps from the same weights agree."""
    folder.mkdir()
    write_shards(folder / "shards", batch_size)
    trainers: dict[str, Ranks] = {}
    try:
        for kind in ("ours", "compiled", "theirs"):
            trainers[kind] = Ranks(kind, model, folder, batch_size, steps)
        taken: dict[str, list[float]] = {kind: [] for kind in trainers}
        for number in range(pairs):
            for kind in list(trainers) if number % 2 == 0 else list(trainers)[::-1]:
                taken[kind].append(trainers[kind].run())
    finally:
        for trainer in trainers.values():
            trainer.end()
    expected, result = trainers["theirs"].losses, {}
    for kind in ("ours", "compiled"):
        apart = max(abs(a - b) / b for a, b in zip(trainers[kind].losses, expected, strict=True))
        found = spread([theirs / ours for theirs, ours in zip(taken["theirs"], taken[kind], strict=True)])
        found |= {"loss_equal": apart < (1e-2 if GPU else 1e-4), "largest_loss_difference": apart}
        result |= found if kind == "ours" else {"compiled": found}
    rates = {kind: batch_size * (steps - 1) / statistics.median(each) for kind, each in taken.items()}
    result |= {"batch_size": batch_size, "samples_per_s": {kind: round(r, 2) for kind, r in rates.items()}}
    if (share := trainers["ours"].mfu_of_a_sample) is not None:
        result["mfu"] = {kind: round(rate * share, 4) for kind, rate in rates.items()}
    return result


def spread(ratios: list[float], name: str = "ratio") -> dict[str, Any]:
    """The median of the pairs, and the lowest and highest."""
    low, high = round(min(ratios), 3), round(max(ratios), 3)
    return {name: round(statistics.median(ratios), 3), "low": low, "high": high, "pairs": len(ratios)}


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
        **spread(ratios, "time_ratio"),
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


def two_processes(folder: Path, batch_size: int, steps: int, pairs: int) -> dict[str, Any]:
    """Samples per second of two processes against one, by the clock on the wall."""
    if len(os.sched_getaffinity(0)) < 2:
        raise RuntimeError("two processes need two cores")
    folder.mkdir()
    write_shards(folder / "shards", 2 * batch_size)
    groups: dict[int, Ranks] = {}
    try:
        for count in (1, 2):
            job = SMALL, folder / str(count), batch_size * count, steps
            job[1].mkdir()
            (job[1] / "shards").symlink_to(folder / "shards")
            groups[count] = Ranks("ours", *job, world=count)
        ratios = []
        for number in range(pairs):
            taken = {}
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                start = time.perf_counter()
                groups[count].run()
                taken[count] = time.perf_counter() - start
            ratios.append(2 * taken[1] / taken[2])
    finally:
        for group in groups.values():
            group.end()
    return {**spread(ratios), "batch_size_a_process": batch_size}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few pairs, for trying the command")
    parser.add_argument(
        "--only", choices=["small", "vit_b32", "gradcache", "two_processes"], help="one figure"
    )
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    pairs = 2 if args.quick else 7
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        figures = {
            "small": lambda: compare(SMALL, folder / "small", 128 if not GPU else 4096, 4, pairs),
            "vit_b32": lambda: compare(
                VIT_B32, folder / "b32", 8 if not GPU else 512, 2 if not GPU else 8, pairs
            ),
            "gradcache": lambda: gradcache(32, 16, pairs),
            "two_processes": lambda: two_processes(folder / "two", 128, 4, pairs),
        }
        result: dict[str, Any] = {"benchmark": "train_step", "quick": args.quick}
        for name, figure in figures.items():
            if args.only in (None, name):
                began = time.monotonic()
                try:
                    result[name] = figure()
                except Exception as error:
                    traceback.print_exc()
                    result[name] = {"error": str(error).splitlines()[0]}
                print(f"{name} ({time.monotonic() - began:.0f} s): {result[name]}", flush=True)
    result["machine"] = (
        f"{platform.machine()}, {torch.cuda.get_device_name() if GPU else 'cpu'}, torch {torch.__version__}"
    )
    print(json.dumps(result))
    sys.exit(any("error" in found for found in result.values() if isinstance(found, dict)))


if __name__ == "__main__":
    main()
