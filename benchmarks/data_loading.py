"""Samples per CPU-second of one loader worker: `pair_stream` against open_clip's own webdataset loader.

Both read the same shards, take a random crop of 0.9 to 1 of the area to 224 px, tokenise one caption, and end with a
normalised float32 batch. Each is one process on the same core that does what a loader worker does; what it costs to
hand a batch over to the training process is left out, which favours open_clip, whose batch is four times as large.
open_clip's `get_wds_dataset` runs in the peers' environment (`make peers`). Our normalisation, which a training step
does on the device, is charged here on the CPU, into one reused buffer as a device's allocator gives it, with the
channels of a pixel side by side.

`ratio` is ours / open_clip, the median over interleaved runs (A B C, C B A), with the lowest and the highest. `mae`
compares our pixels with those of open_clip's training transform for the same crops, of 255. `ceiling` is the ratio of
a loader that did nothing but decode each JPEG, resize the whole of it and normalise: no crop, no text, no file.

The pictures are Flickr8k's, enlarged, with grain that brings a file to the bytes per pixel of a photograph of
that size (34, 79 and 198 KB at 256, 512 and 1024 px).

    make peers
    python benchmarks/data_loading.py            # 3 to 4 minutes of CPU time; --quick for a look
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import open_clip
import psutil
import torch
import torchvision
from open_clip.transform import image_transform
from PIL import Image

from data.pictures import Picture
from data.shards import Sample, ShardWriter
from data.stream import PairStream, pair_stream
from data.tokens import batch_tokenizer
from data.transforms import EvalTransform, TrainTransform, as_planes, decode_image

ROOT = Path(__file__).resolve().parent.parent
FLICKR = ROOT.parent / "shared" / "flickr8k"
HARD_TEXTS = ROOT / "tests" / "fixtures" / "hard_texts.json"
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
SMALL = 64  # pixels; for the memory of a worker
QUALITIES = {SMALL: 90, 256: 95, 512: 90, 1024: 85}  # what such sets are stored with
COUNTS = {256: 192, 512: 128, 1024: 64}  # samples of one measurement
GRAIN = 5.0  # standard deviation, of 255
BATCH = 64


def write_shards(
    folder: Path, photographs: list[Path], captions: list[str], side: int, count: int
) -> list[bytes]:
    """Four shards of `count` samples; returns the distinct JPEGs."""
    contents = []
    for number, path in enumerate(photographs):
        image = Image.open(path).convert("RGB")
        scale = side / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
        grain = np.random.default_rng(number).normal(0, GRAIN, (image.height, image.width, 1))
        file = io.BytesIO()
        pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITIES[side])
        contents.append(file.getvalue())
    with ShardWriter(folder, samples_per_shard=-(-count // 4)) as writer:
        for number in range(count):
            content = contents[number % len(contents)]
            writer.write(Sample(f"{number:05d}", content, "jpg", [captions[number % len(captions)]]))
    return contents


class Normalise:
    """uint8 batches to normalised float32 ones, picture by picture so that each stays in the cache.

    Both have the channels of a pixel side by side (`torch.channels_last`): a row is then one line of numbers.
    """

    def __init__(self) -> None:
        self.out = torch.empty(BATCH, 224, 224 * 3)
        self.scale = (1 / (255 * torch.tensor(STD))).repeat(224)
        self.shift = (-torch.tensor(MEAN) / torch.tensor(STD)).repeat(224)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        for image, out in zip(images, self.out, strict=False):
            out.copy_(image.permute(1, 2, 0).flatten(1)).mul_(self.scale).add_(self.shift)
        return self.out[: len(images)].view(-1, 224, 224, 3).permute(0, 3, 1, 2)  # (b, 3, 224, 224)


def ours(folder: Path, tokenizer: Callable, scaled: bool, normalise: Normalise) -> Callable[[], float]:
    stream = pair_stream(
        folder,
        transform=TrainTransform(224),
        tokenize=tokenizer,
        batch_size=BATCH,
        scaled_decode=scaled,
    )

    batches = iter(stream)  # one for all rounds, as a worker lives through many epochs

    def run() -> float:
        start = time.process_time()
        seen = 0
        for batch in itertools.islice(batches, stream.batches_per_epoch):
            seen += len(normalise(batch["images"]))
            assert len(batch["tokens"]) == len(batch)
        assert seen == stream.samples, "samples were lost"
        return time.process_time() - start

    return run


def bare(contents: list[bytes], count: int, scaled: bool, normalise: Normalise) -> Callable[[], float]:
    """Only what no loader can leave out, over and over on the same memory."""
    slot = torch.empty(BATCH, 224, 224, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    whole = EvalTransform(224, resize_mode="squash")

    def run() -> float:
        start = time.process_time()
        for first in range(0, count, BATCH):
            for place, number in zip(slot, range(first, min(first + BATCH, count)), strict=False):
                picture = Picture(contents[number % len(contents)])
                reduction = min(picture.height, picture.width) / 224 if scaled else 1
                whole.apply(as_planes(picture.pixels(reduction, borrowed=True)), out=place)
            normalise(slot[: count - first])
        return time.process_time() - start

    return run


class Peer:
    """open_clip's loader in the peers' environment, on the same core."""

    def __init__(self, python: Path, core: int):
        self.process = subprocess.Popen(
            [str(python), str(ROOT / "benchmarks" / "open_clip_loader.py"), str(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._answer()

    def ask(self, **task: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def run(self, folder: Path, samples: int) -> float:
        answer = self.ask(shards=f"{folder}/{{00000..00003}}.tar", samples=samples, batch_size=BATCH)
        assert answer["samples"] == samples, f"open_clip's loader gave {answer['samples']} samples"
        return answer["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("open_clip's loader ended; its message is above")
        return json.loads(line)


def differences(contents: list[bytes]) -> tuple[float, float]:
    """Mean absolute difference to the pixels of open_clip's training transform for the same crops, exact and scaled."""
    transform = TrainTransform(224)
    theirs: Any = image_transform(224, is_train=True, mean=(0.0,) * 3, std=(1.0,) * 3)
    exact, scaled = [], []
    for number, content in enumerate(contents):
        picture = Picture(content)
        box = transform.crop(picture.height, picture.width, np.random.default_rng(number))
        with mock.patch.object(torchvision.transforms.RandomResizedCrop, "get_params", return_value=box):
            expected = theirs(Image.open(io.BytesIO(content))) * 255
        whole = transform(decode_image(content), np.random.default_rng(number)).float()
        reduced = transform.load(picture, np.random.default_rng(number)).float()
        exact.append((whole - expected).abs().mean().item())
        scaled.append((reduced - expected).abs().mean().item())
    return statistics.mean(exact), statistics.mean(scaled)


