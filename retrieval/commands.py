"""`pairstream retrieval compare | classify | suite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from retrieval.artifact import write_json


def compare(
    first: tyro.conf.Positional[Path],
    second: tyro.conf.Positional[Path],
    /,
    *,
    json: Path | None = None,
    level: float = 0.95,
    resamples: int = 10000,
) -> None:
    """Test whether a second checkpoint retrieves better than a first, on the same pairs.

    Args:
        first: JSON that `retrieval eval --json` wrote (with its .queries.safetensors beside it).
        second: The same of the other checkpoint.
        json: Also write the result to this file.
        level: Of the interval of the difference.
        resamples: Bootstrap samples, and random exchanges of the test.
    """
    from retrieval.evaluate import cell
    from retrieval.metrics import DIRECTIONS
    from retrieval.queries import compare_results

    result = compare_results(first, second, level=level, resamples=resamples)
    table = Table(
        title=f"{result['second']['model']} against {result['first']['model']}: {result['images']:,} pictures, "
        f"{result['texts']:,} texts",
        title_justify="left",
    )
    for number, name in enumerate(("number", "first", "second", "difference", f"{level:.0%} interval", "p")):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for direction in DIRECTIONS:
        table.add_row(direction.replace("_", " "), style="bold")
        for name, found in result[direction].items():
            table.add_row(
                f"  {name.replace('_', ' ')}",
                cell(name, found["first"]),
                cell(name, found["second"]),
                f"{found['difference']:+.4f}",
                f"{found['low']:+.4f} to {found['high']:+.4f}",
                f"{found['p']:.4f}",
            )
    Console().print(table)
    if json is not None:
        write_json(json, result)


def classify(
    *,
    model: str,
    data: tuple[str, ...],
    classes: str | None = None,
    templates: str | None = None,
    classifier: Path | None = None,
    save: Path | None = None,
    pretrained: str | None = None,
    json: Path | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    workers: int = 0,
    max_faults: float = 0.01,
    device: str = "auto",
) -> None:
    """Zero-shot classification of a labelled set, beside chance.

    Args:
        model: A checkpoint or run folder, a name open_clip knows, or hf-hub:ORG/REPO.
        data: A folder of class folders, or shards with `label` in their JSON (or KEY.cls).
        classes: imagenet, cifar10, cifar100, or a file: one name a line in the order of the labels, or a JSON
            list. Without it the names of the class folders.
        templates: imagenet (80), simple (7), cifar (18), plain (1), or a file: one template a line with {} for
            the class, a JSON list, or a JSON object with the prompts of each class. Without it plain.
        classifier: Use the classifier in this file instead of --classes and --templates.
        save: Write the classifier to this safetensors file.
        pretrained: open_clip's tag of weights, for a name.
        json: Also write the numbers to this file.
        batch_size: Pictures at a time.
        limit: Only so many pictures: the first of shards, or spread evenly over class folders.
        workers: Loader processes; 0 decodes in this one.
        max_faults: Share of bad pictures past which the work stops.
        device: auto, cpu, cuda or cuda:N.
    """
    from pretrain.encoder import load_encoder
    from retrieval.classifier import Classifier
    from retrieval.classify import classify as measure
    from retrieval.labelled import class_folders, readable
    from retrieval.prompts import load_classes, load_templates

    names = None if classes is None else load_classes(classes)
    prompts = None
    if templates is not None:
        folder = Path(data[0])
        if names is None and folder.is_dir() and not any(folder.glob("*.tar")):
            prompts = load_templates(templates, readable(class_folders(folder)[0]))
        else:
            prompts = load_templates(templates, names or [])
    result = measure(
        load_encoder(model, pretrained=pretrained, device=device),
        list(data),
        classes=names,
        templates=prompts,
        classifier=None if classifier is None else Classifier.load(classifier),
        batch_size=batch_size,
        limit=limit,
        workers=workers,
        max_faults=max_faults,
        show=True,
    )
    numbers = result.metrics["classification"]
    Console().print(classification_table(result.metrics))
    for each in numbers.get("confusions", [])[:5]:
        print(
            f"  {each['class']} taken for {each['taken_for']}: {each['pictures']:,} pictures ({each['share']:.0%})"
        )
    if result.metrics["faults"]:
        print("left out: " + ", ".join(f"{n} {cause}" for cause, n in result.metrics["faults"].items()))
    if save is not None:
        print(f"classifier: {result.classifier.save(save)}")
    if json is not None:
        write_json(json, result.metrics)


def suite(
    recipe: tyro.conf.Positional[str],
    /,
    *,
    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction],
    pretrained: str | None = None,
    out: Path | None = None,
    quick: bool = False,
    no_cache: bool = False,
    device: str = "auto",
) -> None:
    """Measure several models on a table of tasks, and write one JSON for each and a page.

    Args:
        recipe: A YAML file of tasks, or the name of a carried one.
        model: A checkpoint or run folder, a name open_clip knows, or hf-hub:ORG/REPO. Give it again for more.
        pretrained: open_clip's tag of weights, for a name.
        out: The folder of results instead of the recipe's.
        quick: Only some samples of each task (`quick_limit` of the recipe).
        no_cache: Embed anew, and keep nothing.
        device: auto, cpu, cuda or cuda:N.
    """
    if not model:
        raise ValueError("give at least one --model")
    from pairstream.recipe import dump_recipe, load_recipe
    from pretrain.encoder import load_encoder
    from retrieval.recipe import SuiteRecipe
    from retrieval.suite import chances, folder_names, headline, run_task, write_result
    from retrieval.suite_page import suite_report

    content = load_recipe(SuiteRecipe, "retrieval", recipe)
    place = Path(content.out) if out is None else out
    if (place / "log.jsonl").exists():
        raise FileExistsError(f"{place} holds a training run, whose report would be lost: give another --out")
    cache = None if no_cache or content.cache is None else Path(content.cache).expanduser()
    names = folder_names(model)
    results = []
    for name, source in zip(names, model, strict=True):
        encoder = load_encoder(source, pretrained=pretrained, device=device)
        each = []
        for task in content.tasks:
            result = run_task(encoder, task, content, quick=quick, cache=cache, show=True)
            write_result(place, name, result)
            each.append(result)
            kept = " (embeddings from the cache)" if result.from_cache else ""
            numbers = headline(result.metrics)
            by_chance = chances(result.metrics)
            words = "  ".join(
                f"{key} {value:.4f}" + (f" (chance {by_chance[key]:.4f})" if key in by_chance else "")
                for key, value in numbers.items()
            )
            print(f"{name}, {task.name}: {words}{kept}")
        results.append(each)
    dump_recipe(content, place / "recipe.resolved.yaml")
    print(f"report: {suite_report(names, results).write(place)}")


def classification_table(metrics: dict[str, Any]) -> Table:
    """The numbers of a classification for a terminal."""
    numbers = metrics["classification"]
    table = Table(
        title=f"{metrics['model']}: {numbers['pictures']:,} pictures, {numbers['classes']:,} classes, "
        f"{metrics['prompts']:,} prompts",
        title_justify="left",
    )
    for number, name in enumerate(("number", "value", "95% interval", "by chance")):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    if "acc1" not in numbers:
        table.add_row(
            "mean average precision",
            f"{numbers['mean_average_precision']:.4f}",
            "",
            f"{numbers['chance']:.4f}",
        )
        return table
    chances = {
        "acc1": numbers["chance_acc1"],
        "acc5": 5 * numbers["chance_acc1"],
        "mean_per_class_recall": numbers["chance_acc1"],
    }
    for name, by_chance in chances.items():
        if numbers[name] is not None:
            interval = numbers["intervals"].get(name)
            table.add_row(
                name.replace("_", " "),
                f"{numbers[name]:.4f}",
                f"{interval[0]:.4f}-{interval[1]:.4f}" if interval else "",
                f"{by_chance:.4f}",
            )
    return table
