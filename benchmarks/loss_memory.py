"""Memory and CPU time of `info_nce` beside open_clip's ClipLoss: forward and backward, float32, d = 512.

Memory is the highest resident size above the features, in a process of its own for each measurement (the kernel's
high-water mark, reset when the features are there). CPU time, one thread, is of pairs that are interleaved A B B A
in one process, 7 of them or as many as five minutes allow. The last line is one JSON object; `--plot FILE` draws memory
against the batch.

    python benchmarks/loss_memory.py [--quick] [--plot memory.png]      (about 9 minutes on two free cores)

A measurement that fails leaves null for the figures that need it, with the reason under `errors`, and the exit code 1;
`--quick` leaves out what takes minutes. With `--device cuda` memory is the allocator's and time is of the GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses import info_nce

WIDTH, SCALE = 512, 100.0
LONGEST = 300
"""Seconds of timed pairs of one size, on a machine that is slow or busy."""
BATCHES = (4096, 8192, 16384, 32768, 65536)
"""Of the memory curve."""


def features(batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Pairs that are related, as in the middle of a training: cosine about 0.2 to their own, 0 to others."""
    generator = torch.Generator().manual_seed(batch)
    images = F.normalize(torch.randn(batch, WIDTH, generator=generator), dim=-1)
    texts = torch.randn(batch, WIDTH, generator=generator).mul_(5 / WIDTH**0.5).add_(images)
    return images.to(device), F.normalize(texts, dim=-1).to(device)


def loss_named(name: str) -> Any:
    if name == "ours":
        return info_nce
    from open_clip.loss import ClipLoss

    return ClipLoss()


