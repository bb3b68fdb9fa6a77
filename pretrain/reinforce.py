"""`pairstream pretrain reinforce SHARDS`: keep what teachers say of every sample beside it, for distillation.

The result are copies of the shards with one more file a sample and teacher (`data.stored`), of
2 * d * (views + captions) bytes and some 400 more: 5 KB for d = 512 with four views and one caption.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro

from data.faults import Fault, FaultLog, FaultRecord
from data.fetch import is_remote
from data.pictures import MAX_PIXELS
from data.samples import RawSample, index_shards, read_manifest, read_sample
from data.shards import MANIFEST, ShardFile, expand_shards, write_manifest
from data.stored import SUFFIX, Stored, settings_of
from data.tar import ShardIndex, ShardReader
from data.transforms import TrainTransform, decode_image
from pairstream.atomic import write_text
from pairstream.memory import keep_freed_memory
from pairstream.progress import ProgressBar
from pretrain.encoder import Encoder, load_encoder

SETTINGS = "reinforced.json"


@dataclass(frozen=True)
class Views:
    """Which augmentations of a picture are embedded.

    Attributes:
        transform: Of any size.
        count: Of each picture.
        seed: Of their random numbers.
    """

    transform: TrainTransform
    count: int
    seed: int

    def seeds(self, key: str) -> np.ndarray:
        """Of the views of a sample: the same wherever it lies."""
        start = np.random.SeedSequence([self.seed, zlib.crc32(key.encode())])
        return (start.generate_state(self.count, np.uint64) >> np.uint64(1)).astype(np.int64)

    def of(self, pixels: torch.Tensor, size: tuple[int, int], seeds: np.ndarray) -> torch.Tensor:
        """The views of a picture at one size, uint8 `(views, 3, h, w)`."""
        sized = replace(self.transform, size=size)
        return torch.stack([sized(pixels, np.random.default_rng(int(seed))) for seed in seeds])


class Row(NamedTuple):
    """One sample on its way: all its files, its captions, and its views for each picture size."""

    key: str
    files: dict[str, bytes]
    captions: list[str]
    seeds: np.ndarray
    views: dict[tuple[int, int], torch.Tensor]
    """uint8 `(views, 3, h, w)`"""


def reinforce(
    shards: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    *,
    teachers: tuple[str, ...],
    out: Path,
    views: int = 4,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    hflip: float = 0.0,
    color_jitter: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 4,
    max_faults: float = 0.01,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, int]:
    """Copy shards, with the embeddings of teachers beside every sample.

    A run that was interrupted goes on at the shard it was at. Samples that cannot be used are left out and counted.

    Args:
        shards: A folder, glob, braces or URL of shards; or several.
        teachers: NAME=MODEL each: the name that `loss.stored` will have, and a checkpoint, run folder or name as
            `loss.teachers` takes them. All see the same views.
        out: The folder of the copies; shards keep their names.
        views: Augmentations of each picture that are embedded; training draws one of them each epoch.
        crop_scale: As `data.crop_scale` of the recipe that will train, which is compared.
        hflip: As `data.hflip`.
        color_jitter: As `data.color_jitter`.
        seed: Of the views.
        batch_size: Pictures at a time, all views together.
        workers: Threads that decode.
        max_faults: Share of bad samples past which the work stops.
        device: A torch device, or `auto`.
        overwrite: Replace what an earlier call left in `out`.
        quiet: Show no progress.

    Returns:
        Samples written, and those left out, by this and earlier calls.

    Raises:
        ValueError: A bad teacher or name, no shards, two shards of one name, or other settings or shards than those
            that `out` was begun with.
    """
    names = read_teachers(teachers)
    if views < 1 or batch_size < 1 or workers < 1:
        raise ValueError(
            f"expected views, batch_size and workers of at least 1, got {views}, {batch_size}, {workers}"
        )
    sources = expand_shards(shards)
    targets = [Path(source).name for source in sources]
    if len(set(targets)) < len(targets):
        raise ValueError(
            f"two shards of one name in {', '.join(shards)}: give each folder an --out of its own"
        )
    if any(Path(source).resolve().parent == out.resolve() for source in sources):
        raise ValueError(f"--out {out} is where the shards lie: the copies need another folder")
    encoders = {name: load_encoder(model, device=device) for name, model in names.items()}
    if all(encoder.device.type == "cpu" for encoder in encoders.values()):
        keep_freed_memory()
    transform = TrainTransform((1, 1), scale=crop_scale, hflip=hflip, color_jitter=color_jitter)
    seen = Views(transform, views, seed)
    settings = {
        "teachers": {name: encoder.fingerprint for name, encoder in encoders.items()},
        "views": views,
        "settings": settings_of(transform).tolist(),
        "seed": seed,
    }
    out.mkdir(parents=True, exist_ok=True)
    begin(out, settings, dict(zip(targets, map(whereabouts, sources), strict=True)), overwrite)
    done = read_manifest(out / MANIFEST)
    log = FaultLog(max_faults)
    with ProgressBar("reinforce", len(sources), show=not quiet) as bar, ThreadPoolExecutor(workers) as pool:
        for source, target in zip(sources, targets, strict=True):
            if target in done:  # what an earlier call left out counts for the budget as well
                lost = done[target].get("left_out", {})
                faults = [FaultRecord(cause, source, "", "", number) for cause, number in lost.items()]
                log.add(faults, done[target]["samples"] + sum(lost.values()))
            else:
                before = log.counts.copy()
                index = index_shards([source])[0]
                entry = copy_shard(index, out / target, encoders, seen, batch_size, pool, log)
                done[target] = {**entry, "left_out": dict(log.counts - before)}
                write_manifest(out, done)
            log.judge()
            bar.advance()
    log.judge(final=True)
    log.summarise("reinforce")
    told = {"samples": sum(entry["samples"] for entry in done.values()), "left_out": log.counts.total()}
    print(
        f"{told['samples']} samples with {', '.join(names)} in {out}; train with loss.stored: [{', '.join(names)}]"
    )
    return told


def read_teachers(words: Sequence[str]) -> dict[str, str]:
    """`NAME=MODEL` each.

    Raises:
        ValueError: Another form, or a name twice.
    """
    found = {}
    for word in words:
        name, equals, model = word.partition("=")
        if not (equals and model and name.isidentifier() and name == name.lower()) or name in found:
            raise ValueError(
                f"--teachers {word!r}: expected NAME=MODEL, each name once, of small letters, digits and _, such as "
                "large=runs/teacher"
            )
        found[name] = model
    if not found:
        raise ValueError("--teachers: expected at least one NAME=MODEL")
    return found


def whereabouts(shard: str) -> str:
    """A shard's URL, or its path from the root."""
    return shard if is_remote(shard) else str(Path(shard).resolve())


