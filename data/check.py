"""`pairstream data check`: what a set of shards holds, and what is wrong with it."""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import tyro

from data.faults import EXAMPLES, Fault, FaultRecord
from data.pictures import MAX_PIXELS, open_picture
from pairstream.atomic import check_file_place, write_text

if TYPE_CHECKING:
    from data.tar import ShardIndex

PERCENTILES = {"min": 0, "median": 50, "p95": 95, "max": 100}


@dataclass
class ShardFindings:
    """What one shard holds; lists have one number per sample or caption."""

    name: str
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    keys: set[str] = field(default_factory=set)
    formats: Counter[str] = field(default_factory=Counter)
    json_keys: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)  # per sample
    words: list[int] = field(default_factory=list)  # per caption
    characters: list[int] = field(default_factory=list)  # per caption
    faults: list[FaultRecord] = field(default_factory=list)


def check(
    shards: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")],
    /,
    decode: bool = True,
    workers: int = 1,
    json: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Look at every sample of some shards: counts, statistics, and faults by cause.

    Args:
        shards: Folders, tar files, globs, braces such as train-{00000..00041}.tar, or http(s) URLs.
        decode: Decode every picture; --no-decode reads their headers only: much faster, but cut files pass.
        workers: Processes, each of which takes whole shards.
        json: Also write the findings to this file.
        max_pixels: Larger pictures are faults, as in training.

    Returns:
        0 when the set is sound, 1 when anything is damaged.
    """
    if json is not None:
        check_file_place(json, "--json")
    findings = check_shards(shards, decode=decode, workers=workers, max_pixels=max_pixels, progress=True)
    if json is not None:
        write_text(json, dump(findings))
    print(as_text(findings))
    return 1 if findings["faults"] else 0


def dump(findings: dict[str, Any]) -> str:
    """The findings as JSON; bytes of a name that are not UTF-8 stand as JSON escapes them."""
    text = json.dumps(findings, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_shards(
    shards: str | Path | Iterable[str | Path],
    *,
    decode: bool = True,
    workers: int = 1,
    max_pixels: int = MAX_PIXELS,
    progress: bool = False,
) -> dict[str, Any]:
    """The findings of `pairstream data check` as plain data.

    Args:
        shards: What `data.shards.expand_shards` takes.
        decode: Decode every picture rather than its header only.
        workers: Processes.
        max_pixels: Larger pictures are faults.
        progress: Show a bar.

    Returns:
        `shards`, `samples`, `usable`, `captions`, `bytes`, `formats`, `json_keys`, `repeated_keys`, `statistics`
        (each with min, median, mean, p95, max), `manifest` (whether one was compared), and `faults`: cause ->
        `{"samples": lost, "examples": [...]}`.

    Raises:
        ValueError: No shards, or a limit out of range.
    """
    from data.samples import read_manifest
    from data.shards import MANIFEST

    require_limits(workers=workers, max_pixels=max_pixels)
    jobs = find_jobs(shards)
    manifests = {folder: read_manifest(folder / MANIFEST) for folder in {path.parent for _, path, _ in jobs}}
    look = partial(check_shard, decode=decode, max_pixels=max_pixels)
    found: list[ShardFindings] = list(each_shard("check", look, jobs, workers, progress))
    faults = [fault for shard in found for fault in shard.faults]
    for folder, entries in manifests.items():
        faults += [
            FaultRecord("bad_shard", str(folder / name), "", "is in manifest.json but not in the folder",
                        int(entry.get("samples", 1)))
            for name, entry in entries.items()
            if not (folder / name).exists()
        ]  # fmt: skip
    return summarise(found, faults, compared=any(manifests.values()))


def require_limits(*, workers: int, **limits: int) -> None:
    """Refuse limits that no sample could keep.

    Raises:
        ValueError: One is below 1, or there are fewer than no workers.
    """
    for name, limit in limits.items():
        if limit < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {limit}")
    if workers < 0:
        raise ValueError(f"--workers is a number of processes, at least 0, got {workers}")


def find_jobs(shards: str | Path | Iterable[str | Path]) -> list[tuple[str, Path, dict[str, Any] | None]]:
    """The shards of a specification: name, where each lies or will lie, and what a manifest promises of each."""
    from data.fetch import ShardCache, cache_folder, is_remote, require_scheme
    from data.samples import read_manifest
    from data.shards import MANIFEST, expand_shards

    names = expand_shards(shards)
    for name in filter(is_remote, names):
        require_scheme(name)  # here, where it is one message and not a worker's end
    cache = ShardCache(cache_folder())
    paths = [cache.path(name) for name in names]
    manifests = {folder: read_manifest(folder / MANIFEST) for folder in {path.parent for path in paths}}
    return [
        (name, path, manifests[path.parent].get(path.name)) for name, path in zip(names, paths, strict=True)
    ]


def open_shard(name: str, expected: int | None) -> ShardIndex | FaultRecord:
    """The index of a shard, fetched first when it comes from elsewhere; a fault when it cannot be read.

    It is scanned, and no kept index believed: damage may be why one asks.
    """
    from data.fetch import local_shard
    from data.tar import scan_shard

    try:
        return scan_shard(local_shard(name), name, expected)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return FaultRecord("unreadable_shard", name, "", f"cannot be read: {error}", expected or 1)


def each_shard(what: str, look: Any, jobs: list[Any], workers: int, progress: bool) -> Iterator[Any]:
    """What `look` finds in each shard, in their order, with a bar."""
    from pairstream.progress import ProgressBar

    samples = 0
    with ProgressBar(what, len(jobs), show=progress) as bar:
        for shard in each_job(look, jobs, workers):
            samples += shard.samples
            bar.advance(note=f"{samples} samples")
            yield shard


def each_job(look: Any, jobs: list[Any], workers: int) -> Iterator[Any]:
    """The results of `look(*job)` in the order of the jobs, from so many processes of this machine."""
    if workers <= 1 or len(jobs) == 1:
        yield from (look(*job) for job in jobs)
        return
    import torch
    from torch.utils.data import DataLoader

    from data.loading import as_it_is, start_worker

    yield from DataLoader(
        cast(Any, _Looked(look, jobs)),
        batch_size=None,
        num_workers=min(workers, len(jobs)),
        collate_fn=as_it_is,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )


@dataclass(frozen=True)
class _Looked:
    """The findings of each shard, made when they are asked for."""

    look: Any
    jobs: list[Any]

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> Any:
        return self.look(*self.jobs[number])


def check_shard(
    name: str, path: Path, promised: dict[str, Any] | None, *, decode: bool, max_pixels: int
) -> ShardFindings:
    """Look at one shard, and compare it with its entry in the manifest."""
    from data.samples import read_sample
    from data.tar import ShardReader

    index = open_shard(name, (promised or {}).get("samples"))
    if isinstance(index, FaultRecord):
        return ShardFindings(name, faults=[index])
    shard = ShardFindings(name, samples=len(index), bytes=path.stat().st_size, faults=list(index.faults))
    if promised and not index.faults:
        shard.faults += compare(shard, path, promised)
    with ShardReader() as reader:
        for sample in range(len(index)):
            key = index.key(sample)
            shard.keys.add(key)
            try:
                raw = read_sample(index, sample, sample, reader)
                shard.json_keys.update(raw.record.keys())
                captions = raw.captions()
                look_at_picture(shard, raw.image, decode=decode, max_pixels=max_pixels)
                shard.captions.append(len(captions))
                shard.words += [len(caption.split()) for caption in captions]
                shard.characters += [len(caption) for caption in captions]
                if not captions and not raw.record.get("questions"):  # a set of questions needs no captions
                    raise Fault("missing_caption", "no caption in KEY.json and no text in KEY.txt")
            except Fault as fault:
                shard.faults.append(FaultRecord(fault.cause, name, key, fault.detail))
    return shard


def look_at_picture(shard: ShardFindings, image: bytes, *, decode: bool, max_pixels: int) -> None:
    """Note format and size of a picture, and decode it."""
    header = open_picture(image, max_pixels=max_pixels)
    if decode:
        from data.transforms import decode_image

        decode_image(image, max_pixels=max_pixels)
    shard.formats[(header.format or "unknown").lower()] += 1
    shard.widths.append(header.width)
    shard.heights.append(header.height)


def compare(shard: ShardFindings, path: Path, promised: dict[str, Any]) -> list[FaultRecord]:
    """Faults of a shard that differs from its manifest entry."""
    for what, is_ in (("samples", shard.samples), ("bytes", shard.bytes)):
        if what in promised and promised[what] != is_:
            detail = f"has {is_} {what}, the manifest promises {promised[what]}"
            return [FaultRecord("manifest_mismatch", shard.name, "", detail)]
    if "sha256" in promised:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        shard.sha256 = digest.hexdigest()
        if shard.sha256 != promised["sha256"]:
            detail = f"has sha256 {shard.sha256[:12]}..., the manifest promises {promised['sha256'][:12]}..."
            return [FaultRecord("manifest_mismatch", shard.name, "", detail)]
    return []


def summarise(found: list[ShardFindings], faults: list[FaultRecord], *, compared: bool) -> dict[str, Any]:
    """One account of all shards."""
    keys = Counter(key for shard in found for key in shard.keys)
    causes: dict[str, dict[str, Any]] = {}
    for fault in faults:
        cause = causes.setdefault(fault.cause, {"samples": 0, "examples": []})
        cause["samples"] += fault.count
        if len(cause["examples"]) < EXAMPLES:
            cause["examples"].append(str(fault))
    samples = sum(shard.samples for shard in found)
    broken = {(fault.shard, fault.key) for fault in faults if fault.key and fault.cause != "duplicate_key"}
    columns = {
        "width": "widths",
        "height": "heights",
        "captions per picture": "captions",
        "words per caption": "words",
        "characters per caption": "characters",
    }
    return {
        "shards": len(found),
        "samples": samples,
        "usable": samples - len(broken),
        "captions": sum(sum(shard.captions) for shard in found),
        "bytes": sum(shard.bytes for shard in found),
        "formats": dict(sum((shard.formats for shard in found), Counter()).most_common()),
        "json_keys": dict(sum((shard.json_keys for shard in found), Counter()).most_common()),
        "repeated_keys": sum(count > 1 for count in keys.values()),
        "statistics": {
            name: statistics([number for shard in found for number in getattr(shard, column)])
            for name, column in columns.items()
        },
        "manifest": compared,
        "faults": dict(sorted(causes.items(), key=lambda item: -item[1]["samples"])),
    }


def statistics(numbers: list[int]) -> dict[str, float] | None:
    """Percentiles and mean; None of nothing."""
    if not numbers:
        return None
    values = np.percentile(numbers, list(PERCENTILES.values()))
    found = {name: round(float(value), 2) for name, value in zip(PERCENTILES, values, strict=True)}
    return {**found, "mean": round(float(np.mean(numbers)), 2)}


def as_text(findings: dict[str, Any]) -> str:
    """The findings as a table for people."""
    usable = "" if findings["usable"] == findings["samples"] else f" ({findings['usable']:,} usable)"
    formats = ", ".join(f"{name} {count:,}" for name, count in findings["formats"].items())
    lines = [
        f"shards     {findings['shards']:,}, {findings['bytes'] / 1e6:,.1f} MB"
        + (", compared with manifest.json" if findings["manifest"] else ""),
        f"samples    {findings['samples']:,}{usable}",
        f"captions   {findings['captions']:,}",
        f"pictures   {formats or 'none'}",
        f"JSON keys  {', '.join(findings['json_keys']) or 'none'}",
    ]
    if findings["repeated_keys"]:
        lines.append(f"keys       {findings['repeated_keys']:,} occur in more than one shard (allowed)")
    columns = ["min", "median", "mean", "p95", "max"]
    lines += ["", " " * 24 + "".join(f"{column:>10}" for column in columns)]
    for name, row in findings["statistics"].items():
        if row is not None:
            lines.append(f"{name:<24}" + "".join(f"{row[column]:>10,.10g}" for column in columns))
    lines.append("")
    if not findings["faults"]:
        return "\n".join([*lines, "no faults"])
    lines.append("faults, in samples")
    for cause, entry in findings["faults"].items():
        lines.append(f"  {cause:<22}{entry['samples']:>8,}")
        lines += [f"      {example}" for example in entry["examples"]]
    return "\n".join(lines)