def spread(rounds: list[dict[str, float]], kind: str, mae: float) -> dict[str, float]:
    ratios = [one["open_clip"] / one[kind] for one in rounds]
    ceilings = [one["open_clip"] / one[f"bare_{kind}"] for one in rounds]
    return {
        "ratio": round(statistics.median(ratios), 2),
        "low": round(min(ratios), 2),
        "high": round(max(ratios), 2),
        "mae": round(mae, 3),
        "ceiling": round(statistics.median(ceilings), 2),
    }


def time_tokenizers(captions: list[str], pairs: int) -> dict[str, Any]:
    """Batches of captions through both; both have seen the captions before, as in the second epoch."""
    slow = open_clip.get_tokenizer("ViT-B-32")
    fast = batch_tokenizer(open_clip.get_tokenizer("ViT-B-32"))
    assert fast is not slow
    hard = json.loads(HARD_TEXTS.read_text())
    different = int((slow([*captions, *hard]) != fast([*captions, *hard])).any(1).sum())

    def seconds(tokenize: Callable, texts: list[str]) -> float:
        start = time.process_time()
        for first in range(0, len(texts), BATCH):
            tokenize(texts[first : first + BATCH])
        return time.process_time() - start

    result: dict[str, Any] = {"different": different, "texts": len(captions) + len(hard)}
    for name, texts in (("", captions), ("hard_", [text for text in hard if len(text) < 300] * 20)):
        rounds = []
        for number in range(pairs):
            order = (slow, fast) if number % 2 == 0 else (fast, slow)
            taken = {tokenize: seconds(tokenize, texts) for tokenize in order}
            rounds.append(taken[slow] / taken[fast])
        result[f"{name}ratio"] = round(statistics.median(rounds), 1)
        if not name:
            result |= {"low": round(min(rounds), 1), "high": round(max(rounds), 1)}
    return result