def begin(out: Path, settings: dict[str, Any], shards: dict[str, str], overwrite: bool) -> None:
    """Note the settings of a folder, or compare them with those that it was begun with.

    Args:
        out: The folder.
        settings: What decides the embeddings.
        shards: Which shard each copy is of, by the copy's name.
        overwrite: Begin anew.

    Raises:
        ValueError: They differ, or the folder holds other shards.
    """
    path = out / SETTINGS
    if overwrite:
        for old in (*out.glob("*.tar"), out / MANIFEST, path):
            old.unlink(missing_ok=True)
    if not path.exists() and any(out.glob("*.tar")):
        raise ValueError(f"{out} holds other shards: choose another --out, or replace them with --overwrite")
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    known = before.pop("shards", {}) if path.exists() else {}
    if before != settings:
        raise ValueError(
            f"{out} was begun with other teachers, views or augmentation ({path.name}): go on with those, choose "
            "another --out, or begin anew with --overwrite"
        )
    for name, shard in shards.items():
        if known.get(name, shard) != shard:
            raise ValueError(
                f"{name} in {out} is the copy of {known[name]}, not of {shard}: give each folder of shards an --out of "
                "its own, or begin anew with --overwrite"
            )
    write_text(path, json.dumps({**settings, "shards": {**known, **shards}}, indent=1) + "\n")


