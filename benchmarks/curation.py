"""Curation: CPU seconds a sample, at 10,000 and at 100,000 samples.

Synthetic JPEGs of 64 px (about 1.5 KB) with captions and metadata; one in twenty is a copy of an earlier one, encoded
again. The recipe has all filters that need no model, exact and perceptual search, and a balance. `semantic` times the
search over random 256-dimensional embeddings apart, with its recall; the embedding itself is the
encoder's business. `worker` is the peak memory of a process that looks at three shards of 10,000 samples, before
the first and after each.

The sizes run as small, large, small, so that the machine's other work meets both. `decide_alone` is the step that one
process does for all, on synthetic records of up to a million samples.

    python benchmarks/curation.py                      # 10,000 samples twice around 100,000 once: four CPU minutes
    python benchmarks/curation.py --sizes 2000 10000 --records 100000    # a quick look
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from PIL import Image

from data.curate import command, duplicates
from data.curate.command import run
from data.curate.decide import decide
from data.curate.lists import unit
from data.curate.look import Look
from data.curate.recipe import CurateRecipe
from data.curate.records import blank
from data.shards import Sample, ShardWriter

SHARD = 1000
WORKER_SHARD = 10_000  # samples, as a web-scale set has them
COPIES = 20  # one of so many is a copy
COPIES_EMBEDDED, COSINE = 50, 0.91  # and of the embeddings, at this cosine
WORDS = (
    *("dog", "cat", "beach", "house", "red", "green", "small", "large", "tree"),
    *("car", "boat", "man", "woman", "child", "street", "snow", "field", "river"),
)


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR).save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_set(folder: Path, samples: int, per_shard: int = SHARD) -> int:
    """Write the samples; returns how many of them are copies."""
    rng = np.random.default_rng(samples)
    grids = rng.integers(0, 256, (samples, 12, 12, 3), dtype=np.uint8)
    copies = 0
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for n in range(samples):
            copy = n % COPIES == COPIES - 1
            copies += copy
            source = (n // COPIES) * COPIES if copy else n  # each picture is copied once
            words = rng.choice(WORDS, 6)
            meta = {"url": f"https://host{n % 997}.example/{n}.jpg", "punsafe": float(rng.random() / 2)}
            image = jpeg(grids[source], 60 if copy else 85)
            writer.write(Sample(f"{n:09d}", image, "jpg", [f"a {' '.join(words)} in the morning"], meta))
    return copies


def recipe(shards: Path, out: Path, words: Path) -> CurateRecipe:
    return CurateRecipe.model_validate(
        {
            "shards": str(shards),
            "out": str(out),
            "filters": [
                {"kind": "image_size", "min_side": 32},
                {"kind": "aspect_ratio"},
                {"kind": "caption_length", "min": 5},
                {"kind": "word_count", "min": 3},
                {"kind": "language", "allow": ["en"]},
                {"kind": "text_patterns"},
                {"kind": "punsafe"},
                {"kind": "url_domains", "block": ["bad.example"]},
            ],
            "duplicates": {"plant": 0.001},
            "balance": {"entries": str(words), "cap": 10**9},
        }
    )


def timed(work) -> tuple[float, object]:
    """CPU seconds and result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def curate(shards: Path, out: Path, words: Path, copies: int) -> dict[str, float]:
    """One run; the CPU time of its steps in microseconds a sample."""
    spent = {"settle": 0.0}
    real = command.settle

    def settle(*arguments):
        spent["settle"], decision = timed(lambda: real(*arguments))
        return decision

    command.settle = settle  # type: ignore[assignment]
    try:
        total, metrics = timed(lambda: run(recipe(shards, out, words)))
    finally:
        command.settle = real
    n = metrics["samples"]  # type: ignore[index]
    gone = metrics["dropped"]  # type: ignore[index]
    found = gone["duplicate_perceptual"] + gone["duplicate_exact"]
    others = gone["language"]  # a copy may have gone by its caption
    assert copies - others <= found <= copies * 1.01, (
        f"{found} copies found of {copies}, {others} gone by language"
    )
    return {"total_us": 1e6 * total / n, "decide_us": 1e6 * spent["settle"] / n}


