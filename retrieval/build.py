"""Build an index from embeddings on disk, within a time, and measure it with queries of the other kind."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.artifact import new_artifact
from retrieval.choose import choose_plans
from retrieval.fill import OutOfTimeError, Source, fill, measured_flops, time_limit
from retrieval.first_pass import PartsSource, first_pass
from retrieval.index import KIND, Index, index_manifest, segment_entry
from retrieval.measure import measure, tune
from retrieval.parts import SIDES, EmbeddingSet
from retrieval.side import Segment

logger = logging.getLogger(__name__)

TEXT_QUERIES = 1000  # half to tune on, half to report


@dataclass(frozen=True)
class Options:
    """What is asked of an index.

    Attributes:
        recall: Wanted recall@k against exact search, on queries of the other side.
        k: Results a query that it is measured with.
        memory: Bytes that each side may take in memory; None for no limit.
        seconds: Wall time for each side's training and building.
        kind: Of `retrieval.choose.KINDS`.
    """

    recall: float = 0.95
    k: int = 10
    memory: int | None = None
    seconds: float = 1800.0
    kind: str = "auto"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not self.seconds > 0:
            raise ValueError(f"the time limit must be above 0 seconds, got {self.seconds}")


def build_index(
    embeddings: str | Path | EmbeddingSet,
    out: str | Path,
    *,
    options: Options | None = None,
    sides: Sequence[str] = SIDES,
    queries: str | Path | EmbeddingSet | None = None,
    show: bool = False,
) -> Index:
    """Choose, build, tune and measure an index; it appears as a whole.

    Rows are read part by part, once and then once for each plan that is tried: no more of them are in memory than
    one part and those that train (40 a cell). The pictures' index is tuned and measured with texts, which lie
    elsewhere in the space than pictures do: recall on pictures as queries would flatter it. Half of the queries
    tune, the other half report.

    Args:
        embeddings: A folder that `pairstream retrieval embed` wrote.
        out: The folder to write; replaced when it exists.
        options: What is asked of it.
        sides: `images`, `texts` or both.
        queries: Embeddings of the same model whose other side is asked with; the same ones when None.
        show: Show progress.

    Returns:
        The index, loaded.

    Raises:
        ValueError: An empty gallery, a key that occurs twice, damaged rows, queries of another model, too little
            memory, or no plan within the time.

    Example:
        >>> build_index("rows", "index", options=Options(recall=0.98, seconds=600))    # doctest: +SKIP
    """
    options = options or Options()
    found = embeddings if isinstance(embeddings, EmbeddingSet) else EmbeddingSet.open(embeddings)
    asking = (
        found
        if queries is None
        else queries
        if isinstance(queries, EmbeddingSet)
        else EmbeddingSet.open(queries)
    )
    if asking.manifest["fingerprint"] != found.manifest["fingerprint"]:
        raise ValueError(
            f"the queries are of {asking.manifest['model']} ({asking.manifest['fingerprint']}), the rows of "
            f"{found.manifest['model']} ({found.manifest['fingerprint']}): embed both with one model"
        )
    if not sides or set(sides) - set(SIDES):
        raise ValueError(f"sides: expected some of {', '.join(SIDES)}, got {', '.join(sides) or 'none'}")
    content = index_manifest(found.manifest["model"], found.manifest["fingerprint"], found.dim)
    with new_artifact(out, KIND, content) as temporary:
        for side in sides:
            other = SIDES[1 - SIDES.index(side)]
            segment = build_segment(
                PartsSource(found, side),
                temporary,
                side,
                options,
                queries=sample_rows(asking, other, query_count(found.count(side))),
                query_kind=other,
                show=show,
            )
            content[side].append(segment_entry(segment))
    return Index.load(out)


def query_count(rows: int) -> int:
    """1,000, and less for so many rows that exact search would take longer than the index."""
    return int(np.clip(TEXT_QUERIES * 2e6 / max(rows, 1), 100, TEXT_QUERIES))


def sample_rows(embeddings: EmbeddingSet, side: str, count: int) -> np.ndarray:
    """At most `count` rows of a side, spread over the set at random, always the same."""
    total = embeddings.count(side)
    chosen = np.sort(np.random.default_rng(0).permutation(total)[:count])
    rows = []
    for part in embeddings:
        first = part.first[side]
        mine = chosen[(chosen >= first) & (chosen < first + len(part.records(side)))] - first
        if len(mine):
            rows.append(part.rows(side, check=False)[mine])
    return np.concatenate(rows) if rows else np.zeros((0, embeddings.dim), np.float32)


def build_segment(
    source: Source,
    folder: Path,
    side: str,
    options: Options,
    *,
    queries: np.ndarray,
    query_kind: str,
    show: bool = False,
) -> Segment:
    """Build one segment into files of `folder`: the first plan that is in time and reaches the recall.

    When none reaches it, the one that came nearest is kept, and its report says so.

    Args:
        source: The rows.
        folder: Where its files go.
        side: `images` or `texts`, the beginning of their names.
        options: What is asked of it.
        queries: float32 `(q, dim)` to tune and measure with; at least two, or nothing is measured.
        query_kind: What the queries are.
        show: Show progress.

    Raises:
        ValueError: See `build_index`.
    """
    if not source.count:
        raise ValueError(f"{side}: the gallery is empty, there is nothing to index")
    began = time.perf_counter()
    plans = choose_plans(
        source.count,
        source.dim,
        memory=options.memory,
        recall=options.recall,
        kind=options.kind,
        train_flops=0.04 * options.seconds * measured_flops(),  # ten iterations in four tenths of the time
    )
    seen = first_pass(source, folder, side, plans, queries, options.k, show=show)
    half = (len(queries) + 1) // 2
    tried: list[dict[str, str]] = []
    best: Segment | None = None
    for number, plan in enumerate(plans):
        name = f"{seen.name}{'abcdefghij'[number]}"
        started, started_cpu = time.perf_counter(), time.process_time()
        try:
            with time_limit(began + options.seconds, armed=plan.kind != "flat") as left:
                index = fill(source, plan, seen.train, folder / name, left, show=show)
        except OutOfTimeError as error:
            tried.append({"factory": plan.factory, "result": f"out of time: {error}"})
            continue
        seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
        segment = Segment(index, rows=seen.rows if plan.exact_rows else None, name=name)
        measured: dict[str, Any] = {}
        if half < len(queries):
            tune(segment, queries[:half], seen.exact[:half], options.k, options.recall)
            measured = measure(segment, queries[half:], seen.exact[half:], options.k)
        elif not plan.exact_rows:
            segment.effort = 64 if plan.kind == "hnsw" else 0
        else:
            segment.effort, segment.candidates = max(1, plan.cells // 4), 20
        segment.report = {
            "kind": plan.kind,
            "factory": plan.factory,
            "query_kind": query_kind,
            **measured,
            "exact_cpu_ms": round(seen.exact.cpu_ms, 3),
            "build_s": round(seconds, 2),
            "build_cpu_s": round(cpu, 2),
            "bytes_per_vector": round(memory_bytes(segment, folder) / source.count, 1),
            "bytes_on_disk_per_vector": disk_bytes(segment, folder, source) // source.count,
            "wanted_recall": options.recall,
        }
        recall = measured.get("recall", 1.0)
        if best is None or recall > best.report.get("recall", 1.0):
            best = segment
        if recall >= options.recall:
            break
        tried.append({"factory": plan.factory, "result": f"recall {recall:.4f}"})
    if best is None:
        what = "; ".join(": ".join(one.values()) for one in tried)
        raise ValueError(
            f"{side}: no index of {source.count:,} rows could be built within {options.seconds:g} s ({what}). "
            "Allow more time"
        )
    best.report["tried"] = tried
    if best.report.get("recall", 1.0) < options.recall:
        logger.warning(
            "%s: the best index within the limits (%s) has recall %.4f, below the wanted %.4f",
            *(side, best.report["factory"], best.report["recall"], options.recall),
        )
    keep_files(folder, seen.name, best)
    return best


def memory_bytes(segment: Segment, folder: Path) -> int:
    """Bytes of codes, lists and links; rows that are mapped for re-ranking are not among them."""
    stem = folder / segment.name
    lists = stem.with_suffix(".ivfdata")
    return stem.with_suffix(".faiss").stat().st_size + (lists.stat().st_size if lists.is_file() else 0)


def disk_bytes(segment: Segment, folder: Path, source: Source) -> int:
    mapped = 0 if segment.rows is None else 2 * source.dim * source.count
    return memory_bytes(segment, folder) + mapped


def keep_files(folder: Path, name: str, segment: Segment) -> None:
    """Give the records and rows the name of the index that was taken, and remove those that were not."""
    (folder / f"{name}.jsonl").rename(folder / f"{segment.name}.jsonl")
    rows = folder / f"{name}.npy"
    if segment.rows is not None:
        rows.rename(folder / f"{segment.name}.npy")
    else:
        rows.unlink(missing_ok=True)
    for path in folder.glob(f"{name}?.*"):
        if path.stem != segment.name:
            path.unlink()
