"""Samples per CPU-second of `pair_stream` against open_clip's own transform and tokenizer on the same
pictures.

The peer does what open_clip's training loader does with a sample: Pillow decodes, `image_transform` crops,
resizes and normalises to float32, the tokenizer takes one caption, and rows are stacked. It reads its bytes
from memory, which spares it the tar; ours reads the shards. `ratio` compares what a loader worker spends: our
normalisation runs on the device. `ratio_normalised` adds it on the CPU, so that both end with the same float32
batch.
Both use one thread. CPU time of the process; pairs are interleaved A B B A.

    python benchmarks/stream.py --images ../shared/flickr8k/Flickr8k_Dataset
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import open_clip
import torch
from open_clip.transform import image_transform
from PIL import Image

from data.shards import Sample, ShardWriter
from data.stream import pair_stream
from data.transforms import EvalTransform, TrainTransform

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
CAPTION = "two brown dogs are running through the shallow water of a lake at sunset"


def write_shards(images: Path, count: int, side: int | None, folder: Path) -> list[bytes]:
    """Shards of `count` photographs, enlarged to a short side of `side` pixels when given."""
    contents = []
    with ShardWriter(folder, samples_per_shard=100) as writer:
        for number, path in enumerate(sorted(images.glob("*.jpg"))[:count]):
            content = path.read_bytes()
            if side:
                image = Image.open(io.BytesIO(content)).convert("RGB")
                scale = side / min(image.size)
                image = image.resize((round(image.width * scale), round(image.height * scale)))
                file = io.BytesIO()
                image.save(file, "JPEG", quality=90)
                content = file.getvalue()
            contents.append(content)
            writer.write(Sample(f"{number:05d}", content, "jpg", [f"{CAPTION} {number}"]))
    return contents


def normalise(images: torch.Tensor) -> torch.Tensor:
    """As a training step does it on the device, here on the CPU."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


def ours(folder: Path, size: int, batch_size: int, tokenizer, finish: Callable) -> Callable[[], int]:
    stream = pair_stream(
        folder, transform=TrainTransform((size, size)), tokenize=tokenizer, batch_size=batch_size
    )

    def run() -> int:
        return sum(len(finish(batch["images"])) for batch in stream.epoch())

    return run


def theirs(contents: list[bytes], size: int, batch_size: int, tokenizer) -> Callable[[], int]:
    transform: Any = image_transform(size, is_train=True, mean=MEAN, std=STD)

    def run() -> int:
        done = 0
        for start in range(0, len(contents), batch_size):
            rows = []
            for number, content in enumerate(contents[start : start + batch_size], start):
                image = transform(Image.open(io.BytesIO(content)))
                rows.append((image, tokenizer([f"{CAPTION} {number}"])[0]))
            done += len(torch.stack([image for image, _ in rows]))
            torch.stack([tokens for _, tokens in rows])
        return done

    return run


def difference(folder: Path, contents: list[bytes], size: int, tokenizer) -> float:
    """Mean absolute difference of the evaluation pixels, of 255: a comparison needs the same result."""
    stream = pair_stream(
        folder,
        transform=EvalTransform((size, size)),
        tokenize=tokenizer,
        batch_size=len(contents),
        shuffle=False,
    )
    batch = next(stream.epoch())
    transform: Any = image_transform(size, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = torch.stack([transform(Image.open(io.BytesIO(content))) for content in contents]) * 255
    tokens = tokenizer([f"{CAPTION} {number}" for number in range(len(contents))])
    assert torch.equal(batch["tokens"], tokens)
    return (batch["images"].float() - expected).abs().mean().item()


def cpu_seconds(run: Callable[[], int], count: int) -> float:
    start = time.process_time()
    assert run() == count
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of .jpg photographs")
    parser.add_argument("--count", type=int, default=200, help="photographs")
    parser.add_argument("--pairs", type=int, default=8, help="paired runs")
    parser.add_argument("--size", type=int, default=224, help="pixels of the result")
    parser.add_argument("--side", type=int, default=None, help="enlarge photographs to this short side first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contents = write_shards(args.images, args.count, args.side, folder)
        mae = difference(folder, contents, args.size, tokenizer)
        runs = {
            "ours": ours(folder, args.size, 50, tokenizer, lambda images: images),
            "normalised": ours(folder, args.size, 50, tokenizer, normalise),
            "open_clip": theirs(contents, args.size, 50, tokenizer),
        }
        for run in runs.values():
            run()  # warm
        rounds = []
        for number in range(args.pairs):
            order = list(runs) if number % 2 == 0 else list(runs)[::-1]
            rounds.append({name: cpu_seconds(runs[name], len(contents)) for name in order})
    ratios = {name: sorted(one["open_clip"] / one[name] for one in rounds) for name in ("ours", "normalised")}
    rate = {name: len(contents) / statistics.median(one[name] for one in rounds) for name in runs}
    result = {
        "benchmark": "stream",
        "picture": "as they are" if args.side is None else f"short side {args.side} px",
        "size": args.size,
        "ratio": round(statistics.median(ratios["ours"]), 2),
        "low": round(ratios["ours"][0], 2),
        "high": round(ratios["ours"][-1], 2),
        "ratio_normalised": round(statistics.median(ratios["normalised"]), 2),
        "pairs": len(rounds),
        "samples_per_cpu_second": {name: round(number, 1) for name, number in rate.items()},
        "eval_mae_of_255": round(mae, 3),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "machine": f"{platform.machine()}, torch {torch.__version__}, open_clip {open_clip.__version__}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