def semantic(rows: int) -> dict[str, float]:
    """CPU microseconds a row of the search for copies by embeddings, and the share of planted pairs that it finds.

    Random directions, which no list holds together, are the hard case; one in fifty has a copy at a cosine of 0.91.
    """
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(rows, 256)))
    planted = rows // COPIES_EMBEDDED
    noise = unit(rng.normal(size=(planted, 256)))
    vectors[-planted:] = unit(COSINE * vectors[:planted] + (1 - COSINE**2) ** 0.5 * noise)
    order = rng.permutation(rows)
    spent, pairs = timed(
        lambda: duplicates.semantic_pairs(vectors.astype(np.float16), np.arange(rows), order, COSINE - 0.03)
    )
    found = len(np.unique(np.sort(np.stack(pairs), axis=0), axis=1).T)  # type: ignore[arg-type]
    return {"rows": rows, "cpu_us": round(1e6 * spent / rows, 1), "recall": round(found / planted, 4)}


def alone(call: str) -> dict[str, float]:
    """What a function of this file prints in a process of its own."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", f"import curation; curation.{call}"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=here,
    )
    return json.loads(done.stdout)


def worker_here(shards: list[str], folder: str, words: str) -> None:
    """What a worker of the first pass holds: peak memory after each of some shards, in MB."""
    look = Look(recipe(Path(shards[0]).parent, Path(folder), Path(words)), Path(folder))
    peaks = [round(peak_kib() / 1024)]
    for number, name in enumerate(shards):
        look(number, name)
        peaks.append(round(peak_kib() / 1024))
    print(json.dumps({"shards": len(shards), "samples_per_shard": WORKER_SHARD, "peak_mb": peaks}))


def peak_kib() -> int:
    """The most memory of this process since it began; getrusage would count its parent's as well."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


def decide_here(rows: int) -> None:
    """Deciding on synthetic records: CPU microseconds and peak bytes a row."""
    rng = np.random.default_rng(0)
    before = peak_kib()
    records = blank(np.char.zfill(np.arange(rows).astype("S9"), 9), "a.tar")
    records.width[:], records.height[:] = 256, 256
    records.sha256[:] = np.frombuffer(rng.bytes(16 * rows), "V16")
    for name in ("hashes", "mirrored", "text"):
        getattr(records, name)[:] = rng.integers(0, 2**63, rows, dtype=np.uint64)
    records.hashes[::COPIES] = records.hashes[1::COPIES] ^ np.uint64(0b1001)
    records.hashed[:] = True
    made = CurateRecipe.model_validate({"shards": "a", "out": "b", "duplicates": {}})
    spent, decision = timed(lambda: decide(made, records, None))
    dropped = int((decision.verdicts > 0).sum())  # type: ignore[attr-defined]
    assert rows / COPIES <= dropped <= 1.001 * rows / COPIES, dropped
    peak = peak_kib() - before
    print(
        json.dumps({"rows": rows, "cpu_us": round(1e6 * spent / rows, 1), "bytes": round(1024 * peak / rows)})
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs=2, default=(10_000, 100_000))
    parser.add_argument("--records", type=int, nargs="+", default=(100_000, 1_000_000))
    asked = parser.parse_args()
    small, large = asked.sizes
    runs: dict[int, list[dict[str, float]]] = {small: [], large: []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = folder / "words.txt"
        words.write_text("\n".join(WORDS))
        copies = {size: write_set(folder / str(size), size) for size in (small, large)}
        write_set(folder / "worker", 3 * WORKER_SHARD, WORKER_SHARD)
        shards = [str(path) for path in sorted((folder / "worker").glob("*.tar"))]
        worker = alone(f"worker_here({shards!r}, {str(folder / 'looked')!r}, {str(words)!r})")
        print(f"a worker: {worker}", file=sys.stderr, flush=True)
        write_set(folder / "warm", 500)  # imports and the language model are no cost of a sample
        run(recipe(folder / "warm", folder / "warmed", words))
        for turn, size in enumerate((small, large, small)):
            runs[size].append(curate(folder / str(size), folder / f"out{turn}", words, copies[size]))
            print(f"{size:,} samples: {runs[size][-1]}", file=sys.stderr, flush=True)
    mean = {
        size: {key: float(np.mean([one[key] for one in own])) for key in own[0]} for size, own in runs.items()
    }
    figures = {
        "samples": [small, large],
        "cpu_us_per_sample": [round(mean[size]["total_us"]) for size in (small, large)],
        "cpu_us_per_sample_small_runs": [round(one["total_us"]) for one in runs[small]],
        "decide_cpu_us_per_sample": [round(mean[size]["decide_us"], 1) for size in (small, large)],
        "semantic": [semantic(size) for size in (small, large)],
        "decide_alone": [alone(f"decide_here({rows})") for rows in asked.records],
        "worker": worker,
        "ratio": round(mean[large]["total_us"] / mean[small]["total_us"], 3),
        "peak_mb": round(peak_kib() / 1024),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
