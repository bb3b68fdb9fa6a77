"""`pairstream retrieval index | update | search | export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal


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
    rows = None
    if vector is not None:
        rows = np.atleast_2d(np.load(vector, allow_pickle=False))
        if len(rows) != 1:
            raise ValueError(f"{vector}: expected one vector, got an array of shape {rows.shape}")
    hits = find(
        Index.load(index),
        encoder,
        texts=[] if text is None else [text],
        images=[] if image is None else [image],
        vectors=rows,
        image_weight=image_weight,
        among=among,
        k=k,
        where=where,
        dedup=dedup,
    )[0]
    for hit in hits:
        print(f"{hit.rank:>4}  {hit.score:.4f}  {hit.key}" + (f"  {hit.text}" if hit.text else ""))
