"""`retrieval classify`: zero-shot classification of a labelled set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pairstream.progress import ProgressBar
from pretrain.encoder import Encoder
from retrieval.classification import ClassificationCount, multilabel_map
from retrieval.classifier import Classifier, build_classifier
from retrieval.embed import evaluating
from retrieval.labelled import LabelledPictures, class_numbers, readable
from retrieval.prompts import Templates
from retrieval.provenance import encoder_facts, text_hash, versions

TIES = "by expectation over the orders of equal scores"


@dataclass(frozen=True)
class Classification:
    """What was measured.

    Attributes:
        metrics: Plain data; `metrics["classification"]` has the numbers.
        classifier: What was used.
    """

    metrics: dict[str, Any]
    classifier: Classifier


def classify(
    encoder: Encoder,
    data: str | Path | Sequence[str],
    *,
    classes: Sequence[str] | None = None,
    templates: Templates | None = None,
    classifier: Classifier | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    workers: int = 0,
    max_faults: float = 0.01,
    show: bool = False,
) -> Classification:
    """Classify a labelled set by the class whose prompts are nearest.

    Pictures are streamed: memory does not grow with the set, but for `4 * dim` bytes a picture where pictures
    have several labels, since mean average precision ranks all of them.

    Args:
        encoder: The model.
        data: Shards with `label` or `KEY.cls`, or a folder of class folders.
        classes: Class names in the order of the labels; None takes the folders' names.
        templates: Templates for all classes, or prompts by class; None is "a photo of a {}.".
        classifier: A classifier of this model to be used instead of names and templates.
        batch_size: Pictures at a time.
        limit: Only the first so many pictures.
        workers: Loader processes.
        max_faults: Share of bad pictures past which it stops.
        show: Show progress.

    Returns:
        Numbers with all that is needed to understand them.

    Raises:
        ValueError: Class names for shards are missing, folders and classes differ in number, a label outside
            the classes, a classifier of another model, no usable picture, or an embedding that is not finite.

    Example:
        >>> classify(encoder, "flowers/", templates=["a photo of a {}, a flower."])       # doctest: +SKIP
    """
    began = time.perf_counter()
    pictures = LabelledPictures(
        data,
        encoder.transform,
        batch_size=batch_size,
        limit=limit,
        workers=workers,
        max_faults=max_faults,
    )
    if classifier is not None:
        if classes is not None or templates is not None:
            raise ValueError("a saved classifier has its classes and templates: give either it or them")
        classifier.check_model(encoder.fingerprint, encoder.name)
        names = classifier.names
    elif classes is not None:
        names = list(classes)
    elif pictures.folders is not None:
        names = readable(pictures.folders)
    else:
        raise ValueError(f"{', '.join(pictures.names)}: shards do not name their classes: give --classes")
    if pictures.folders is not None and len(pictures.folders) != len(names):
        raise ValueError(
            f"{pictures.names[0]}: {len(pictures.folders)} class folders, but {len(names)} classes: "
            "expected one name for each folder, in alphabetical order of the folders"
        )
    with evaluating(encoder):
        if classifier is None:
            classifier = build_classifier(encoder, names, templates or ["a photo of a {}."], show=show)
        built = time.perf_counter()
        count = ClassificationCount(classifier.weights, names)
        kept: list[np.ndarray] = []
        labels: list[list[int]] = []
        keys: list[str] = []
        several = False
        with ProgressBar("classify", pictures.steps, show=show) as bar:
            for batch in pictures.batches():
                rows = encoder.encode_images(batch.images).cpu()
                numbers = [
                    class_numbers(label, names, key)
                    for label, key in zip(batch.labels, batch.keys, strict=True)
                ]
                listed = any(isinstance(label, list) for label in batch.labels)
                if listed and not several and keys:
                    raise ValueError(
                        f"sample {batch.keys[0]!r} has a list of labels, earlier ones have one label"
                    )
                several = several or listed
                if several:
                    kept.append(rows.numpy())
                else:
                    count.add(rows, [each[0] for each in numbers])
                labels += numbers
                keys += batch.keys
                bar.advance(note=f"{len(keys)} pictures")
    if not keys:
        raise ValueError(
            f"none of the first {pictures.wanted} samples of {', '.join(pictures.names)} can be used: {pictures.faults}"
        )
    numbers = multilabel_map(np.concatenate(kept), classifier.weights, labels) if several else count.result()
    metrics = {
        **encoder_facts(encoder),
        "data": pictures.names,
        "data_hash": text_hash([*keys, *(repr(each) for each in labels)]),
        "limit": limit,
        "faults": pictures.faults,
        "classification": numbers,
        "classes_hash": text_hash(names),
        "templates_hash": classifier.templates_hash,
        "prompts": classifier.prompts,
        "ties": TIES,
        "seconds": {
            "classifier": round(built - began, 3),
            "pictures": round(time.perf_counter() - built, 3),
        },
        "versions": versions(),
    }
    return Classification(metrics, classifier)