class WithMemory:
    """A collate that adds the worker's resident memory, in bytes."""

    def __init__(self, collate: Any):
        self.collate = collate

    @property
    def columns(self) -> Any:
        return self.collate.columns

    def __call__(self, rows: list, placed: Any = None) -> dict[str, Any]:
        return {**self.collate(rows, placed), "rss": psutil.Process().memory_info().rss}


def worker_growth(folder: Path, tokenizer: Callable, samples: int) -> float:
    """By how many MB the memory of a loader worker grows over `samples`, after the first tenth."""
    made = pair_stream(folder, transform=TrainTransform(SMALL), tokenize=tokenizer, batch_size=BATCH)
    stream = PairStream(folder, made.load, WithMemory(made.collate), batch_size=BATCH, workers=1)
    steps = max(samples // BATCH, 20)
    memory = [batch["rss"] for batch in stream.iterate(0, steps)]
    warm = memory[steps // 10 : steps // 5]
    return (statistics.median(memory[-len(warm) :]) - statistics.median(warm)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, default=FLICKR / "Flickr8k_Dataset", help="folder of .jpg photographs"
    )
    parser.add_argument(
        "--captions", type=Path, default=FLICKR / "Flickr8k.token.txt", help="one a line, after a tab"
    )
    parser.add_argument(
        "--peers", type=Path, default=ROOT / ".peers" / "bin" / "python", help="the peers' python"
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024], choices=[256, 512, 1024])
    parser.add_argument("--pairs", type=int, default=8, help="paired runs")
    parser.add_argument("--core", type=int, default=0, help="the core that all measured processes share")
    parser.add_argument(
        "--quick", action="store_true", help="two pairs of short runs: a look, not a measurement"
    )
    args = parser.parse_args()
    if not args.peers.exists():
        raise SystemExit(
            f"no python at {args.peers}: run `make peers`, or name another environment with --peers"
        )
    photographs = sorted(args.images.glob("*.jpg"))[: 16 if args.quick else 64]
    if not photographs or not args.captions.is_file():
        raise SystemExit(
            f"no photographs in {args.images} or no captions at {args.captions}: see --images, --captions"
        )
    lines = args.captions.read_text(encoding="utf-8").splitlines()
    captions = [line.split("\t", 1)[-1] for line in lines][:2000]
    pairs = 2 if args.quick else args.pairs

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    tokenizer = batch_tokenizer(open_clip.get_tokenizer("ViT-B-32"))
    normalise = Normalise()
    peer = Peer(args.peers, args.core)
    result: dict[str, Any] = {"benchmark": "data_loading"}
    rates: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for side in args.sides:
            folder = Path(name) / str(side)
            count = 64 if args.quick else COUNTS[side]
            contents = write_shards(folder, photographs, captions, side, count)
            tokenizer(captions[:count])
            peer.ask(captions=captions[:count])
            runs: dict[str, Callable[[], float]] = {
                "open_clip": lambda folder=folder, count=count: peer.run(folder, count),
                "exact": ours(folder, tokenizer, False, normalise),
                "scaled": ours(folder, tokenizer, True, normalise),
                "bare_exact": bare(contents, count, False, normalise),
                "bare_scaled": bare(contents, count, True, normalise),
            }
            for run in runs.values():
                run()  # warm
            rounds = []
            for number in range(pairs):
                order = list(runs) if number % 2 == 0 else list(runs)[::-1]
                rounds.append({kind: runs[kind]() for kind in order})
            mae = dict(zip(("exact", "scaled"), differences(contents), strict=True))
            for kind in ("exact", "scaled"):
                result[f"{kind}_{side}"] = spread(rounds, kind, mae[kind])
            rates[str(side)] = {
                kind: round(count / statistics.median(one[kind] for one in rounds), 1) for kind in runs
            }
            kilobytes = round(statistics.mean(map(len, contents)) / 1024)
            print(side, "px,", kilobytes, "KB:", rates[str(side)], file=sys.stderr)
        peer.close()
        result["tokenizer"] = time_tokenizers(captions[:500] if args.quick else captions, pairs)
        samples = 1_000 if args.quick else 100_000
        folder = Path(name) / "small"  # a hundred thousand take a minute and a half
        write_shards(folder, photographs, captions, SMALL, 192)
        result["rss_growth_mb"] = round(worker_growth(folder, tokenizer, samples), 2)
    result |= {
        "rss_samples": samples,
        "pairs": pairs,
        "samples_per_cpu_second": rates,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}",
        "versions": {**peer.versions, "torchvision": torchvision.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
