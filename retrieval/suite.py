"""`retrieval suite`: a table of tasks for several models, each embedded once."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.encoder import Encoder
from retrieval.artifact import write_json
from retrieval.cache import cache_key, cached
from retrieval.compositional_sets import cases_hash, compositional_metrics, read_cases
from retrieval.embed import Embeddings, embed_shards
from retrieval.evaluate import Evaluation, measure
from retrieval.metrics import DIRECTIONS
from retrieval.provenance import encoder_facts, versions
from retrieval.recipe import (
    ClassificationTask,
    CompositionalTask,
    ProbeTask,
    RetrievalTask,
    SuiteRecipe,
    Task,
)
from retrieval.share import ALONE, Share
from retrieval.suite_labelled import classified, listed, probed


@dataclass(frozen=True)
class SuiteResult:
    """One model on one task.

    Attributes:
        task: The task.
        metrics: Its self-describing numbers.
        evaluation: Embeddings and places behind them, for retrieval.
        from_cache: Whether the embeddings were found in the cache.
    """

    task: Task
    metrics: dict[str, Any]
    evaluation: Evaluation | None
    from_cache: bool


def run_task(
    encoder: Encoder,
    task: Task,
    recipe: SuiteRecipe,
    *,
    quick: bool = False,
    cache: Path | None = None,
    share: Share = ALONE,
    show: bool = False,
) -> SuiteResult:
    """Measure one model on one task.

    Args:
        encoder: The model.
        task: What to measure.
        recipe: The suite, for batch size, workers and faults.
        quick: Only `quick_limit` samples: the first of shards, or spread evenly over class folders and cases.
        cache: Where embeddings are kept; None keeps none.
        share: This process's share of the embedding; all processes get the result.
        show: Show progress.

    Returns:
        The result; its metrics have `task`, `quick` and `recipe_hash` beside the numbers.

    Raises:
        ValueError: As the task's own function does, with the task's name.
    """
    limit = task.limit
    if quick:
        limit = recipe.quick_limit if limit is None else min(limit, recipe.quick_limit)
    about = {"task": task.model_dump(mode="json"), "quick": quick, "recipe_hash": recipe_hash(recipe)}
    if isinstance(task, RetrievalTask):
        evaluation, hit = retrieve(encoder, task, recipe, limit, quick, cache, share, show)
        return SuiteResult(task, {**evaluation.metrics, **about}, evaluation, hit)
    if isinstance(task, ClassificationTask):
        metrics, hit = classified(encoder, task, recipe, limit, cache, share, show)
        return SuiteResult(task, {**metrics, **about}, None, hit)
    if isinstance(task, ProbeTask):
        metrics, hit = probed(encoder, task, recipe, limit, cache, share, show)
        return SuiteResult(task, {**metrics, **about}, None, hit)
    assert isinstance(task, CompositionalTask)
    numbers = compositional_metrics(
        encoder,
        task.set,
        task.folder,
        task.images,
        batch_size=recipe.batch_size,
        limit=limit,
        share=share,
    )
    metrics = {
        **encoder_facts(encoder),
        "data": [task.folder],
        "data_hash": cases_hash(read_cases(task.set, task.folder, task.images, limit=limit)),
        "limit": limit,
        "compositional": numbers,
        "ties": "by expectation; strict_ numbers count a tie as wrong",
        "versions": versions(),
    }
    return SuiteResult(task, {**metrics, **about}, None, False)


def retrieve(
    encoder: Encoder,
    task: RetrievalTask,
    recipe: SuiteRecipe,
    limit: int | None,
    quick: bool,
    cache: Path | None,
    share: Share,
    show: bool,
) -> tuple[Evaluation, bool]:
    """A retrieval task from cached or new embeddings."""
    found, hit = cached(
        cache,
        lambda: cache_key(encoder, task.data, limit=limit, kind=task.kind, max_faults=recipe.max_faults),
        Embeddings.load,
        lambda: embed_shards(
            encoder,
            task.data,
            batch_size=recipe.batch_size,
            limit=limit,
            workers=recipe.workers,
            max_faults=recipe.max_faults,
            share=share,
            show=show,
        ),
    )
    folds = None if quick else task.folds
    # The cache knows sets by their bytes: they may have been embedded from another place, which is gone by now.
    found = replace(found, shards=listed(task.data))
    return measure(found, encoder_facts(encoder), limit=limit, folds=folds, over_ranks=share.world > 1), hit


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of a task that stand in a table, with their names."""
    if "retrieval" in metrics:
        numbers = metrics["retrieval"]
        return {
            f"{direction.replace('_', ' ')} recall@1": numbers[direction]["recall@1"]
            for direction in DIRECTIONS
        }
    if "classification" in metrics:
        numbers = metrics["classification"]
        names = ("acc1", "acc5", "mean_per_class_recall", "mean_average_precision")
        return {name.replace("_", " "): numbers[name] for name in names if numbers.get(name) is not None}
    if "probe" in metrics:
        names = ("accuracy", "mean_per_class_recall")
        return {name.replace("_", " "): metrics["probe"][name] for name in names if name in metrics["probe"]}
    numbers = metrics["compositional"]
    names = ("text", "image", "group", "accuracy", "macro_accuracy", "mean_of_kinds", "jaccard")
    return {name.replace("_", " "): numbers[name] for name in names if name in numbers}


