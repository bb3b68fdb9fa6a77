"""Pictures with two kinds of objects and a text for each: the ground truth that heatmaps are held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.samples import RawSample, Shards, index_shards, read_sample
from data.scenes.draw import decode_mask
from data.scenes.language import article, counted
from data.scenes.vocabulary import alike, kinds
from data.shards import Sample
from data.tar import ShardReader
from data.transforms import decode_image
from pretrain.encoder import Encoder

KNOWN = 0.95  # a text must score above this share of the texts about absent kinds


@dataclass(frozen=True)
class Trials:
    """Pairs of a picture and a text; two neighbours (2i, 2i + 1) have the picture in common.

    Attributes:
        images: uint8 `(n, 3, h, w)`, as the model takes them.
        texts: One for each: it names one of the two kinds.
        target: bool `(n, h, w)`, masks of what the text names.
        distractor: bool `(n, h, w)`, masks of the other kind.
        boxes: bool `(n, h, w)`, boxes of what the text names.
        tried: Pictures that were looked at.
        unknown: Those of them that were left out because the model does not know what they show.
    """

    images: Tensor
    texts: list[str]
    target: Tensor
    distractor: Tensor
    boxes: Tensor
    tried: int
    unknown: int


@dataclass(frozen=True)
class Raw:
    """One picture with the masks of its two kinds."""

    image: Tensor
    names: tuple[str, str]
    texts: tuple[str, str]
    masks: Tensor
    boxes: Tensor
    colours: tuple[str, str] = ("", "")
    counts: tuple[int, int] = (1, 1)


def scene_samples(count: int, size: int, seed: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Fresh scenes of the validation split: pictures and records."""
    from data.adapters.scenes import samples

    for sample in samples("val", seed=seed, count=count, size=max(size, 64)):
        if isinstance(sample, Sample):  # always: what is composed cannot be missing
            yield sample.image, dict(sample.meta)


def shard_samples(shards: Shards) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Pictures and records of shards."""
    reader, number = ShardReader(), 0
    for index in index_shards(shards):
        for place in range(len(index)):
            sample: RawSample = read_sample(index, place, number, reader)
            number += 1
            yield sample.image, sample.record


def describe(objects: list[dict[str, Any]]) -> str:
    """`two red hearts` for the objects of one kind."""
    name, colour = objects[0]["name"], objects[0]["colour"]
    known = kinds().get(name)
    return counted(len(objects), name, adjectives=colour if colour and known and known.colourful else "")


def read_trial(encoder: Encoder, image: bytes, record: dict[str, Any]) -> Raw | None:
    """A picture of exactly two kinds; None for others, and where cropping left nothing of one kind.

    Raises:
        ValueError: Objects without a name, a mask or a box.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in record.get("objects") or []:
        if not {"name", "mask", "box", "colour"} <= set(item):
            raise ValueError(
                "objects need name, colour, box and mask to hold heatmaps against, as scenes have them; "
                f"got {sorted(item)}"
            )
        groups.setdefault(item["name"], []).append(item)
    if len(groups) != 2:
        return None
    masks, boxes = [], []
    for objects in groups.values():
        mask = np.any([decode_mask(item["mask"]) for item in objects], axis=0)
        box = np.zeros_like(mask)
        for item in objects:
            left, top, right, bottom = item["box"]
            box[top:bottom, left:right] = True
        masks.append(in_view(encoder, mask))
        boxes.append(in_view(encoder, box))
    if not all(bool(mask.any()) for mask in masks):
        return None
    one, other = groups
    texts = describe(groups[one]), describe(groups[other])
    pixels = encoder.preprocess(decode_image(image))
    colours = groups[one][0]["colour"] or "", groups[other][0]["colour"] or ""
    counts = len(groups[one]), len(groups[other])
    return Raw(pixels, (one, other), texts, torch.stack(masks), torch.stack(boxes), colours, counts)


def in_view(encoder: Encoder, mask: np.ndarray) -> Tensor:
    """A mask through the same resizing and cropping as its picture."""
    image = torch.from_numpy(mask.astype(np.uint8) * 255).expand(3, -1, -1).contiguous()
    return encoder.transform(image)[0] > 127


def make_trials(
    encoder: Encoder, samples: Iterable[tuple[bytes, dict[str, Any]]], pictures: int, *, known: bool = True
) -> Trials:
    """Collect trials.

    An explanation of what a model does not know cannot be held against the picture. So a picture counts only where
    both its texts score above 95 % of the texts about kinds that are absent; how many did not is told.

    Args:
        encoder: The model.
        samples: Pictures with records.
        pictures: So many, two trials each.
        known: Leave out what the model does not know.

    Raises:
        ValueError: Not one picture is left.
    """
    names = list(kinds())
    rows = encoder.encode_texts([article(name) for name in names])
    kept: list[Raw] = []
    tried = unknown = 0
    for image, record in samples:
        if len(kept) == pictures:
            break
        raw = read_trial(encoder, image, record)
        if raw is None:
            continue
        tried += 1
        if known:
            row = encoder.encode_images(raw.image[None])[0]
            absent = torch.tensor([not any(alike(name, one) for one in raw.names) for name in names])
            others = (rows @ row)[absent.to(row.device)]
            own = encoder.encode_texts(raw.texts) @ row
            if not bool(((own[:, None] > others).double().mean(1) > KNOWN).all()):
                unknown += 1
                continue
        kept.append(raw)
    if not kept:
        raise ValueError(
            f"no picture to hold heatmaps against: {tried} with two kinds of objects, of which the model knows none "
            "(its texts do not score above those of absent kinds). Train it on such pictures, or give other --data"
        )
    return as_trials(kept, tried, unknown)


def as_trials(raws: Sequence[Raw], tried: int, unknown: int) -> Trials:
    """Two trials of each picture, one for each of its kinds."""
    return Trials(
        images=torch.stack([raw.image for raw in raws]).repeat_interleave(2, 0),
        texts=[text for raw in raws for text in raw.texts],
        target=torch.cat([raw.masks for raw in raws]),
        distractor=torch.cat([raw.masks.flip(0) for raw in raws]),
        boxes=torch.cat([raw.boxes for raw in raws]),
        tried=tried,
        unknown=unknown,
    )
