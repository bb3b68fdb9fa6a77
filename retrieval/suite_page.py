"""The page of a suite: models side by side, curves, best and worst queries, confused classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pairstream.report import Card, Report
from retrieval.evaluate import Evaluation
from retrieval.index import top_k
from retrieval.metrics import DIRECTIONS
from retrieval.page import place_of, thumbnails
from retrieval.suite import SuiteResult, chances, headline

QUERIES = 6  # on each wall
RESULTS = 4  # of each query
CURVE = (1, 2, 5, 10, 20, 50, 100)


def suite_report(models: Sequence[str], results: Sequence[Sequence[SuiteResult]]) -> Report:
    """The page.

    Args:
        models: Names of the models.
        results: For each model, its tasks in the order of the recipe.

    Returns:
        The report, not yet written.
    """
    tasks = [result.task for result in results[0]]
    quick = any(result.metrics["quick"] for result in results[0])
    report = Report(
        "Zero-shot suite",
        f"{len(models)} models, {len(tasks)} tasks"
        + (", quick: the first samples of each only" if quick else ""),
    )
    report.heading("All numbers")
    rows = []
    for number, task in enumerate(tasks):
        each = [headline(by_model[number].metrics) for by_model in results]
        by_chance = chances(results[0][number].metrics)
        for name in each[0]:
            values = [f"{numbers[name]:.4f}" if name in numbers else None for numbers in each]
            level = f"{by_chance[name]:.4f}" if name in by_chance else None
            rows.append([task.name, name, level, *values])
    report.table(["task", "number", "chance", *models], rows)
    for number, task in enumerate(tasks):
        each = [by_model[number] for by_model in results]
        report.heading(task.name)
        describe(report, each[0])
        if each[0].evaluation is not None:
            add_retrieval(report, models, [one.evaluation for one in each if one.evaluation is not None])
        elif "classification" in each[0].metrics:
            add_classes(report, models, each)
        else:
            add_kinds(report, models, each)
    return report


def describe(report: Report, result: SuiteResult) -> None:
    """What a task was measured on."""
    metrics = result.metrics
    words = [f"Data: {', '.join(metrics['data'])}."]
    if "images" in metrics:
        words.append(f"{metrics['images']:,} pictures, {metrics['texts']:,} texts.")
    if metrics["limit"] is not None:
        words.append(f"Only the first {metrics['limit']:,}: not comparable with numbers over all of them.")
    if metrics.get("faults"):
        words.append("Left out: " + ", ".join(f"{n} {cause}" for cause, n in metrics["faults"].items()) + ".")
    if "data_hash" in metrics:
        words.append(f"Data hash {metrics['data_hash']}.")
    report.text(" ".join(words))


def add_retrieval(report: Report, models: Sequence[str], evaluations: Sequence[Evaluation]) -> None:
    """Recall against k for all models, the spaces' shape, and the walls of the first model."""
    for number, direction in enumerate(DIRECTIONS):
        curves = {}
        for model, evaluation in zip(models, evaluations, strict=True):
            best = evaluation.ranks[number].best()
            curves[model] = [(k, float(best.hits(k).mean())) for k in CURVE if k <= max(best.gallery, 1)]
        title = direction.replace("_", " ")
        report.curves(f"{title}: recall against k", curves, x="k", y="recall@k")
    names = list(evaluations[0].metrics["diagnostics"])
    if names:
        rows = [
            [name.replace("_", " "), *(each.metrics["diagnostics"][name] for each in evaluations)]
            for name in names
        ]
        report.table(["of the embedding spaces", *models], rows)
    evaluation = evaluations[0]
    found = evaluation.embeddings
    ranks = evaluation.ranks[1].best().expected().numpy()
    # Among equal ranks the order of the set, so that the choice can be repeated.
    order = np.argsort(ranks, kind="stable")
    worst = order[::-1][:QUERIES].tolist()
    scores = (found.texts * found.images[found.image_of_text]).sum(1)
    best = np.lexsort((-scores, ranks))[:QUERIES].tolist()
    report.text(
        f"Texts of {models[0]} with their own picture on the left and what was found for them on the right: the best "
        "(first ranks, highest cosine) and the worst (last ranks)."
    )
    for title, chosen in (("best", best), ("worst", worst)):
        wall(report, evaluation, f"{models[0]}: {title} texts", chosen, ranks)


def wall(report: Report, evaluation: Evaluation, title: str, queries: list[int], ranks: np.ndarray) -> None:
    """Texts beside the pictures that were found for them, and their own picture where it is not among them."""
    found = evaluation.embeddings
    scores, rows = top_k(evaluation.index.images, found.texts[queries], RESULTS)
    owners = found.image_of_text[queries]
    wanted = {int(found.samples[row]) for row in {*rows.ravel().tolist(), *owners.tolist()}}
    pictures = thumbnails(found.shards, wanted)
    entries = []
    for query, owner, values, places in zip(queries, owners.tolist(), scores, rows.tolist(), strict=True):
        cards = [
            Card(
                pictures[int(found.samples[row])],
                lines=[f"{value:.3f}"],
                mark="right" if row == owner else None,
            )
            for value, row in zip(values, places, strict=True)
        ]
        place = place_of(float(ranks[query]), len(found.images), "its picture")
        # The picture it should have found stands beside the words.
        entries.append((Card(pictures[int(found.samples[owner])], found.captions[query], [place]), cards))
    report.results(title, entries)


def add_classes(report: Report, models: Sequence[str], results: Sequence[SuiteResult]) -> None:
    """Confused classes, or the precision of each class."""
    for model, result in zip(models, results, strict=True):
        numbers = result.metrics["classification"]
        confusions = numbers.get("confusions", [])[:15]
        if confusions:
            report.table(
                ["class", "taken for", "pictures", "share of the class"],
                [
                    [c["class"], c["taken_for"], c["pictures"], f"{100 * c['share']:.0f} %"]
                    for c in confusions
                ],
                caption=f"{model}: classes that were confused most often.",
            )


def add_kinds(report: Report, models: Sequence[str], results: Sequence[SuiteResult]) -> None:
    """Accuracy by kind or relation, where a set has them."""
    numbers = [result.metrics["compositional"] for result in results]
    kinds = numbers[0].get("kinds") or numbers[0].get("groups")
    if kinds:
        rows = [[kind, *((n.get("kinds") or n["groups"]).get(kind) for n in numbers)] for kind in kinds]
        report.table(["kind", *models], rows)
