"""A suite's tasks on labelled pictures: zero-shot classification and probes, from cached or new rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pairstream.progress import ProgressBar
from pretrain.encoder import Encoder
from retrieval.cache import LabelledEmbeddings, cache_key, cached
from retrieval.classify import chosen_classifier, classification_facts, count_batches, embedded
from retrieval.embed import evaluating
from retrieval.labelled import LabelledPictures, class_numbers, readable
from retrieval.probes import few_shot_probe, knn_probe, linear_probe
from retrieval.prompts import load_classes, load_templates
from retrieval.provenance import encoder_facts, text_hash, versions
from retrieval.recipe import ClassificationTask, ProbeTask, SuiteRecipe
from retrieval.share import Share

SHOTS = (1, 2, 4, 8, 16)
NEIGHBOURS = 20


def labelled(
    encoder: Encoder,
    data: str | list[str],
    recipe: SuiteRecipe,
    limit: int | None,
    cache: Path | None,
    share: Share,
    show: bool,
    *,
    features: str = "embedding",
) -> tuple[LabelledPictures, LabelledEmbeddings, bool]:
    """A labelled set and the rows of its pictures, from the cache or new."""
    pictures = LabelledPictures(
        data,
        encoder.transform,
        batch_size=recipe.batch_size,
        limit=limit,
        workers=recipe.workers,
        max_faults=recipe.max_faults,
    )

    def make() -> LabelledEmbeddings:
        rows, labels, keys = [], [], []
        with evaluating(encoder), ProgressBar("pictures", pictures.steps, show=show) as bar:
            for part, found, names in embedded(encoder, pictures, bar, share, features=features):
                rows.append(part)
                labels += found
                keys += names
        if not keys:
            raise ValueError(f"{', '.join(pictures.names)}: no picture can be used: {pictures.faults}")
        return LabelledEmbeddings(np.concatenate(rows), labels, keys, pictures.faults)

    found, hit = cached(
        cache,
        lambda: cache_key(
            encoder, data, limit=limit, kind="labelled", features=features, max_faults=recipe.max_faults
        ),
        LabelledEmbeddings.load,
        make,
    )
    return pictures, found, hit


def classified(
    encoder: Encoder,
    task: ClassificationTask,
    recipe: SuiteRecipe,
    limit: int | None,
    cache: Path | None,
    share: Share,
    show: bool,
) -> tuple[dict[str, Any], bool]:
    """A classification task from cached or new embeddings of its pictures."""
    pictures, found, hit = labelled(encoder, task.data, recipe, limit, cache, share, show)
    names = None if task.classes is None else load_classes(task.classes)
    known = names or (readable(pictures.folders) if pictures.folders is not None else [])
    with evaluating(encoder):
        classifier = chosen_classifier(
            encoder, pictures, names, load_templates(task.templates, known), None, share=share, show=show
        )
    counted = count_batches([(found.rows, found.labels, found.keys)], classifier)
    assert counted is not None, "empty sets are refused when they are embedded"
    numbers, data_hash = counted
    metrics = {
        **encoder_facts(encoder),
        "data": pictures.names,
        "data_hash": data_hash,
        "limit": limit,
        "faults": found.faults,
        **classification_facts(numbers, classifier),
        "versions": versions(),
    }
    return metrics, hit


def probed(
    encoder: Encoder,
    task: ProbeTask,
    recipe: SuiteRecipe,
    limit: int | None,
    cache: Path | None,
    share: Share,
    show: bool,
) -> tuple[dict[str, Any], bool]:
    """A probe of cached or new features; it is fitted on the encoder's device.

    Raises:
        ValueError: Classes without names, class folders that differ, a picture with several labels, and as the probe.
    """
    names: list[str] = [] if task.classes is None else load_classes(task.classes)
    sides: list[Any] = []
    hits, hashes, faults = [], [], {}
    for which, data in (("train", task.train), ("test", task.test)):
        pictures, found, hit = labelled(
            encoder, data, recipe, limit, cache, share, show, features=task.features
        )
        if task.classes is None:
            if pictures.folders is None:
                raise ValueError(f"task {task.name}: shards do not name their classes: give `classes`")
            own = readable(pictures.folders)
            names = names or own
            if own != names:
                raise ValueError(
                    f"task {task.name}: train and test have other class folders: {', '.join(names)} and "
                    f"{', '.join(own)}"
                )
        numbers = [
            one_label(label, names, key, task.name)
            for label, key in zip(found.labels, found.keys, strict=True)
        ]
        sides += [torch.from_numpy(np.array(found.rows)).to(encoder.device), numbers]
        hits.append(hit)
        hashes.append(text_hash([*found.keys, *map(str, numbers)]))
        faults |= {f"{which}: {cause}": count for cause, count in found.faults.items()}
    metrics = {
        **encoder_facts(encoder),
        "data": [*listed(task.train), *listed(task.test)],
        "data_hash": text_hash(hashes),
        "limit": limit,
        "faults": faults,
        "probe": {
            **fitted(task, sides, len(names)),
            "chance": 1 / len(names),
            "train_pictures": len(sides[1]),
            "test_pictures": len(sides[3]),
        },
        "features": task.features,
        "classes_hash": text_hash(names),
        "versions": versions(),
    }
    return metrics, all(hits)


def fitted(task: ProbeTask, sides: list[Any], classes: int) -> dict[str, Any]:
    """The probe's numbers; `accuracy` of a few-shot probe is that of most shots."""
    train, labels, test, target = sides
    if task.probe == "linear":
        return linear_probe(train, labels, test, target, classes)
    if task.probe == "knn":
        return dict(knn_probe(train, labels, test, target, classes, k=min(NEIGHBOURS, len(labels))))
    least = int(np.bincount(labels, minlength=classes).min())
    shots = [count for count in SHOTS if count <= least]
    if not shots:
        raise ValueError(f"task {task.name}: a class has no picture to train on")
    found = few_shot_probe(train, labels, test, target, classes, shots=shots)
    return {"shots": found, "accuracy": found[str(shots[-1])]["accuracy"]}


def one_label(label: Any, names: list[str], key: str, task: str) -> int:
    numbers = class_numbers(label, names, key)
    if len(numbers) != 1:
        raise ValueError(f"task {task}: sample {key!r} has {len(numbers)} labels, a probe needs exactly one")
    return numbers[0]


def listed(data: str | list[str]) -> list[str]:
    return [data] if isinstance(data, str) else list(data)
