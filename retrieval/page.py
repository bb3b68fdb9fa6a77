"""The report of an evaluation: numbers, curves of the run that made the model, and walls of queries."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.samples import index_shards, read_sample
from data.tar import ShardReader
from data.transforms import decode_image
from pairstream.report import Card, Report
from pairstream.run import RunFolder
from pretrain.report import add_training
from retrieval.embed import Embeddings
from retrieval.evaluate import Evaluation, cell, interval_rows, result_rows
from retrieval.index import top_k
from retrieval.labelled import class_folders, folder_key, spaced
from retrieval.metrics import DIRECTIONS

SHOWN = 5  # results of each query


def evaluation_report(
    evaluation: Evaluation, *, run: str | Path | None = None, queries: int = 10, title: str = ""
) -> Report:
    """The page of an evaluation.

    Args:
        evaluation: What `evaluate` returned.
        run: A pretraining run folder whose curves are shown.
        queries: Queries on the wall, in each direction; evenly spaced over the set, not chosen by result.
        title: The page's title.

    Returns:
        The report, not yet written.

    Raises:
        FileNotFoundError: `run` has no log.
        ValueError: A sample of the set cannot be read any more.
    """
    metrics = evaluation.metrics
    report = Report(
        title or "Image-text retrieval",
        f"{metrics['model']} on {', '.join(metrics['data'])}: "
        f"{metrics['images']:,} pictures, {metrics['texts']:,} texts",
    )
    add_numbers(report, metrics)
    if run is not None:
        add_run(report, run)
    add_walls(report, evaluation, queries)
    return report


def add_numbers(report: Report, metrics: dict[str, Any]) -> None:
    """Headline figures and the table with chance beside it."""
    numbers = metrics["retrieval"]
    recalls = [name for name in numbers[DIRECTIONS[0]] if name.startswith("recall")]
    headline = dict.fromkeys([recalls[0], recalls[-1], "median_rank"])
    report.numbers(
        [
            (
                f"{direction.replace('_', ' ')}, {name.replace('_', ' ')}",
                cell(name, numbers[direction][name]),
                f"chance {cell(name, numbers['chance'][direction][name])}",
            )
            for direction in DIRECTIONS
            for name in headline
        ]
    )
    report.heading("Numbers")
    header, rows = result_rows(metrics)
    ties = sum(numbers[direction]["tied_queries"] for direction in DIRECTIONS)
    report.table(
        header,
        rows,
        caption="recall@k is the share of queries with a right answer among the first k; ranks are those of the "
        f"first right answer. Queries that a tie leaves open, counted by expectation: {ties:,}.",
    )
    report.table(
        header,
        interval_rows(metrics),
        caption=f"{metrics['intervals']['level']:.0%} intervals by bootstrap over pictures with their captions.",
    )
    if metrics["diagnostics"]:
        report.table(
            ["of the embedding spaces", "value"],
            [[name.replace("_", " "), value] for name, value in metrics["diagnostics"].items()],
            caption="alignment: mean squared distance of a text and its picture; uniformity: log mean exp(-2 d²); "
            "modality gap: distance of the means; anisotropy: mean cosine of two rows; effective rank of "
            f"{metrics['dim']} dimensions.",
        )
    if metrics["faults"]:
        report.table(
            ["samples left out, by cause", "count"], [list(row) for row in metrics["faults"].items()]
        )


def add_run(report: Report, run: str | Path) -> None:
    """Loss and recall curves of the training run."""
    log = RunFolder(run, writes=False).read_log()
    if not log:
        raise FileNotFoundError(f"{Path(run) / 'log.jsonl'}: no log there; expected a pretraining run folder")
    report.heading("Training")
    add_training(report, log)


def add_walls(report: Report, evaluation: Evaluation, queries: int) -> None:
    """Queries with their best results from FAISS, right ones marked, in both directions."""
    found, index = evaluation.embeddings, evaluation.index
    by_image, by_text = (each.best() for each in evaluation.ranks)
    text_queries = spaced(len(found.texts), queries)
    image_queries = spaced(len(found.images), queries)
    text_scores, text_rows = top_k(index.images, found.texts[text_queries], SHOWN)
    image_scores, image_rows = top_k(index.texts, found.images[image_queries], SHOWN)
    pictures = thumbnails(
        found.shards, {int(found.samples[row]) for row in {*text_rows.ravel().tolist(), *image_queries}}
    )

    report.heading("Queries and their results")
    report.text(
        f"{len(text_queries)} texts and {len(image_queries)} pictures, evenly spaced over the set: none was "
        "chosen for its result. The number on a result is its cosine with the query."
    )
    walls = []
    for query, scores, rows in zip(text_queries, text_scores, text_rows.tolist(), strict=True):
        owner = int(found.image_of_text[query])
        cards = picture_cards(found, pictures, owner, scores, rows)
        place = place_of(float(by_text.expected()[query]), by_text.gallery, "its picture")
        walls.append((Card(title=found.captions[query], lines=[place]), cards))
    report.results("Text to image", walls)

    walls = []
    for query, scores, rows in zip(image_queries, image_scores, image_rows.tolist(), strict=True):
        cards = [
            Card(
                title=found.captions[row],
                lines=[f"{score:.3f}"],
                mark="right" if found.image_of_text[row] == query else None,
            )
            for score, row in zip(scores, rows, strict=True)
        ]
        place = place_of(float(by_image.expected()[query]), by_image.gallery, "first right text")
        walls.append((Card(pictures[int(found.samples[query])], lines=[place]), cards))
    report.results("Image to text", walls)


def picture_cards(
    found: Embeddings, pictures: Mapping[int, bytes], owner: int, scores: Iterable[float], rows: Iterable[int]
) -> list[Card]:
    """A text's results: pictures with their cosines, its own one marked.

    Args:
        found: The set.
        pictures: Thumbnails by sample number.
        owner: Row of the text's own picture.
        scores: Cosines of the results.
        rows: Their rows among the pictures.
    """
    return [
        Card(
            pictures[int(found.samples[row])],
            lines=[f"{score:.3f}"],
            mark="right" if row == owner else None,
        )
        for score, row in zip(scores, rows, strict=True)
    ]


def place_of(rank: float, gallery: int, what: str) -> str:
    return f"{what}: rank {cell('rank', rank)} of {gallery:,}"


def thumbnails(shards: Iterable[str], numbers: Iterable[int]) -> dict[int, bytes]:
    """Small JPEG copies of some samples' pictures.

    Args:
        shards: The set.
        numbers: Global sample numbers.

    Returns:
        JPEG bytes by number.
    """
    indices = index_shards(shards)
    bases = np.cumsum([0, *(len(index) for index in indices)])
    result = {}
    with ShardReader() as reader:
        for number in sorted(numbers):
            shard = int(np.searchsorted(bases, number, side="right")) - 1
            sample = read_sample(indices[shard], number - int(bases[shard]), number, reader)
            result[number] = thumbnail(sample.image)
    return result


def named_thumbnails(data: Sequence[str], keys: Iterable[str]) -> dict[str, bytes]:
    """The same of a labelled set's pictures, by key.

    Args:
        data: A folder of class folders, or shards.
        keys: Keys of pictures; of equal ones in several shards the first is taken.
    """
    wanted, folder = set(keys), Path(data[0])
    if len(data) == 1 and folder.is_dir() and not any(folder.glob("*.tar")):
        named = {folder_key(folder, path): path for path, _ in class_folders(folder)[1]}
        return {key: thumbnail(named[key].read_bytes()) for key in sorted(wanted)}
    numbers: dict[str, int] = {}
    base = 0
    for index in index_shards(data):
        for number in range(len(index)):
            if index.key(number) in wanted:
                numbers.setdefault(index.key(number), base + number)
        base += len(index)
    pictures = thumbnails(data, numbers.values())
    return {key: pictures[number] for key, number in numbers.items()}


def thumbnail(content: bytes, side: int = 240) -> bytes:
    """A small JPEG of an encoded picture; `side` is its longer side, pixels."""
    picture = Image.fromarray(decode_image(content).permute(1, 2, 0).numpy())  # (H, W, 3)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()
