"""Pictures with class labels, from shards or from a folder with one subfolder for each class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.faults import Fault, FaultLog, FaultRecord
from data.loading import as_it_is, start_worker
from data.pictures import MAX_PIXELS
from data.samples import RawSample
from data.stream import PairStream
from data.transforms import EvalTransform, decode_image
from pairstream.errors import nearest
from retrieval.share import ALONE, Share

Label: TypeAlias = int | str | list  # a class number, its name, or several of either
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


@dataclass(frozen=True)
class LabelledBatch:
    """Pictures with their labels as they were found.

    Attributes:
        images: uint8 `(b, 3, h, w)`.
        labels: One for each picture.
        keys: Names of the pictures, for messages and reports.
    """

    images: torch.Tensor
    labels: list[Label]
    keys: list[str]


@dataclass(frozen=True)
class LabelledRow:
    """Loads one sample of a shard: its picture and its `label`."""

    transform: EvalTransform

    def __call__(self, sample: RawSample, rng: np.random.Generator) -> tuple[torch.Tensor, Label]:
        label = sample.record.get("label")
        if label is None:
            raise Fault("missing_label", "no label in KEY.json and no KEY.cls")
        if isinstance(label, bool | float | dict):
            raise Fault("bad_label", f"expected a class number, its name or a list of them, got {label!r}")
        return self.transform(decode_image(sample.image, max_pixels=MAX_PIXELS)), label


@dataclass(frozen=True)
class LabelledCollate:
    """Stacks rows; `size` is for a batch that holds none."""

    size: tuple[int, int]

    def __call__(self, rows: list[tuple[torch.Tensor, Label]]) -> dict[str, Any]:
        empty = torch.zeros((0, 3, *self.size), dtype=torch.uint8)
        return {
            "images": torch.stack([image for image, _ in rows]) if rows else empty,
            "labels": [label for _, label in rows],
        }


class LabelledPictures:
    """A set of labelled pictures, read in batches in its own order.

    Args:
        data: A folder with a subfolder of pictures for each class, or shards whose JSON has `label` (or that
            have `KEY.cls`): folders, files, globs, braces or URLs.
        transform: The encoder's.
        batch_size: Pictures at a time.
        limit: Only the first so many of shards, or so many spread evenly over class folders; None for all.
        workers: Loader processes; 0 decodes in this one.
        max_faults: Share of bad pictures past which the work stops.

    Attributes:
        folders: Names of the class folders in the order of their labels; None for shards.
        faults: Pictures left out so far, by cause.

    Raises:
        ValueError: No pictures, a limit below 1, or bad shards.
        FileNotFoundError: Nothing there.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str],
        transform: EvalTransform,
        *,
        batch_size: int = 64,
        limit: int | None = None,
        workers: int = 0,
        max_faults: float = 0.01,
    ):
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 picture, got {limit}")
        names = [str(data)] if isinstance(data, str | Path) else [str(name) for name in data]
        self.names, self.transform, self.batch_size, self.limit = names, transform, batch_size, limit
        self.workers, self.max_faults = workers, max_faults
        self.folders: list[str] | None = None
        self.stream: PairStream | None = None
        self.counts: dict[str, int] = {}
        folder = Path(names[0])
        if len(names) == 1 and folder.is_dir() and not any(folder.glob("*.tar")):
            self.folders, self.files = class_folders(folder)
            if limit is not None:  # the first ones would all be of the first class
                self.files = [self.files[place] for place in spaced(len(self.files), limit)]
            self.total = len(self.files)
        else:
            self.stream = PairStream(
                names,
                LabelledRow(transform),
                LabelledCollate(transform.size),
                batch_size=batch_size,
                shuffle=False,
                workers=workers,
                max_faults=max_faults,
            )
            self.total = self.stream.samples
        self.wanted = self.total if limit is None else min(limit, self.total)
        self.steps = -(-self.wanted // batch_size)

    @property
    def faults(self) -> dict[str, int]:
        return self.stream.faults if self.stream is not None else dict(self.counts)

    def batches(self, share: Share = ALONE) -> Iterator[LabelledBatch]:
        """The pictures of a share, in order."""
        steps = share.of(self.steps)
        if self.stream is None:
            yield from self.folder_batches(steps.start * self.batch_size, steps.stop * self.batch_size)
            return
        for batch in self.stream.iterate(steps.start, steps.stop):
            kept = int((batch.indices < self.wanted).sum())
            if kept:
                yield LabelledBatch(batch["images"][:kept], batch["labels"][:kept], batch.keys[:kept])

    def folder_batches(self, start: int, stop: int) -> Iterator[LabelledBatch]:
        loader = DataLoader(
            FolderRows(Path(self.names[0]), self.files[start : min(stop, self.wanted)], self.transform),
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=as_it_is,
            generator=torch.Generator(),  # or the loader would change torch's global state
            worker_init_fn=start_worker if self.workers else None,
        )
        log = FaultLog(self.max_faults)
        for rows in loader:
            good = [row for row in rows if not isinstance(row[0], FaultRecord)]
            log.add([row[0] for row in rows if isinstance(row[0], FaultRecord)], len(rows))
            self.counts = dict(log.counts)
            log.judge()
            if good:
                images, labels, keys = zip(*good, strict=True)
                yield LabelledBatch(torch.stack(images), list(labels), list(keys))
        log.judge(final=True)
        log.summarise(self.names[0])


class FolderRows(Dataset):
    """The pictures of class folders; a bad one comes as its `FaultRecord`."""

    def __init__(self, folder: Path, files: Sequence[tuple[Path, int]], transform: EvalTransform):
        self.folder, self.files, self.transform = folder, files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor | FaultRecord, int, str]:
        path, label = self.files[number]
        key = folder_key(self.folder, path)
        try:
            return self.transform(decode_image(path.read_bytes(), max_pixels=MAX_PIXELS)), label, key
        except Fault as fault:
            return FaultRecord(fault.cause, printable(str(path.parent)), key, fault.detail), label, key


