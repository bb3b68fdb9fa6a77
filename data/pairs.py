"""Pictures with captions: a sample becomes a row, and rows a batch of uint8 images and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from data.faults import Fault
from data.pictures import MAX_PIXELS, Picture
from data.samples import RawSample
from data.transforms import EvalTransform, TrainTransform, decode_image

CAPTIONS = ("random", "first", "longest", "all")


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

    Raises:
        ValueError: `scaled_decode` with an evaluation transform, whose pixels are meant to be exact; or only one of
            the two that rewritten captions need.
    """

    transform: EvalTransform | TrainTransform
    captions: str = "random"
    max_pixels: int = MAX_PIXELS
    word_dropout: float = 0.0
    scaled_decode: bool = False
    captions_per_image: int = 1
    rewritten_key: str | None = None
    rewritten_share: float = 0.0

    def __post_init__(self) -> None:
        if self.scaled_decode and not isinstance(self.transform, TrainTransform):
            raise ValueError(
                f"scaled_decode is for TrainTransform, got {type(self.transform).__name__}: leave it out"
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

    def __call__(self, sample: RawSample, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
        texts = sample.captions()  # before the picture: a missing caption then costs no decoding
        if self.rewritten_key and rng.random() < self.rewritten_share:
            texts = sample.captions(self.rewritten_key) or texts
        if not texts:
            raise Fault("missing_caption", "no caption in KEY.json and no text in KEY.txt")
        if self.captions == "random":
            texts = draw_captions(texts, self.captions_per_image, rng)
        elif self.captions == "first":
            texts = texts[:1]
        elif self.captions == "longest":
            texts = [max(texts, key=len)]
        if self.word_dropout:
            texts = [drop_words(text, self.word_dropout, rng) for text in texts]
        if self.scaled_decode and isinstance(self.transform, TrainTransform):
            return self.transform.load(Picture(sample.image, max_pixels=self.max_pixels), rng), texts
        return self.transform(decode_image(sample.image, max_pixels=self.max_pixels), rng), texts


def draw_captions(texts: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Draw captions of one picture; none comes twice before each has come once.

    Example:
        >>> draw_captions(["a dog", "a brown dog"], 3, np.random.default_rng(0))
        ['a brown dog', 'a dog', 'a brown dog']
    """
    if count == 1:
        return [texts[rng.integers(len(texts))]]
    order = rng.permutation(len(texts))
    return [texts[int(order[place % len(order)])] for place in range(count)]


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
    """

    tokenize: Callable[[Sequence[str]], torch.Tensor]
    size: tuple[int, int]
    captions: str = "random"
    captions_per_image: int = 1

    def __call__(self, rows: list[tuple[torch.Tensor, list[str]]]) -> dict[str, Any]:
        texts = [text for _, several in rows for text in several]
        if rows:
            images = default_collate(
                [image for image, _ in rows]
            )  # (b, 3, h, w); a worker's, in shared memory
            tokens = self.tokenize(texts)
        else:
            images = torch.zeros((0, 3, *self.size), dtype=torch.uint8)
            tokens = self.tokenize([""])[:0]
        if self.captions_per_image > 1:
            tokens = tokens.view(len(rows), self.captions_per_image, tokens.shape[-1])
        batch = {"images": images, "tokens": tokens.to(torch.int64), "texts": texts}
        if self.captions == "all":
            counts = torch.tensor([len(several) for _, several in rows], dtype=torch.int64)
            batch["image_of_text"] = torch.repeat_interleave(torch.arange(len(rows)), counts)  # (n_texts,)
        return batch
