"""`pairstream data doctor`: every sample of a set that training would stumble over, by name."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from data.check import dump, each_shard, find_jobs, open_shard, require_limits
from data.faults import Fault, FaultRecord
from data.pictures import MAX_PIXELS, open_picture
from pairstream.atomic import check_file_place, write_text

MAX_BYTES = 20_000_000
SHOWN = 20  # samples that the text names of each cause


@dataclass
class Examined:
    """What one shard has wrong; `keys` are 64-bit digests of its keys, uint64 (samples,)."""

    name: str
    samples: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    problems: list[FaultRecord] = field(default_factory=list)


def doctor(
    shards: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")],
    /,
    json: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="[FILE]")] = None,
    decode: bool = True,
    workers: int = 1,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> int:
    """Find damaged, duplicate-keyed, oversized and empty samples over a whole set, and name each one.

    `data check` says what a set holds on the whole; this is the list to mend or drop.

    Args:
        shards: Folders, tar files, globs, braces such as train-{00000..00041}.tar, URLs, or pipe:COMMAND.
        json: Print the findings as JSON, or write them to this file.
        decode: Decode every picture; --no-decode reads their headers only: much faster, but cut files pass.
        workers: Processes, each of which takes whole shards.
        max_pixels: Pictures with more are oversized, as in training.
        max_bytes: Pictures whose file has more are oversized.

    Returns:
        0 when nothing was found, 1 otherwise.
    """
    if json is not None and len(json) > 1:
        raise ValueError(f"--json takes one file, got {', '.join(map(str, json))}: put SHARDS before it")
    if json:
        check_file_place(json[0], "--json")
    findings = examine(
        shards, decode=decode, workers=workers, max_pixels=max_pixels, max_bytes=max_bytes, progress=True
    )
    dumped = dump(findings)
    if json:
        write_text(json[0], dumped)
    print(dumped if json == () else as_text(findings))
    return 1 if findings["problems"] else 0


def examine(
    shards: str | Path | Iterable[str | Path],
    *,
    decode: bool = True,
    workers: int = 1,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    progress: bool = False,
) -> dict[str, Any]:
    """The findings of `pairstream data doctor` as plain data.

    Args:
        shards: What `data.shards.expand_shards` takes.
        decode: Decode every picture rather than its header only.
        workers: Processes.
        max_pixels: Pictures with more are oversized.
        max_bytes: Picture files with more are oversized.
        progress: Show a bar.

    Returns:
        `shards`, `samples`, `sound` (samples without a problem), `causes` (cause -> samples) and `problems`: one
        object each with `cause`, `shard`, `key` (empty for a shard as a whole), `detail` and `count`.

    Raises:
        ValueError: No shards, or a limit out of range.
    """
    require_limits(workers=workers, max_pixels=max_pixels, max_bytes=max_bytes)
    jobs = [(name, (entry or {}).get("samples")) for name, _, entry in find_jobs(shards)]
    look = partial(examine_shard, decode=decode, max_pixels=max_pixels, max_bytes=max_bytes)
    found: list[Examined] = list(each_shard("doctor", look, jobs, workers, progress))
    problems = [problem for shard in found for problem in shard.problems]
    problems += repeated_keys(found)
    causes: Counter[str] = Counter()
    for problem in problems:
        causes[problem.cause] += problem.count
    samples = sum(shard.samples for shard in found)
    bad = {(problem.shard, problem.key) for problem in problems if problem.key}
    return {
        "shards": len(found),
        "samples": samples,
        "sound": samples - len(bad),
        "causes": dict(causes.most_common()),
        "problems": [asdict(problem) for problem in problems],
    }


def examine_shard(
    name: str, expected: int | None, *, decode: bool, max_pixels: int, max_bytes: int
) -> Examined:
    """Look at every sample of one shard."""
    from data.samples import read_sample
    from data.tar import ShardReader

    index = open_shard(name, expected)
    if isinstance(index, FaultRecord):
        return Examined(name, problems=[index])
    shard = Examined(name, len(index), digests(index.keys), list(index.faults))
    if not len(index) and not index.faults:
        detail = "holds no sample: no file in it has a name such as KEY.jpg"
        shard.problems.append(FaultRecord("empty_shard", name, "", detail))
    with ShardReader() as reader:
        for sample in range(len(index)):
            try:
                raw = read_sample(index, sample, sample, reader)
                captions = raw.captions()
                if not raw.image:
                    raise Fault("empty_image", f"KEY.{raw.extension} has 0 bytes")
                if len(raw.image) > max_bytes:
                    raise Fault("oversized_image", f"{len(raw.image):,} bytes, more than {max_bytes:,}")
                open_picture(raw.image, max_pixels=max_pixels)
                if decode:
                    from data.transforms import decode_image

                    decode_image(raw.image, max_pixels=max_pixels)
                if not captions and not raw.record.get("questions"):  # a set of questions needs no captions
                    raise Fault("empty_caption", "no caption in KEY.json and no text in KEY.txt")
            except Fault as fault:
                cause = "oversized_image" if fault.cause == "too_large_image" else fault.cause
                shard.problems.append(FaultRecord(cause, name, index.key(sample), fault.detail))
    return shard


def digests(keys: np.ndarray) -> np.ndarray:
    """64 bits of each key; equal for two different ones with a chance of 3 in a million at ten million samples."""
    found = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys.tolist())
    return np.frombuffer(found, dtype=np.uint64)


def repeated_keys(found: list[Examined]) -> list[FaultRecord]:
    """Samples whose key an earlier shard has as well."""
    values = np.concatenate([shard.keys for shard in found])
    _, first = np.unique(values, return_index=True)
    again = np.setdiff1d(np.arange(len(values)), first)
    if not len(again):
        return []
    original = {int(values[place]): place for place in first[np.isin(values[first], values[again])].tolist()}
    bases = np.cumsum([0, *(shard.samples for shard in found)])

    def at(place: int) -> tuple[int, int]:
        shard = int(np.searchsorted(bases, place, side="right")) - 1
        return shard, place - int(bases[shard])

    problems = []
    names: dict[int, Any] = {}
    for place in again.tolist():
        shard, sample = at(place)
        if shard not in names:
            names = {shard: open_shard(found[shard].name, None)}  # one at a time: they come in order
        other = found[at(original[int(values[place])])[0]].name
        detail = f"the same key is in {other}"
        index = names[shard]
        key = "" if isinstance(index, FaultRecord) else index.key(sample)
        problems.append(FaultRecord("duplicate_key", found[shard].name, key, detail))
    return problems


def as_text(findings: dict[str, Any]) -> str:
    """The findings for people."""
    lines = [
        f"shards   {findings['shards']:,}",
        f"samples  {findings['samples']:,}, {findings['sound']:,} of them sound",
    ]
    if not findings["problems"]:
        return "\n".join([*lines, "nothing found"])
    for cause, count in findings["causes"].items():
        lines.append(f"{cause}: {count:,}")
        named = [FaultRecord(**problem) for problem in findings["problems"] if problem["cause"] == cause]
        lines += [f"  {problem}" for problem in named[:SHOWN]]
        if len(named) > SHOWN:
            lines.append(f"  ... and {len(named) - SHOWN:,} more; --json has them all")
    return "\n".join(lines)