def headline_intervals(metrics: dict[str, Any]) -> dict[str, list[float]]:
    """Intervals of the headline numbers, where there are some."""
    if "retrieval" in metrics:
        found = metrics["intervals"]
        return {
            f"{direction.replace('_', ' ')} recall@1": found[direction]["recall@1"]
            for direction in DIRECTIONS
        }
    numbers = next((metrics[kind] for kind in ("classification", "compositional") if kind in metrics), {})
    return {name.replace("_", " "): ends for name, ends in numbers.get("intervals", {}).items()}


def chances(metrics: dict[str, Any]) -> dict[str, float]:
    """Chance of the headline numbers, where it is known."""
    if "retrieval" in metrics:
        by_chance = metrics["retrieval"]["chance"]
        return {
            f"{direction.replace('_', ' ')} recall@1": by_chance[direction]["recall@1"]
            for direction in DIRECTIONS
        }
    if "classification" in metrics:
        numbers = metrics["classification"]
        if "chance" in numbers:
            return {"mean average precision": numbers["chance"]}
        one = numbers["chance_acc1"]
        return {"acc1": one, "acc5": min(1.0, 5 * one), "mean per class recall": one}
    if "probe" in metrics:
        return dict.fromkeys(("accuracy", "mean per class recall"), metrics["probe"]["chance"])
    if "chance" in metrics["compositional"]:
        one = metrics["compositional"]["chance"]
        return dict.fromkeys(("accuracy", "macro accuracy", "mean of kinds"), one)
    if "group" in metrics["compositional"]:
        return {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
    return {}


def write_result(out: Path, model: str, result: SuiteResult) -> Path:
    """Write one self-describing JSON for a model and a task, with its per-query places beside it."""
    path = out / model / f"{result.task.name}.json"
    if result.evaluation is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        result.evaluation.write_queries(path)
    write_json(path, result.metrics)
    return path


def folder_names(models: Sequence[str]) -> list[str]:
    """A folder name for each model: the end of its name, numbered where two would be the same."""
    names: list[str] = []
    for model in models:
        parts = [part for part in re.split(r"[/\\:]+", model) if part not in ("", ".", "..")]
        base = re.sub(r"[^\w.-]+", "-", "-".join(parts[-2:])).strip("-.") or "model"
        names.append(base if base not in names else f"{base}-{len(names)}")
    return names


def recipe_hash(recipe: SuiteRecipe) -> str:
    """A hash of what a suite measures: its tasks, not where it writes."""
    content = json.dumps([task.model_dump(mode="json") for task in recipe.tasks], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
