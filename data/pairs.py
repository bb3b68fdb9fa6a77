"""Pictures with captions: a sample becomes a row, and rows a batch of uint8 images and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate

from data.buffers import Column, Columns
from data.faults import Fault
from data.labels import LabelTexts
from data.mixture import Source
from data.pictures import MAX_PIXELS, Picture
from data.samples import RawSample
from data.stored import SUFFIX, Stored, require_same_settings, unpack
from data.transforms import EvalTransform, TrainTransform, as_planes

CAPTIONS = ("random", "first", "longest", "all")


class Told(NamedTuple):
    """What a stored teacher said of a row: of the view that the student sees, and of its caption."""

    image: torch.Tensor
    """float32 `(d,)`"""
    text: torch.Tensor
    logit_scale: float
    model: int


class Pair(NamedTuple):
    """One sample as it goes into a batch."""

    image: torch.Tensor
    """uint8 `(3, h, w)`, of any layout"""
    texts: list[str]
    told: Mapping[str, Told] = MappingProxyType({})
    """By stored teacher."""
    views: torch.Tensor | None = None
    """uint8 `(2, 3, h, w)`"""


@dataclass(frozen=True)
class PairLoad:
    """Decode and transform a picture, and choose among its captions.

    Attributes:
        transform: A picture uint8 (3, H, W) to uint8 (3, h, w).
        captions: `random` (drawn anew each epoch), `first`, `longest` (most characters) or `all`.
        max_pixels: Larger pictures are faults.
        word_dropout: Share of a caption's words that are left out, drawn anew each epoch; one always stays.
        scaled_decode: Decode large JPEGs at a reduced size (`TrainTransform.load`).
        captions_per_image: How many captions `random` draws, without replacement as long as there are enough.
        rewritten_key: JSON key of captions that a model wrote anew, a text or a list of texts.
        rewritten_share: Probability with which, each epoch anew, a picture that has such captions takes them in
            place of its own.
        stored: Teachers whose embeddings lie in the shards (`data.stored`); the picture is then one of the views that
            they saw, drawn anew each epoch.
        views: Gives two more views of the whole picture.
        labels: Makes texts of the labels of samples that have one; the others keep their captions.

    Raises:
        ValueError: `scaled_decode` with an evaluation transform, whose pixels are meant to be exact, or with views;
            only one of the two that rewritten captions need; or stored teachers with texts or pictures that they did
            not see.
    """

    transform: EvalTransform | TrainTransform
    captions: str = "random"
    max_pixels: int = MAX_PIXELS
    word_dropout: float = 0.0
    scaled_decode: bool = False
    captions_per_image: int = 1
    rewritten_key: str | None = None
    rewritten_share: float = 0.0
    stored: tuple[str, ...] = ()
    views: TrainTransform | None = None
    labels: LabelTexts | None = None

    def __post_init__(self) -> None:
        if self.scaled_decode and not isinstance(self.transform, TrainTransform):
            raise ValueError(
                f"scaled_decode is for TrainTransform, got {type(self.transform).__name__}: leave it out"
            )
        if self.scaled_decode and self.views is not None:
            raise ValueError(
                "views are of the whole picture, scaled_decode decodes it for one crop: leave scaled_decode out"
            )
        if self.captions_per_image > 1 and self.captions != "random":
            raise ValueError(
                f"captions_per_image {self.captions_per_image} with captions {self.captions!r}: several are drawn, "
                "expected 'random'"
            )
        if (self.rewritten_key is None) != (self.rewritten_share == 0) or not 0 <= self.rewritten_share <= 1:
            raise ValueError(
                "rewritten captions need their JSON key and a share above 0, up to 1, got rewritten_key "
                f"{self.rewritten_key!r} and rewritten_share {self.rewritten_share}"
            )
        if self.stored and (
            not isinstance(self.transform, TrainTransform)
            or self.captions == "all"
            or self.captions_per_image > 1
            or self.word_dropout
            or self.rewritten_key
            or self.labels
        ):
            raise ValueError(
                f"stored teachers ({', '.join(self.stored)}) saw single whole captions and pictures as TrainTransform "
                "makes them: leave out word_dropout, captions_per_image, captions 'all', rewritten captions and labels"
            )

    @property
    def members(self) -> tuple[str, ...]:
        """Extensions of the files that it needs beside picture and captions."""
        return tuple(f"{name}.{SUFFIX}" for name in self.stored)

    def __call__(
        self,
        sample: RawSample,
        rng: np.random.Generator,
        places: Mapping[str, torch.Tensor] | None = None,
    ) -> Pair:
        """Make a sample's row, its `images` and `views` in the places for them where there are such."""
        # Before the picture: a missing caption then costs no decoding.
        own = texts = (self.labels.texts(sample) if self.labels else []) or sample.captions()
        if self.rewritten_key and rng.random() < self.rewritten_share:
            texts = sample.captions(self.rewritten_key) or texts
        if not texts:
            label = f"no {self.labels.key} and " if self.labels else ""
            raise Fault("missing_caption", f"{label}no caption in KEY.json and no text in KEY.txt")
        chosen = self.choose(texts, rng)
        texts = [texts[number] for number in chosen]
        if self.word_dropout:
            texts = [drop_words(text, self.word_dropout, rng) for text in texts]
        told, source = self.recall(sample, len(own), chosen[0], rng)
        picture = Picture(sample.image, max_pixels=self.max_pixels)
        place = None if places is None else places["images"]
        if self.scaled_decode and isinstance(self.transform, TrainTransform):
            image, views = self.transform.apply_reduced(picture, source, place), None
        else:
            pixels = as_planes(picture.pixels(borrowed=True))
            image = self.transform.apply(pixels, source, place)
            views = None if self.views is None else torch.stack([self.views(pixels, rng) for _ in range(2)])
        if places is not None:
            image = image if image is place else places["images"].copy_(image)
            views = None if views is None else places["views"].copy_(views)
        return Pair(image, texts, told, views)

    def choose(self, texts: list[str], rng: np.random.Generator) -> list[int]:
        """Numbers of the captions that are taken."""
        if self.captions == "random":
            return draw_captions(len(texts), self.captions_per_image, rng)
        if self.captions == "longest":
            return [max(range(len(texts)), key=lambda number: len(texts[number]))]
        return [0] if self.captions == "first" else list(range(len(texts)))

    def recall(
        self, sample: RawSample, captions: int, caption: int, rng: np.random.Generator
    ) -> tuple[dict[str, Told], np.random.Generator]:
        """What the stored teachers said, and the random numbers of the view that they said it of.

        Raises:
            Fault: `bad_teacher`.
            ValueError: They saw another augmentation.
        """
        if not self.stored:
            return {}, rng
        found: dict[str, Stored] = {}
        for name in self.stored:
            if f"{name}.{SUFFIX}" not in sample.members:
                raise Fault("bad_teacher", f"no KEY.{name}.{SUFFIX}")
            found[name] = unpack(sample.members[f"{name}.{SUFFIX}"], name, captions)
            assert isinstance(self.transform, TrainTransform)
            require_same_settings(found[name], self.transform, name)
        seeds = next(iter(found.values())).seeds
        if any(not np.array_equal(seeds, stored.seeds) for stored in found.values()):
            raise Fault("bad_teacher", f"{', '.join(found)} saw different views: store them in one go")
        view = int(rng.integers(len(seeds)))
        told = {
            name: Told(
                torch.from_numpy(stored.images[view].astype(np.float32)),
                torch.from_numpy(stored.texts[caption].astype(np.float32)),
                stored.logit_scale,
                stored.model,
            )
            for name, stored in found.items()
        }
        return told, np.random.default_rng(int(seeds[view]))


