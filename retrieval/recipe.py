"""The recipe of a suite: which tasks several models are measured on. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pairstream.recipe import Config


class RetrievalTask(Config):
    """Image-text retrieval over the pairs of some shards."""

    kind: Literal["retrieval"] = "retrieval"
    name: str
    """What it is called in tables and file names."""
    data: str | list[str]
    """Shards: folders, files, globs, braces or URLs."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many samples."""
    folds: int | None = Field(None, ge=1)
    """Also the mean over so many consecutive parts (5 of 1,000 for COCO-1k)."""


class ClassificationTask(Config):
    """Zero-shot classification of labelled pictures."""

    kind: Literal["classification"] = "classification"
    name: str
    """What it is called in tables and file names."""
    data: str | list[str]
    """A folder of class folders, or shards with labels."""
    classes: str | None = None
    """imagenet, cifar10, cifar100 or a file; the folders' names when None."""
    templates: str = "plain"
    """imagenet, simple, cifar, plain or a file."""
    limit: int | None = Field(None, ge=1)
    """Only so many pictures: spread evenly over class folders, the first of shards."""


class CompositionalTask(Config):
    """Winoground, SugarCrepe, ARO or WinoGAViL."""

    kind: Literal["compositional"] = "compositional"
    name: str
    """What it is called in tables and file names."""
    set: Literal["winoground", "sugarcrepe", "aro_relation", "aro_attribute", "aro_order", "winogavil"]
    """Which set."""
    folder: str
    """Where its annotations are."""
    images: str | None = None
    """Where its pictures are; FOLDER/images when None."""
    limit: int | None = Field(None, ge=1)
    """Only so many cases, spread evenly over the set."""


class ProbeTask(Config):
    """A probe of frozen image features: linear by the CLIP paper's protocol, nearest neighbours, or few-shot."""

    kind: Literal["probe"] = "probe"
    name: str
    """What it is called in tables and file names."""
    probe: Literal["linear", "knn", "few_shot"] = "linear"
    """Which one."""
    train: str | list[str]
    """A folder of class folders, or shards with labels."""
    test: str | list[str]
    """The same of other pictures."""
    classes: str | None = None
    """imagenet, cifar10, cifar100 or a file; the folders' names when None."""
    features: Literal["before_projection", "embedding"] = "before_projection"
    """A ViT's features before its projection, as the paper takes, or unit rows of the common space."""
    limit: int | None = Field(None, ge=1)
    """Only so many pictures of both: spread evenly over class folders, the first of shards."""


Task = Annotated[
    RetrievalTask | ClassificationTask | CompositionalTask | ProbeTask, Field(discriminator="kind")
]


class SuiteRecipe(Config):
    """A table of tasks for several models."""

    out: str
    """The folder of results: one JSON for each model and task, and the page."""
    tasks: list[Task] = Field(min_length=1)
    """What is measured."""
    cache: str | None = "~/.cache/pairstream/embeddings"
    """Where embeddings are kept for the next time; None keeps none."""
    batch_size: int = Field(default=64, ge=1)
    """Pictures at a time."""
    workers: int = Field(default=0, ge=0)
    """Loader processes."""
    max_faults: float = Field(default=0.01, ge=0, lt=1)
    """Share of bad samples past which a task stops."""
    quick_limit: int = Field(default=500, ge=1)
    """Samples of each task with --quick."""

    @field_validator("tasks")
    @classmethod
    def names_differ(cls, tasks: list[Task]) -> list[Task]:
        names = [task.name for task in tasks]
        for name in names:
            if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
                raise ValueError(f"task name {name!r}: expected letters, digits, '-', '_' and '.'")
            if names.count(name) > 1:
                raise ValueError(f"the task name {name!r} is given twice")
        return tasks