def copy_shard(
    index: ShardIndex,
    target: Path,
    encoders: dict[str, Encoder],
    views: Views,
    batch_size: int,
    pool: ThreadPoolExecutor,
    log: FaultLog,
) -> dict[str, Any]:
    """Write one shard with the teachers' members; returns its entry in the manifest."""
    sizes = {encoder.image_size for encoder in encoders.values()}
    shard = ShardFile(target)
    log.add(index.faults, sum(fault.count for fault in index.faults))
    try:
        with ShardReader() as reader:
            count = max(1, batch_size // views.count)
            for start in range(0, len(index), count):
                part = range(start, min(start + count, len(index)))
                rows = read_rows(index, part, reader, views, sizes, pool, log)
                for name, encoder in encoders.items():
                    for row, stored in zip(rows, embed(rows, encoder, views), strict=True):
                        row.files[f"{name}.{SUFFIX}"] = stored.pack()
                for row in rows:
                    shard.write(row.key, row.files)
    except BaseException:
        shard.abandon()
        raise
    return shard.finish()


def read_rows(
    index: ShardIndex,
    samples: range,
    reader: ShardReader,
    views: Views,
    sizes: set[tuple[int, int]],
    pool: ThreadPoolExecutor,
    log: FaultLog,
) -> list[Row]:
    """The usable ones of some samples of a shard; the others are counted."""

    def load(files: dict[str, bytes], raw: RawSample) -> Row:
        captions, seeds = raw.captions(), views.seeds(raw.key)
        if not captions:
            raise Fault("missing_caption", "no caption in KEY.json and no text in KEY.txt")
        pixels = decode_image(raw.image, max_pixels=MAX_PIXELS)
        return Row(raw.key, files, captions, seeds, {size: views.of(pixels, size, seeds) for size in sizes})

    waiting, rows, faults = [], [], []

    def attempt(sample: int, work: Any) -> Any:
        try:
            return work()
        except Fault as fault:
            faults.append(FaultRecord(fault.cause, index.name, index.key(sample), fault.detail))
            return None

    for sample in samples:
        members = index.members(sample)
        found = attempt(
            sample,
            lambda members=members, sample=sample: (
                {extension: reader.read(index, *place) for extension, place in members.items()},
                read_sample(index, sample, sample, reader),
            ),
        )
        if found:
            waiting.append((sample, pool.submit(load, *found)))
    for sample, future in waiting:
        row = attempt(sample, future.result)
        if row:
            rows.append(row)
    log.add(faults, len(samples))
    return rows


def embed(rows: list[Row], encoder: Encoder, views: Views) -> list[Stored]:
    """What one teacher says of some samples."""
    if not rows:
        return []
    counts = [len(row.captions) for row in rows]
    images = encoder.encode_images(torch.cat([row.views[encoder.image_size] for row in rows]))
    texts = encoder.encode_texts([caption for row in rows for caption in row.captions])
    scale = float(encoder.model.logit_scale.detach().exp())
    return [
        Stored(
            own.cpu().numpy(),
            said.cpu().numpy(),
            scale,
            int(encoder.fingerprint, 16) >> 1,
            row.seeds,
            settings_of(views.transform),
        )
        for row, own, said in zip(rows, images.split(views.count), texts.split(counts), strict=True)
    ]


def main(argv: list[str]) -> int:
    """Read the command line of `pairstream pretrain reinforce`."""
    if not argv:
        argv = ["--help"]
    tyro.cli(reinforce, args=argv, prog="pairstream pretrain reinforce")
    return 0
