"""The job behind `pairstream retrieval embed`: its plan, its share for each process, its end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.faults import FaultLog, FaultRecord
from pairstream import __version__
from pairstream.atomic import TEMPORARY, write_text
from pairstream.progress import ProgressBar
from pretrain.encoder import Encoder
from retrieval.artifact import MANIFEST, refuse_to_replace
from retrieval.embed import nothing_usable, plan_takes
from retrieval.parts import (
    DTYPES,
    KIND,
    PartRows,
    part_folder,
    part_is_done,
    write_part,
    write_set,
)
from retrieval.shard_rows import RowBatch, Take, embed_batches

JOB = "job.json"


@dataclass(frozen=True)
class EmbedJob:
    """All that decides the bytes of the result.

    Attributes:
        model: Name of the encoder, for people.
        fingerprint: Hash of its weights and configuration.
        dim: Width of the rows.
        dtype: `float16` or `float32`.
        batch_size: Pictures at a time; matrix products round differently for other sizes.
        data: The specification of the set.
        limit: Samples asked for, or None.
        shards: Name, bytes and wanted samples of each shard.
        version: PairStream's version.
    """

    model: str
    fingerprint: str
    dim: int
    dtype: str
    batch_size: int
    data: list[str]
    limit: int | None
    shards: list[dict[str, Any]]
    version: str = __version__

    def takes(self, numbers: Iterable[int]) -> list[Take]:
        return [Take(self.shards[number]["name"], self.shards[number]["take"]) for number in numbers]


def plan_job(
    encoder: Encoder,
    shards: str | Iterable[str],
    *,
    dtype: str = "float16",
    batch_size: int = 64,
    limit: int | None = None,
) -> EmbedJob:
    """Decide what is to be done; opens no shard unless there is a limit.

    Raises:
        ValueError: An unknown dtype, no shards, a limit or batch size below 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 picture, got {batch_size}")
    shards = [shards] if isinstance(shards, str) else list(shards)
    planned = [
        {
            "name": take.name,
            "bytes": None if "://" in take.name else Path(take.name).stat().st_size,
            "take": take.samples,
        }
        for take in plan_takes(shards, limit)
    ]
    return EmbedJob(
        encoder.name, encoder.fingerprint, encoder.embed_dim, dtype, batch_size, shards, limit, planned
    )


def start_job(folder: str | Path, job: EmbedJob, *, overwrite: bool = False) -> bool:
    """Claim the folder for a job, or find that it is the one already begun there.

    Every process of a job calls this.

    Returns:
        Whether anything is left to do.

    Raises:
        FileExistsError: The folder holds something else, or finished embeddings of another job.
        ValueError: It holds an unfinished job that differs from this one.
    """
    path, wanted = Path(folder), asdict(job)
    content = json.dumps(wanted, indent=1, ensure_ascii=False) + "\n"
    begun, finished = (path / JOB).is_file(), (path / MANIFEST).is_file()
    aside_only = path.is_dir() and all(each.name.startswith(TEMPORARY) for each in path.iterdir())
    if not begun and not aside_only:
        refuse_to_replace(path, KIND, overwrite=overwrite)
    if overwrite and (begun or finished):
        shutil.rmtree(path)
        begun = False
    if not begun:
        write_text(path / JOB, content)
        return True
    found = json.loads((path / JOB).read_text(encoding="utf-8"))
    for name in sorted({*found, *wanted} - {"model"}):  # a model's name may change, its fingerprint not
        if found.get(name) != wanted.get(name):
            how = f"another {name}: {shown(found.get(name))}, now {shown(wanted.get(name))}"
            if finished:
                raise FileExistsError(
                    f"{path} already holds {KIND} made with {how}. Choose another --out, or replace them with "
                    "--overwrite"
                )
            raise ValueError(
                f"{path} holds an unfinished job with {how}. Go on with the old arguments, choose another "
                "--out, or start over with --overwrite"
            )
    return not finished


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def make_parts(
    folder: str | Path,
    job: EmbedJob,
    encoder: Encoder,
    numbers: Sequence[int],
    *,
    workers: int = 0,
    max_faults: float = 0.01,
    show: bool = False,
) -> int:
    """Make those of some parts that are not there yet.

    Args:
        folder: What `start_job` claimed.
        job: The job.
        encoder: Its model.
        numbers: Parts that are this process's share.
        workers: Loader processes.
        max_faults: Share of bad samples past which it stops.
        show: Show progress.

    Returns:
        Parts made now.

    Raises:
        ValueError: Another model than the job's, too many faults, an embedding that is not finite.
    """
    if encoder.fingerprint != job.fingerprint:
        raise ValueError(
            f"the job embeds with {job.model} (fingerprint {job.fingerprint}), this process has {encoder.name} "
            f"({encoder.fingerprint}): the weights must be the same everywhere"
        )
    missing = [number for number in numbers if not part_is_done(folder, number)]
    for number in missing:  # what a killed process left aside
        for rest in part_folder(folder, number).parent.glob(f"{TEMPORARY}{number:05d}-*"):
            shutil.rmtree(rest, ignore_errors=True)
    log, rows = FaultLog(max_faults), 0
    collected: list[RowBatch] = []
    with ProgressBar("embed", len(numbers), start=len(numbers) - len(missing), show=show) as bar:
        for batch in embed_batches(encoder, job.takes(missing), batch_size=job.batch_size, workers=workers):
            log.add(batch.faults, batch.seen)
            log.judge()
            collected.append(batch)
            if batch.ends:
                number = missing[batch.shard]
                content = join(collected)
                name = job.shards[number]["name"]
                write_part(folder, number, content, dtype=job.dtype, size=batch.size, shard=name)
                rows += len(content.images)
                collected = []
                bar.advance(note=f"{rows} pictures")
    return len(missing)


