"""The shard index: samples per CPU-second while it is made, and what a start on many shards costs with and without it.

Shards of 1,000 samples (`.jpg` of 2 KB, `.txt`, `.json`). `build` is the median of interleaved pairs of our scan and
webdataset-style reading of the same headers by Python's `tarfile`, whose members are checked to be the same. `start`
is `index_shards` on all shards, from their index files, each pair beside a start that scans. `resume` is
`load_state_dict` of a state in the middle of an epoch and its first batch (256 rows, read but not decoded), in a
stream that was made anew; the batch is checked to be the one that comes there without a stop.

    python benchmarks/shard_index.py             # 1,000 shards by links to a few; --shards N for fewer
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

from data.samples import index_shards
from data.shards import Sample, ShardWriter
from data.stream import PairStream
from data.tar import ShardIndex, scan_shard

SAMPLES = 1000
ROUNDS = 7


def write_set(folder: Path, shards: int) -> list[Path]:
    """One shard under many names, so that the disk holds it once."""
    with ShardWriter(folder / "one", samples_per_shard=SAMPLES) as writer:
        for n in range(SAMPLES):
            meta = {"url": f"https://host/{n}.jpg", "width": 256, "height": 256}
            writer.write(Sample(f"{n:09d}", os.urandom(2000), "jpg", ["a caption of a few words"], meta))
    (folder / "set").mkdir()
    paths = [folder / "set" / f"{number:05d}.tar" for number in range(shards)]
    for path in paths:
        path.hardlink_to(folder / "one" / "00000.tar")
    then = time.time() - 60  # a shard that was just written keeps no index
    os.utime(paths[0], (then, then))
    return paths


def timed(work) -> tuple[float, float, object]:
    """CPU seconds, wall seconds and result."""
    cpu, wall = time.process_time(), time.monotonic()
    result = work()
    return time.process_time() - cpu, time.monotonic() - wall, result


def by_tarfile(path: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(path) as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def members(index: ShardIndex) -> dict[str, tuple[int, int]]:
    return {
        f"{index.key(sample)}.{extension}": place
        for sample in range(len(index))
        for extension, place in index.members(sample).items()
    }


def load(sample, rng):
    return sample.key, len(sample.image)


def collate(rows):
    return {"rows": rows}


def resume(folder: Path) -> dict[str, float]:
    """What it costs to go on in the middle of an epoch, in seconds, and the size of the state in bytes."""

    def fresh() -> PairStream:
        return PairStream(str(folder), load, collate, batch_size=256)

    first = fresh()
    middle = first.batches_per_epoch // 2
    running = first.iterate(middle)
    next(running)
    state = first.state_dict()
    seen = next(running)
    loads, batches = [], []
    for _ in range(ROUNDS):
        stream = fresh()
        loads.append(timed(lambda stream=stream: stream.load_state_dict(state)))
        batches.append(timed(lambda stream=stream: next(iter(stream))))
        assert batches[-1][2].indices.tolist() == seen.indices.tolist()  # type: ignore[attr-defined]
    return {
        "load_state_ms": round(1e3 * statistics.median(row[0] for row in loads), 2),
        "first_batch_ms": round(1e3 * statistics.median(row[0] for row in batches), 2),
        "wall_ms": round(
            1e3 * statistics.median(a[1] + b[1] for a, b in zip(loads, batches, strict=True)), 2
        ),
        "state_bytes": len(json.dumps(state)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=1000)
    shards = parser.parse_args().shards
    with tempfile.TemporaryDirectory() as temporary:
        paths = write_set(Path(temporary), shards)
        assert members(scan_shard(paths[0])) == by_tarfile(paths[0]), "the scan differs from tarfile's"
        ours, theirs = [], []
        for number in range(ROUNDS):
            for which in ((scan_shard, ours), (by_tarfile, theirs))[:: 1 if number % 2 else -1]:
                which[1].append(timed(lambda work=which[0]: work(paths[0]))[0])
        cold = timed(lambda: index_shards(paths[0].parent))
        with mock.patch("data.index.scan_shard", side_effect=AssertionError("a start scanned a shard")):
            starts = [timed(lambda: index_shards(paths[0].parent)) for _ in range(ROUNDS)]
        counts = [sum(map(len, start[2])) for start in (cold, *starts)]  # pyright: ignore
        assert set(counts) == {shards * SAMPLES}
        resumed = resume(paths[0].parent)
    ratios = sorted(theirs_ / ours_ for ours_, theirs_ in zip(ours, theirs, strict=True))
    figures = {
        "shards": shards,
        "build_samples_per_cpu_s": round(SAMPLES / statistics.median(ours)),
        "build_over_tarfile": {
            "ratio": round(statistics.median(ratios), 2),
            "low": round(ratios[0], 2),
            "high": round(ratios[-1], 2),
        },
        "first_start_cpu_s": round(cold[0], 3),
        "start_cpu_s": round(statistics.median(start[0] for start in starts), 3),
        "start_wall_s": round(statistics.median(start[1] for start in starts), 3),
        "resume": resumed,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
