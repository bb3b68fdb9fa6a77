"""`retrieval classify`: zero-shot classification of a labelled set."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pairstream.progress import ProgressBar
from pretrain.encoder import Encoder
from retrieval.classification import ClassificationCount, multilabel_map
from retrieval.classifier import Classifier, build_classifier
from retrieval.embed import evaluating
from retrieval.labelled import Label, LabelledPictures, class_numbers, readable
from retrieval.probes import image_features
from retrieval.prompts import Templates
from retrieval.provenance import encoder_facts, text_hash, versions
from retrieval.share import ALONE, Share

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
        limit: Only so many pictures: the first of shards, or spread evenly over class folders.
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
    with evaluating(encoder):
        classifier = chosen_classifier(encoder, pictures, classes, templates, classifier, show=show)
        built = time.perf_counter()
        with ProgressBar("classify", pictures.steps, show=show) as bar:
            found = count_batches(embedded(encoder, pictures, bar), classifier)
    if found is None:
        raise ValueError(
            f"none of the first {pictures.wanted} samples of {', '.join(pictures.names)} can be used: {pictures.faults}"
        )
    numbers, data_hash = found
    metrics = {
        **encoder_facts(encoder),
        "data": pictures.names,
        "data_hash": data_hash,
        "limit": limit,
        "faults": pictures.faults,
        **classification_facts(numbers, classifier),
        "seconds": {
            "classifier": round(built - began, 3),
            "pictures": round(time.perf_counter() - built, 3),
        },
        "versions": versions(),
    }
    return Classification(metrics, classifier)


def chosen_classifier(
    encoder: Encoder,
    pictures: LabelledPictures,
    classes: Sequence[str] | None,
    templates: Templates | None,
    classifier: Classifier | None,
    *,
    share: Share = ALONE,
    show: bool = False,
) -> Classifier:
    """The classifier that is given, or one of the names that are given or that the folders have."""
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
    templates = templates or ["a photo of a {}."]
    return classifier or build_classifier(encoder, names, templates, share=share, show=show)


Embedded: TypeAlias = Iterable[tuple[np.ndarray, Sequence[Label], Sequence[str]]]


def embedded(
    encoder: Encoder,
    pictures: LabelledPictures,
    bar: ProgressBar,
    share: Share = ALONE,
    *,
    features: str = "embedding",
) -> Embedded:
    """Rows, labels and keys, batch by batch.

    Args:
        encoder: The model.
        pictures: The set.
        bar: Told of each batch.
        share: The part of the batches that this process does.
        features: `embedding`, or `before_projection` for what `retrieval.probes.image_features` gives.
    """
    encode = partial(image_features, encoder) if features == "before_projection" else encoder.encode_images

    def mine() -> Embedded:
        done = 0
        for batch in pictures.batches(share):
            rows = encode(batch.images).cpu().numpy()
            done += len(batch.keys)
            bar.advance(note=f"{done} pictures")
            yield rows, batch.labels, batch.keys

    return share.together(mine())


def count_batches(batches: Embedded, classifier: Classifier) -> tuple[dict[str, Any], str] | None:
    """The numbers of embedded pictures, and the hash of their keys and labels; None where there are none.

    Raises:
        ValueError: A label outside the classes, or lists of labels beside single ones.
    """
    count = ClassificationCount(classifier.weights, classifier.names)
    kept: list[np.ndarray] = []
    labels: list[list[int]] = []
    keys: list[str] = []
    several: bool | None = None
    for rows, found, names in batches:
        for label, key in zip(found, names, strict=True):
            if several is not None and isinstance(label, list) != several:
                raise ValueError(f"sample {key!r}: expected a list of labels for all pictures or for none")
            several = isinstance(label, list)
        numbers = [
            class_numbers(label, classifier.names, key) for label, key in zip(found, names, strict=True)
        ]
        if several:
            kept.append(rows)
        else:
            count.add(rows, [each[0] for each in numbers])
        labels += numbers
        keys += names
    if not keys:
        return None
    numbers = multilabel_map(np.concatenate(kept), classifier.weights, labels) if several else count.result()
    for each in numbers.get("confusions", []):
        each["examples"] = [keys[place] for place in each["examples"]]
    return numbers, text_hash([*keys, *(repr(each) for each in labels)])


def classification_facts(numbers: dict[str, Any], classifier: Classifier) -> dict[str, Any]:
    """The numbers with what the classifier was made of."""
    return {
        "classification": numbers,
        "class_names": classifier.names,
        "classes_hash": text_hash(classifier.names),
        "templates_hash": classifier.templates_hash,
        "prompts": classifier.prompts,
        "ties": TIES,
    }