def join(batches: Sequence[RowBatch]) -> PartRows:
    """All batches of one shard as a part."""
    text_records, before = [], 0
    for batch in batches:
        text_records += [
            {"text": text, "key": batch.records[owner]["key"], "image": owner + before}
            for text, owner in zip(batch.captions, batch.image_of_text.tolist(), strict=True)
        ]
        before += len(batch.records)
    return PartRows(
        torch.cat([batch.images for batch in batches]).numpy(),
        torch.cat([batch.texts for batch in batches]).numpy(),
        [record for batch in batches for record in batch.records],
        text_records,
        [asdict(fault) for batch in batches for fault in batch.faults],
    )


def finish_job(folder: str | Path, job: EmbedJob, *, max_faults: float = 0.01) -> dict[str, Any] | None:
    """Write the manifest if all parts are there; every process calls this when its share is done.

    The last one finds all parts. Two that come together write the same bytes.

    Returns:
        The manifest; None when other processes have still parts to make.

    Raises:
        ValueError: No usable sample in the whole set, or too many faults.
    """
    path, count = Path(folder), len(job.shards)
    if not all(part_is_done(path, number) for number in range(count)):
        return None
    log, samples, images = FaultLog(max_faults), 0, 0
    faults = []
    for number in range(count):
        part = json.loads((part_folder(path, number) / MANIFEST).read_text(encoding="utf-8"))
        with (part_folder(path, number) / "failed.jsonl").open(encoding="utf-8") as file:
            found = [FaultRecord(**json.loads(line)) for line in file]
        images += part["images"]
        samples += part["images"] + sum(fault.count for fault in found)
        faults += found
    log.add(faults, samples)
    if not images:
        raise ValueError(nothing_usable(job.data, job.limit, faults))
    log.judge(final=True)
    content = {name: getattr(job, name) for name in ("model", "fingerprint", "dim", "dtype")}
    try:
        manifest = write_set(path, {**content, "shards": job.data}, count=count)
    except FileNotFoundError:  # another process has just finished and tidied up
        if not (path / MANIFEST).is_file():
            raise
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    for rest in path.glob(f"{TEMPORARY}*"):
        rest.unlink(missing_ok=True)
    return manifest


@dataclass(frozen=True)
class Launch:
    """Which process of how many this is, as torchrun and accelerate launch say in the environment."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Launch:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; a process on its own has none of them.

        Raises:
            ValueError: They contradict each other.
        """
        rank, world, local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if not 0 <= rank < world:
            raise ValueError(
                f"expected 0 <= RANK < WORLD_SIZE in the environment, got RANK={rank}, WORLD_SIZE={world}"
            )
        return cls(rank, world, local)

    def share(self, count: int) -> range:
        """This process's parts of `count`: every `world_size`-th."""
        return range(self.rank, count, self.world_size)

    def device(self, device: str) -> str:
        """`auto` means this process's own GPU where there are some."""
        if device == "auto" and self.world_size > 1 and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return device
