"""`pairstream retrieval eval | compare | classify | suite | embed | index | update | search | export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from retrieval.artifact import write_json
from retrieval.commands import classify, compare, suite
from retrieval.index_commands import export, index, search, update


def eval_(
    *,
    model: str,
    data: tuple[str, ...],
    pretrained: str | None = None,
    json: Path | None = None,
    out: Path | None = None,
    run: Path | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    workers: int = 0,
    max_faults: float = 0.01,
    folds: int | None = None,
    device: str = "auto",
) -> None:
    """Measure zero-shot retrieval in both directions, beside chance.

    Args:
        model: A checkpoint or run folder, a name open_clip knows, or hf-hub:ORG/REPO.
        data: Shards: folders, files, globs, braces or URLs.
        pretrained: open_clip's tag of weights, for a name.
        json: Also write the numbers to this file, and the places of all queries to NAME.queries.safetensors
            beside it, for `retrieval compare`.
        out: Also write metrics.json, report.json and report.html into this folder.
        run: A pretraining run folder whose curves the report shows.
        batch_size: Pictures at a time.
        limit: Only the first so many samples; recall over fewer is higher.
        workers: Loader processes; 0 decodes in this one.
        max_faults: Share of bad samples past which the work stops.
        folds: Also the mean over so many consecutive parts (5 of 1,000 pictures for COCO-1k).
        device: auto, cpu, cuda or cuda:N.
    """
    if out is not None and (out / "log.jsonl").exists():
        raise FileExistsError(
            f"{out} holds a training run, whose report would be lost: give --out another folder, such as "
            f"{out / 'retrieval'}, and --run {out} to show its curves"
        )
    if run is not None and out is None:
        raise ValueError("--run adds a training run's curves to the report: give --out for the report, too")
    from pretrain.encoder import load_encoder
    from retrieval.evaluate import evaluate, interval_rows, result_rows

    encoder = load_encoder(model, pretrained=pretrained, device=device)
    result = evaluate(
        encoder,
        data,
        batch_size=batch_size,
        limit=limit,
        workers=workers,
        max_faults=max_faults,
        folds=folds,
        show=True,
    )
    metrics = result.metrics
    header, rows = result_rows(metrics)
    table = Table(
        title=f"{metrics['model']}: {metrics['images']:,} pictures, {metrics['texts']:,} texts",
        title_justify="left",
    )
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="dim" if row[0].startswith(" ") else "")
    Console().print(table)
    for direction, *intervals in interval_rows(metrics):
        print(f"{metrics['intervals']['level']:.0%} intervals, {direction}: " + "  ".join(intervals))
    if metrics["faults"]:
        print("left out: " + ", ".join(f"{count} {cause}" for cause, count in metrics["faults"].items()))
    if json is not None:
        result.write_queries(json)
        write_json(json, metrics)
    if out is not None:
        from retrieval.page import evaluation_report

        report = evaluation_report(result, run=run)
        result.write_queries(out / "metrics.json")
        write_json(out / "metrics.json", metrics)
        print(f"report: {report.write(out)}")


def embed(
    *,
    model: str,
    data: tuple[str, ...],
    out: Path,
    pretrained: str | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 64,
    limit: int | None = None,
    workers: int = 0,
    max_faults: float = 0.01,
    overwrite: bool = False,
    device: str = "auto",
    ray: bool = False,
    ray_actors: int | None = None,
) -> None:
    """Embed shards: unit rows of all pictures and captions, one part a shard; run it again to go on where it stopped.

    Under `torchrun` or `accelerate launch` the processes share the shards.

    Args:
        model: A checkpoint or run folder, a name open_clip knows, or hf-hub:ORG/REPO.
        data: Shards: folders, files, globs, braces or URLs.
        out: The folder to write.
        pretrained: open_clip's tag of weights, for a name.
        dtype: Of the rows on disk.
        batch_size: Pictures at a time.
        limit: Only the first so many samples.
        workers: Loader processes.
        max_faults: Share of bad samples past which the work stops.
        overwrite: Replace embeddings that lie in --out.
        device: auto, cpu, cuda or cuda:N.
        ray: Work on a Ray cluster (RAY_ADDRESS, or this machine); --data, --model and --out must be seen by all.
        ray_actors: Processes on the cluster; one a GPU, or one for each two CPUs, when not given.
    """
    from pairstream.memory import keep_freed_memory
    from pretrain.encoder import load_encoder
    from retrieval.job import Launch, finish_job, make_parts, plan_job, start_job

    launch = Launch.from_environment()
    if launch.world_size > 1 and (overwrite or ray):
        raise ValueError(
            "several processes were launched: remove the folder instead of --overwrite, and give --ray to one process"
        )
    encoder = load_encoder(model, pretrained=pretrained, device=launch.device(device))
    if encoder.device.type == "cpu":
        keep_freed_memory()
    job = plan_job(encoder, data, dtype=dtype, batch_size=batch_size, limit=limit)
    count = len(job.shards)
    if not start_job(out, job, overwrite=overwrite):
        print(f"{out} is complete: nothing to do")
        return
    if ray:
        from retrieval.on_ray import make_parts_on_ray

        make_parts_on_ray(
            out,
            job,
            model,
            pretrained=pretrained,
            device=device,
            workers=workers,
            max_faults=max_faults,
            actors=ray_actors,
        )
    else:
        make_parts(
            out,
            job,
            encoder,
            launch.share(count),
            workers=workers,
            max_faults=max_faults,
            show=launch.rank == 0,
        )
    manifest = finish_job(out, job, max_faults=max_faults)
    if manifest is not None:
        left = sum(manifest["faults"].values())
        print(
            f"{manifest['images']:,} pictures and {manifest['texts']:,} texts, {job.dim} wide, "
            f"in {count:,} parts: {out}"
            + (f"; {left:,} samples failed, listed in {out / 'failed.jsonl'}" if left else "")
        )


COMMANDS: dict[str, Any] = {
    "eval": eval_,
    "compare": compare,
    "classify": classify,
    "suite": suite,
    "embed": embed,
    "index": index,
    "update": update,
    "search": search,
    "export": export,
}


def main(argv: list[str]) -> int | None:
    """Entry point of `pairstream retrieval`."""
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=argv,
        prog="pairstream retrieval",
        description="Embed, index and search pictures and texts, and measure their alignment.",
    )