def own_captions(source: Source, load: PairLoad) -> Source:
    """A source that loads by its own choice of captions.

    Raises:
        ValueError: A choice that is unknown, or that cannot be mixed with the stream's.
    """
    captions = source.captions or load.captions
    if captions not in CAPTIONS:
        raise ValueError(
            f"source {source.name}: captions {captions!r}: expected one of {', '.join(CAPTIONS)}"
        )
    if (captions == "all") != (load.captions == "all"):
        raise ValueError(
            f"source {source.name}: its captions {captions!r} and the stream's {load.captions!r} cannot stand in one "
            "batch"
        )
    try:
        own = replace(
            load,
            captions=captions,
            rewritten_key=source.rewritten_key,
            rewritten_share=source.rewritten_share or 0.0,
        )
    except ValueError as error:
        raise ValueError(f"source {source.name}: {error}") from error
    return replace(source, load=own)


def draw_captions(total: int, count: int, rng: np.random.Generator) -> list[int]:
    """Draw captions of one picture by their numbers; none comes twice before each has come once.

    Example:
        >>> draw_captions(2, 3, np.random.default_rng(0))
        [1, 0, 1]
    """
    if count == 1:
        return [int(rng.integers(total))]
    order = rng.permutation(total)
    return [int(order[place % total]) for place in range(count)]