def folder_key(folder: Path, path: Path) -> str:
    """A picture's name in its set."""
    return printable(path.relative_to(folder).as_posix())


def class_folders(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names and the pictures with their labels, both in alphabetical order, as torchvision's ImageFolder.

    Raises:
        ValueError: No class folders, or no pictures in one.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = []
    for label, name in enumerate(names):
        mine = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not mine:
            raise ValueError(f"{folder / name}: no pictures there ({', '.join(SUFFIXES)})")
        files += [(path, label) for path in mine]
    if len(names) < 2:
        raise ValueError(
            f"{folder}: expected shards (*.tar), or two or more folders of pictures named as their classes, "
            f"found {len(names)} folders"
        )
    return names, files


def class_numbers(label: Label, classes: Sequence[str], key: str) -> list[int]:
    """A label as class numbers: one, or several for a picture with several classes.

    Raises:
        ValueError: A number outside the class list, a name that is not in it, or that is in it twice.
    """
    numbers = []
    for each in label if isinstance(label, list) else [label]:
        if isinstance(each, str) and each not in classes and each.strip().isdecimal():
            each = int(each)  # what KEY.cls holds
        if isinstance(each, int) and not isinstance(each, bool):
            if not 0 <= each < len(classes):
                raise ValueError(
                    f"sample {key!r}: label {each} is outside the list of {len(classes)} classes "
                    f"(0 to {len(classes) - 1}): is this the right --classes?"
                )
            numbers.append(each)
            continue
        places = [number for number, name in enumerate(classes) if name == each]
        if len(places) != 1:
            what = "is twice in" if places else "is not in"
            hint = nearest(str(each), classes) if not places else ""
            raise ValueError(
                f"sample {key!r}: label {each!r} {what} the list of {len(classes)} classes{hint}; "
                "label with numbers, or give the right --classes"
            )
        numbers.append(places[0])
    return numbers


def spaced(total: int, count: int) -> list[int]:
    """At most `count` numbers below `total`, evenly spaced, each once."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def readable(names: Iterable[str]) -> list[str]:
    """Folder names as words: `sea_snake` is a sea snake; bytes that are no UTF-8 become U+FFFD."""
    return [printable(name).replace("_", " ").strip() for name in names]


def printable(name: str) -> str:
    """A file's name as text that can be written and encoded."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
