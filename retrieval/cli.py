"""`pairstream retrieval eval | compare | classify | suite | embed | index | update | search | export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from pairstream.atomic import write_text
from pairstream.run import finite
from retrieval.commands import classify, compare, suite


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
    from pretrain.encoder import load_encoder
    from retrieval.job import Launch, finish_job, make_parts, plan_job, start_job

    launch = Launch.from_environment()
    if launch.world_size > 1 and (overwrite or ray):
        raise ValueError(
            "several processes were launched: remove the folder instead of --overwrite, and give --ray to one process"
        )
    encoder = load_encoder(model, pretrained=pretrained, device=launch.device(device))
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


def index(
    *,
    embeddings: Path,
    out: Path,
    recall: float = 0.95,
    k: int = 10,
    memory_gb: float | None = None,
    minutes: float = 30.0,
    kind: Literal["auto", "flat", "hnsw", "ivf", "ivf_fp16", "ivf_sq8", "ivf_pq"] = "auto",
    sides: tuple[Literal["images", "texts"], ...] = ("images", "texts"),
    queries: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Choose and build the FAISS index of some embeddings, and measure it with queries of the other side.

    Args:
        embeddings: A folder that `retrieval embed` wrote.
        out: The folder to write.
        recall: Wanted recall@k against exact search.
        k: Results a query that recall is measured with.
        memory_gb: What each side may take in memory, 10^9 bytes; no limit when not given.
        minutes: Time for each side.
        kind: Take no other kind of index; auto chooses.
        sides: What to index.
        queries: Embeddings of the same model to tune and measure with, such as held-out ones; --embeddings' own
            when not given.
        overwrite: Replace an index that lies in --out.
    """
    from retrieval.artifact import refuse_to_replace
    from retrieval.build import Options, build_index
    from retrieval.index import KIND

    refuse_to_replace(out, KIND, overwrite=overwrite)
    memory = None if memory_gb is None else int(1e9 * memory_gb)
    options = Options(recall=recall, k=k, memory=memory, seconds=60 * minutes, kind=kind)
    built = build_index(embeddings, out, options=options, sides=sides, queries=queries, show=True)
    for name in sides:
        segment = built.side(name).segments[0]
        print(report_line(name, len(segment), segment.report))
    print(f"index: {out}")


def report_line(name: str, rows: int, report: dict[str, Any]) -> str:
    """What an index is and does, in one line."""
    line = f"{rows:,} {name}: {report['factory']}, {report['bytes_per_vector']:,.0f} bytes a row"
    if "recall" not in report:
        return f"{line}; not measured: too few {report['query_kind']} to ask with"
    return (
        f"{line}; recall@{report['k']} {report['recall']:.4f} against exact search with {report['queries']:,} "
        f"{report['query_kind']} as queries, {report['cpu_ms']:.3f} CPU ms a query ({report['cpu_ms_single']:.3f} one "
        f"at a time, exact {report['exact_cpu_ms']:.3f}); built in {report['build_s']:,.1f} s"
    )


def update(
    *,
    index: Path,
    add: Path | None = None,
    delete: Path | None = None,
    merge: Path | None = None,
    compact: bool = False,
) -> None:
    """Change an index: add embeddings, delete keys, merge another index, or rebuild it as one piece.

    Args:
        index: The index; its new version takes its place.
        add: A folder of embeddings of the same model.
        delete: A file with one key a line.
        merge: Another index of the same model.
        compact: Rebuild it without what was deleted.
    """
    from retrieval import update as change

    if sum([add is not None, delete is not None, merge is not None, compact]) != 1:
        raise ValueError("give one of --add, --delete, --merge and --compact")
    if add is not None:
        found = change.add_to_index(index, add)
    elif delete is not None:
        found = change.delete_from_index(index, lines_of(delete))
    elif merge is not None:
        found = change.merge_indexes(index, merge)
    else:
        found = change.compact_index(index)
    for name in ("images", "texts"):
        side = getattr(found, name)
        if side is not None:
            print(f"{side.alive:,} {name} in {len(side.segments)} segments")
    if note := change.advice(found):
        print(note)


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line]


def export(
    *,
    index: Path,
    qdrant: str,
    collection: str,
    side: Literal["images", "texts"] = "images",
) -> None:
    """Write one side of an index into a new Qdrant collection.

    Args:
        index: A folder that `retrieval index` wrote.
        qdrant: The server's URL, or a folder for Qdrant's local mode.
        collection: Its name.
        side: What to export.
    """
    from retrieval.index import Index
    from retrieval.to_qdrant import connect, export_to_qdrant

    loaded = Index.load(index)
    client = connect(qdrant)
    try:
        written = export_to_qdrant(loaded, client, collection, side=side)
    finally:
        client.close()
    print(f"{written:,} {side} in the collection {collection} at {qdrant}")


def search(
    *,
    index: Path,
    model: str | None = None,
    text: str | None = None,
    image: Path | None = None,
    vector: Path | None = None,
    image_weight: float = 0.5,
    among: Literal["images", "texts"] | None = None,
    k: int = 10,
    where: tuple[str, ...] = (),
    dedup: float | None = None,
    pretrained: str | None = None,
    device: str = "auto",
) -> None:
    """Search an index by words (finds pictures), a picture (finds captions), both, or a vector.

    Args:
        index: A folder that `retrieval index` wrote.
        model: The model that made its embeddings; not needed for --vector.
        text: The query in words.
        image: A picture file as the query; with --text, both are one query.
        vector: A .npy file with one vector of the index's model as the query.
        image_weight: Share of the picture in a query of both, 0 to 1.
        among: Search the pictures or the texts, whatever the query is.
        k: Results.
        where: Conditions on the results' records, such as "width>=512" or "label=dog".
        dedup: Leave out results whose cosine with a better one is at least this, such as 0.95.
        pretrained: open_clip's tag of weights, for a name.
        device: auto, cpu, cuda or cuda:N.
    """
    import numpy as np

    from retrieval.index import Index
    from retrieval.search import search as find

    if text is None and image is None and vector is None:
        raise ValueError("give --text, --image, both, or --vector as the query")
    encoder = None
    if vector is None:
        if model is None:
            raise ValueError("--text and --image need --model, the model that made the index's embeddings")
        from pretrain.encoder import load_encoder

        encoder = load_encoder(model, pretrained=pretrained, device=device)
    hits = find(
        Index.load(index),
        encoder,
        texts=[] if text is None else [text],
        images=[] if image is None else [image],
        vectors=None if vector is None else np.load(vector, allow_pickle=False),
        image_weight=image_weight,
        among=among,
        k=k,
        where=where,
        dedup=dedup,
    )[0]
    for hit in hits:
        print(f"{hit.rank:>4}  {hit.score:.4f}  {hit.key}" + (f"  {hit.text}" if hit.text else ""))


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


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