def step(loss: Any, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Loss and gradients by both features and the scale."""
    images, texts = (rows.detach().requires_grad_() for rows in pair)
    scale = torch.tensor(SCALE, device=images.device, requires_grad=True)
    value = loss(images, texts, scale)
    value.backward()
    return value.detach(), *(tensor.grad for tensor in (images, texts, scale))  # pyright: ignore


def high_water_mb(reset: bool = False) -> float:
    """Highest resident size of this process in MiB since the last reset (Linux)."""
    if reset:
        # What was freed and kept would be used again, and not be seen as the loss's.
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_memory(name: str, batch: int, device: str) -> float:
    """Peak MiB above the features of one forward and backward pass; in a process of its own."""
    loss = loss_named(name)
    step(loss, tuple(rows[:64] for rows in features(128, device)))  # pyright: ignore  # what libraries set up
    pair = features(batch, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, pair)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = high_water_mb(reset=True)
    step(loss, pair)
    return high_water_mb() - before


def in_own_process(*words: str) -> Any:
    """What a fresh interpreter prints for `--one ...`."""
    command = [sys.executable, __file__, "--one", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_time(batch: int, pairs: int, device: str) -> dict[str, Any]:
    """CPU seconds (milliseconds of the GPU) of both losses, interleaved, and how far their gradients are apart."""
    pair = features(batch, device)
    losses = {name: loss_named(name) for name in ("ours", "open_clip")}
    small = features(2048, device)
    for loss in losses.values():
        step(loss, small)  # warm
    rounds, found, began = [], {}, time.monotonic()
    for number in range(pairs):
        if number >= 3 and time.monotonic() - began > LONGEST:
            break
        order = list(losses) if number % 2 == 0 else list(losses)[::-1]
        taken = {}
        for name in order:
            taken[name], found[name] = seconds(losses[name], pair)
        rounds.append(taken)
    apart = [
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in zip(found["ours"], found["open_clip"], strict=True)
    ]
    return {"rounds": rounds, "apart": apart}


def seconds(loss: Any, pair: tuple[Tensor, Tensor]) -> tuple[float, tuple[Tensor, ...]]:
    """Time of one step, and what it found."""
    if pair[0].is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        found = step(loss, pair)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000, found
    start = time.process_time()
    found = step(loss, pair)
    return time.process_time() - start, found


def slope_of(points: dict[int, float]) -> float:
    """Least-squares slope of log memory against log batch: 1 is linear, 2 quadratic."""
    x = torch.tensor([float(batch) for batch in points]).log()
    y = torch.tensor(list(points.values())).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def plot(path: Path, ours: dict[int, float], theirs: dict[int, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.loglog(list(theirs), list(theirs.values()), "s--", color="#b2182b", label="ClipLoss")
    axes.loglog(list(ours), list(ours.values()), "o-", color="#2166ac", label="info_nce")
    axes.set_xticks(list(ours), [f"{batch:,}" for batch in ours], minor=False)
    axes.set(xlabel="pairs in the batch", ylabel="peak memory above the features, MiB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def timed(batch: int, pairs: int, device: str) -> dict[str, Any]:
    """Ratio ours / ClipLoss: median, lowest and highest of the pairs; relative differences of loss and gradients."""
    told = in_own_process("time", str(batch), str(pairs), device)
    for name in ("ours", "open_clip"):
        print(
            f"B = {batch:,}, {name}: {statistics.median(one[name] for one in told['rounds']):.2f} s",
            flush=True,
        )
    ratios = sorted(one["ours"] / one["open_clip"] for one in told["rounds"])
    return {
        "cpu_ratio": round(statistics.median(ratios), 3),
        "max_gradient_error": max(told["apart"][1:]),
        "low": round(ratios[0], 3),
        "high": round(ratios[-1], 3),
        "pairs": len(ratios),
        "loss_error": told["apart"][0],
    }


class Parts:
    """Measurements, none of which takes the others with it."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}

    def take(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured; None, with the error kept, where that failed."""
        try:
            return measure()
        except Exception as error:
            self.errors[name] = str(error)[-300:]
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
            return None

    def curve(self, name: str, batches: list[int], device: str) -> dict[int, float]:
        """Peak memory by batch, of those that could be measured."""
        found = {}
        for batch in batches:
            said = f"{name} at {batch}"
            value = self.take(said, lambda batch=batch: in_own_process("memory", name, str(batch), device))
            if value is not None:
                found[batch] = value
                print(f"B = {batch:,}, {name}: {value:.0f} MiB above the features", flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="draw memory against the batch into this file")
    parser.add_argument("--quick", action="store_true", help="up to 8,192 pairs, for trying the command")
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs")
    parser.add_argument("--largest", type=int, default=65536, help="largest batch of the memory curve")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, *words = args.one
        if kind == "time":
            torch.set_num_threads(1)
            print(json.dumps(measure_time(int(words[0]), int(words[1]), words[2])))
        else:
            torch.set_num_threads(os.cpu_count() or 1)  # memory does not depend on it; the wait does
            print(json.dumps(measure_memory(words[0], int(words[1]), words[2])))
        return
    began, parts = time.monotonic(), Parts()
    largest, pairs = (8192, 2) if args.quick else (args.largest, args.pairs)
    theirs = parts.curve(
        "open_clip", [batch for batch in (4096, 8192, 16384) if batch <= largest], args.device
    )
    ours = parts.curve("ours", [batch for batch in BATCHES if batch <= largest], args.device)
    small = parts.take("time at 4096", lambda: timed(4096, pairs, args.device))
    large = None if args.quick else parts.take("time at 16384", lambda: timed(16384, pairs, args.device))
    if args.plot:
        parts.take("plot", lambda: plot(args.plot, ours, theirs))
    ratios = {batch: round(ours[batch] / theirs[batch], 4) for batch in ours if batch in theirs}
    result = {
        "benchmark": "loss_memory",
        "quick": args.quick,
        "b16384": {
            "memory_ratio": ratios.get(16384),
            **(large or dict.fromkeys(("cpu_ratio", "max_gradient_error"))),
        },
        "b65536_peak_mb": round(ours[65536], 1) if 65536 in ours else None,
        "slope": round(slope_of(ours), 3) if len(ours) > 1 else None,
        "clip_loss_slope": round(slope_of(theirs), 3) if len(theirs) > 1 else None,
        "b4096": {"memory_ratio": ratios.get(4096), **(small or {})},
        "peak_mb": {"ours": ours, "open_clip": theirs},
        "errors": parts.errors,
        "seconds": round(time.monotonic() - began),
        "machine": f"{platform.machine()}, {args.device}, torch {torch.__version__}",
    }
    print(json.dumps(result))
    sys.exit(bool(parts.errors))


if __name__ == "__main__":
    main()