def drop_words(text: str, share: float, rng: np.random.Generator) -> str:
    """Leave out each word of a text with a probability, but never all of them.

    Example:
        >>> drop_words("a dog runs on the beach", 0.5, np.random.default_rng(0))
        'a the beach'
    """
    words = text.split()
    kept = [word for word, draw in zip(words, rng.random(len(words)), strict=True) if draw >= share]
    return " ".join(kept) if kept else text


@dataclass(frozen=True)
class PairCollate:
    """Stack pictures and tokenise all captions of a batch at once.

    Attributes:
        tokenize: Texts to int64 (n, context).
        size: (height, width) of the pictures, for a batch that holds none.
        captions: As in `PairLoad`.
        captions_per_image: As in `PairLoad`; tokens of more than one are (b, captions_per_image, context).
        stored: As in `PairLoad`: `NAME.image` and `NAME.text` float32 (b, d), and `NAME.scale` float32 (b,).
        views: (height, width) of two more views of each picture, where rows have them: `views`, uint8 (b, 2, 3, h, w).
    """

    tokenize: Callable[[Sequence[str]], torch.Tensor]
    size: tuple[int, int]
    captions: str = "random"
    captions_per_image: int = 1
    stored: tuple[str, ...] = ()
    views: tuple[int, int] | None = None

    @property
    def columns(self) -> Columns:
        """What `PairLoad` puts in place; nothing where the rest of a batch cannot be put together from parts."""
        if self.captions == "all" or self.stored:
            return {}
        columns = {"images": Column((3, *self.size), torch.uint8, channels_last=True)}
        return columns | ({"views": Column((2, 3, *self.views), torch.uint8)} if self.views else {})

    def __call__(self, rows: list[Pair], placed: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
        texts = [text for row in rows for text in row.texts]
        if placed is not None:
            images = placed["images"]
        elif rows:
            # The channels of a pixel stay side by side, as decoding and resizing have them: to pull them apart costs a
            # twentieth of a 256 px picture's time, and the device does it for nothing as it normalises.
            images = default_collate(
                [row.image.permute(1, 2, 0) for row in rows]
            )  # a worker's, in shared memory
            images = images.permute(0, 3, 1, 2)  # (b, h, w, 3) -> (b, 3, h, w)
        else:
            images = torch.zeros((0, 3, *self.size), dtype=torch.uint8)
        tokens = self.tokenize(texts) if rows else self.tokenize([""])[:0]
        if self.captions_per_image > 1:
            tokens = tokens.view(len(rows), self.captions_per_image, tokens.shape[-1])
        batch = {"images": images, "tokens": tokens.to(torch.int64), "texts": texts}
        if self.captions == "all":
            counts = torch.tensor([len(row.texts) for row in rows], dtype=torch.int64)
            batch["image_of_text"] = torch.repeat_interleave(torch.arange(len(rows)), counts)  # (n_texts,)
        if self.views and placed is not None:
            batch["views"] = placed["views"]
        elif self.views:
            none = images.new_zeros((0, 2, 3, *self.views))
            batch["views"] = (
                torch.stack([row.views for row in rows if row.views is not None]) if rows else none
            )
        for name in self.stored:
            batch |= stack_told(name, [row.told[name] for row in rows])
        return batch


def stack_told(name: str, rows: list[Told]) -> dict[str, torch.Tensor]:
    """A stored teacher's columns of a batch.

    Raises:
        ValueError: The rows are of different models.
    """
    if len({(row.model, len(row.image)) for row in rows}) > 1:
        raise ValueError(
            f"the embeddings of the stored teacher {name!r} are of different models in different shards: store those "
            "of one model under one name"
        )
    if not rows:
        return {
            f"{name}.image": torch.zeros(0, 1),
            f"{name}.text": torch.zeros(0, 1),
            f"{name}.scale": torch.zeros(0),
        }
    return {
        f"{name}.image": torch.stack([row.image for row in rows]),
        f"{name}.text": torch.stack([row.text for row in rows]),
        f"{name}.scale": torch.tensor([row.logit_scale for row in rows], dtype=torch.float32),
    }
