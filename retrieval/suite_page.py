"""The page of a suite: models side by side, curves, best and worst queries, confused classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pairstream.confusion import confusion_picture
from pairstream.report import Card, Report
from retrieval.evaluate import Evaluation
from retrieval.index import top_k
from retrieval.metrics import DIRECTIONS, chance
from retrieval.page import named_thumbnails, picture_cards, place_of, thumbnails
from retrieval.queries import differences
from retrieval.suite import SuiteResult, chances, headline, headline_intervals

QUERIES = 6  # on each wall
RESULTS = 5  # of each query
CURVE = (1, 2, 5, 10, 20, 50, 100)
CONFUSIONS = 15  # in a table, and on a wall:
SHOWN_CONFUSIONS = 6
CLASSES = 10  # best and worst ones of a set with several labels
RESAMPLES = 2000


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
        f"{counted(len(models), 'model')}, {counted(len(tasks), 'task')}"
        + (", quick: some samples of each only" if quick else ""),
    )
    report.heading("All numbers")
    rows = []
    for number, task in enumerate(tasks):
        each = [headline(by_model[number].metrics) for by_model in results]
        ends = [headline_intervals(by_model[number].metrics) for by_model in results]
        by_chance = chances(results[0][number].metrics)
        for name in each[0]:
            values = [with_interval(numbers, end, name) for numbers, end in zip(each, ends, strict=True)]
            level = f"{by_chance[name]:.4f}" if name in by_chance else None
            rows.append([task.name, name, level, *values])
    report.table(
        ["task", "number", "chance", *models],
        rows,
        caption="In brackets: 95 % intervals by bootstrap over pictures, captions of one picture together. Two models "
        "whose intervals overlap may still differ: the paired tests below compare them query by query.",
    )
    for number, task in enumerate(tasks):
        each = [by_model[number] for by_model in results]
        report.heading(task.name)
        describe(report, each[0])
        if each[0].evaluation is not None:
            add_retrieval(report, models, [one.evaluation for one in each if one.evaluation is not None])
        elif "classification" in each[0].metrics:
            add_classes(report, models, each)
        elif "probe" in each[0].metrics:
            add_probes(report, models, each)
        else:
            add_kinds(report, models, each)
    return report


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def with_interval(numbers: dict[str, float], ends: dict[str, list[float]], name: str) -> str | None:
    """`0.2143 (0.190–0.238)`."""
    if name not in numbers:
        return None
    low_high = f" ({ends[name][0]:.3f}–{ends[name][1]:.3f})" if name in ends else ""
    return f"{numbers[name]:.4f}{low_high}"


def describe(report: Report, result: SuiteResult) -> None:
    """What a task was measured on."""
    metrics = result.metrics
    words = [f"Data: {', '.join(metrics['data'])}."]
    if "images" in metrics:
        words.append(f"{metrics['images']:,} pictures, {metrics['texts']:,} texts.")
    elif "classification" in metrics:
        numbers = metrics["classification"]
        words.append(
            f"{numbers['pictures']:,} pictures, {numbers['classes']:,} classes, {metrics['prompts']:,} prompts."
        )
    elif "probe" in metrics:
        numbers = metrics["probe"]
        words.append(
            f"{numbers['train_pictures']:,} pictures to fit on, {numbers['test_pictures']:,} to test; features: "
            f"{metrics['features'].replace('_', ' ')}."
        )
    elif "cases" in metrics["compositional"]:
        words.append(f"{metrics['compositional']['cases']:,} cases.")
    if metrics["limit"] is not None:
        words.append(f"Only {metrics['limit']:,} of them: not comparable with numbers over all.")
    if metrics.get("faults"):
        words.append("Left out: " + ", ".join(f"{n} {cause}" for cause, n in metrics["faults"].items()) + ".")
    if "data_hash" in metrics:
        words.append(f"Data hash {metrics['data_hash']}.")
    report.text(" ".join(words))


def add_retrieval(report: Report, models: Sequence[str], evaluations: Sequence[Evaluation]) -> None:
    """Recall against k beside chance, paired tests, the spaces' shape, and each model's walls."""
    found = evaluations[0].embeddings
    by_chance = chance(found.image_of_text, len(found.images), CURVE)
    for number, direction in enumerate(DIRECTIONS):
        ks = [k for k in CURVE if k <= max(evaluations[0].ranks[number].gallery, 1)]
        curves = {
            model: [(k, float(evaluation.ranks[number].best().hits(k).mean())) for k in ks]
            for model, evaluation in zip(models, evaluations, strict=True)
        }
        curves["chance"] = [(k, by_chance[direction][f"recall@{k}"]) for k in ks]
        report.curves(f"{direction.replace('_', ' ')}: recall against k", curves, x="k", y="recall@k")
    add_tests(report, models, evaluations)
    names = list(evaluations[0].metrics["diagnostics"])
    if names:
        rows = [
            [name.replace("_", " "), *(each.metrics["diagnostics"][name] for each in evaluations)]
            for name in names
        ]
        report.table(["of the embedding spaces", *models], rows)
    report.text(
        "Below, texts with their own picture on the left and what was found for them on the right. The best: first "
        "ranks, highest cosine. The worst: last ranks. The number on a result is its cosine with the text."
    )
    for model, evaluation in zip(models, evaluations, strict=True):
        add_walls(report, model, evaluation)


def add_tests(report: Report, models: Sequence[str], evaluations: Sequence[Evaluation]) -> None:
    """Each further model against the first, query by query, where both saw the same pairs."""
    first, rows = evaluations[0], []
    for model, other in zip(models[1:], evaluations[1:], strict=True):
        if other.metrics["data_hash"] != first.metrics["data_hash"]:
            continue  # a picture that only one of them could use
        for number, direction in enumerate(DIRECTIONS):
            tested = differences(
                direction,
                first.ranks[number],
                other.ranks[number],
                first.embeddings.image_of_text,
                (1, 10),
                resamples=RESAMPLES,
            )
            for name in ("recall@1", "recall@10"):
                one = tested[name]
                rows.append(
                    [
                        model,
                        f"{direction.replace('_', ' ')} {name}",
                        f"{one.difference:+.4f}",
                        f"{one.low:+.4f} to {one.high:+.4f}",
                        f"{one.p:.4f}",
                    ]
                )
    if rows:
        report.table(
            [f"against {models[0]}", "number", "difference", "95 % interval", "p"],
            rows,
            caption="Paired bootstrap and sign-flip test over pictures with their captions; many numbers need a "
            "correction for many tests.",
        )


def add_walls(report: Report, model: str, evaluation: Evaluation) -> None:
    """The best and the worst texts of a model."""
    found = evaluation.embeddings
    ranks = evaluation.ranks[1].best().expected().numpy()
    scores = (found.texts * found.images[found.image_of_text]).sum(1)
    # Among equal ranks and scores the order of the set, so that the choice can be repeated.
    best = one_each(np.lexsort((-scores, ranks)), found.image_of_text)
    last = [row for row in np.argsort(-ranks, kind="stable").tolist() if row not in best]
    worst = one_each(np.array(last, dtype=np.int64), found.image_of_text)
    for title, chosen in (("best", best), ("worst", worst)):
        if chosen:
            wall(report, evaluation, f"{model}: {title} texts", chosen, ranks)


def one_each(ordered: np.ndarray, image_of_text: np.ndarray) -> list[int]:
    """The first texts that belong to different pictures."""
    _, first = np.unique(image_of_text[ordered], return_index=True)
    return ordered[np.sort(first)][:QUERIES].tolist()


def wall(report: Report, evaluation: Evaluation, title: str, queries: list[int], ranks: np.ndarray) -> None:
    """Texts and their own pictures beside the pictures that were found for them."""
    found = evaluation.embeddings
    scores, rows = top_k(evaluation.index.images, found.texts[queries], RESULTS)
    owners = found.image_of_text[queries]
    wanted = {int(found.samples[row]) for row in {*rows.ravel().tolist(), *owners.tolist()}}
    pictures = thumbnails(found.shards, wanted)
    entries = []
    for query, owner, values, places in zip(queries, owners.tolist(), scores, rows.tolist(), strict=True):
        cards = picture_cards(found, pictures, owner, values, places)
        place = place_of(float(ranks[query]), len(found.images), "its picture")
        entries.append((Card(pictures[int(found.samples[owner])], found.captions[query], [place]), cards))
    report.results(title, entries)


def add_classes(report: Report, models: Sequence[str], results: Sequence[SuiteResult]) -> None:
    """Confusions between classes as a matrix, a table and a wall, or the precision of each class."""
    for model, result in zip(models, results, strict=True):
        numbers = result.metrics["classification"]
        if "average_precision" in numbers:
            add_precisions(report, model, result.metrics)
            continue
        confusions: list[dict[str, Any]] = numbers["confusions"][:CONFUSIONS]
        if numbers["confusion"] is not None:
            report.picture(
                f"{model}: classes and what they were taken for",
                confusion_picture(numbers["confusion"], result.metrics["class_names"]),
                "Rows are the right classes, columns what was said; the shade is the share of the row.",
            )
        if not confusions:
            report.text(f"{model}: no picture was taken for another class.")
            continue
        report.table(
            ["class", "taken for", "pictures", "share of the class"],
            [[c["class"], c["taken_for"], c["pictures"], f"{100 * c['share']:.0f} %"] for c in confusions],
            caption=f"{model}: classes that were confused most often.",
        )
        shown = confusions[:SHOWN_CONFUSIONS]
        pictures = named_thumbnails(result.metrics["data"], {key for c in shown for key in c["examples"]})
        report.results(
            f"{model}: pictures behind the confusions",
            [
                (
                    Card(
                        title=f"{c['class']} taken for {c['taken_for']}",
                        lines=[f"{counted(c['pictures'], 'picture')}, {100 * c['share']:.0f} % of the class"],
                    ),
                    [Card(pictures[key], lines=[key]) for key in c["examples"]],
                )
                for c in shown
            ],
        )


def add_precisions(report: Report, model: str, metrics: dict[str, Any]) -> None:
    """Average precision of the best and the worst classes of a set with several labels."""
    found = metrics["classification"]["average_precision"]
    known = [
        (value, name) for value, name in zip(found, metrics["class_names"], strict=True) if value is not None
    ]
    ordered = sorted(known, key=lambda each: -each[0])
    rows = ordered if len(ordered) <= 2 * CLASSES else ordered[:CLASSES] + ordered[-CLASSES:]
    report.table(
        ["class", "average precision"],
        [[name, f"{value:.4f}"] for value, name in rows],
        caption=f"{model}: "
        + (
            "all classes with pictures."
            if rows is ordered
            else f"the {CLASSES} best classes and the {CLASSES} worst."
        ),
    )


def add_probes(report: Report, models: Sequence[str], results: Sequence[SuiteResult]) -> None:
    """Accuracy against what a probe was varied over."""
    numbers = [result.metrics["probe"] for result in results]
    if "searched" in numbers[0]:
        curves = {
            model: [(float(np.log10(float(weight))), value) for weight, value in each["searched"].items()]
            for model, each in zip(models, numbers, strict=True)
        }
        title = "accuracy on the validation split by weight of the L2 term"
        report.curves(title, curves, x="log10 of the weight", y="accuracy")
    elif "shots" in numbers[0]:
        curves = {
            model: [(float(shots), found["accuracy"]) for shots, found in each["shots"].items()]
            for model, each in zip(models, numbers, strict=True)
        }
        report.curves(
            "accuracy by pictures of each class",
            curves,
            x="pictures of each class",
            y="accuracy",
            lines={"chance": numbers[0]["chance"]},
        )


def add_kinds(report: Report, models: Sequence[str], results: Sequence[SuiteResult]) -> None:
    """Accuracy by kind or relation, where a set has them."""
    numbers = [result.metrics["compositional"] for result in results]
    kinds = numbers[0].get("kinds") or numbers[0].get("groups")
    if kinds:
        rows = [[kind, *((n.get("kinds") or n["groups"]).get(kind) for n in numbers)] for kind in kinds]
        report.table(["kind", *models], rows)
