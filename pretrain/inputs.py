"""What a recipe's steps take from the stream: its columns, in the order in which network and objective get them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data.labels import LabelTexts
from data.mixture import Source
from data.stream import PairStream, pair_stream
from data.transforms import TrainTransform
from pretrain.encoder import Encoder
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_loss import DistillationConfig, GlobalContrastConfig, TermsConfig

WIDTH = 8  # of a stored teacher's stand-in


def stored_teachers(recipe: PretrainRecipe) -> tuple[str, ...]:
    """Names of the teachers whose embeddings come with the samples."""
    return recipe.loss.stored if isinstance(recipe.loss, DistillationConfig) else ()


def input_names(recipe: PretrainRecipe) -> tuple[str, ...]:
    """Columns of a batch that a step takes: pictures, tokens, and what the loss needs beside them.

    Those that the network takes come first.
    """
    told = [f"{name}.{column}" for name in stored_teachers(recipe) for column in ("image", "text", "scale")]
    views = ["views"] if recipe.views else []
    known = ["indices"] if isinstance(recipe.loss, GlobalContrastConfig) else []
    return "images", "tokens", *views, *known, *told


def random_inputs(
    recipe: PretrainRecipe, encoder: Encoder, rows: int, generator: torch.Generator, word: str
) -> tuple[Tensor, ...]:
    """Noise for the columns of `input_names`, of an encoder's sizes, on the CPU.

    Args:
        recipe: The run.
        encoder: The student.
        rows: Pairs.
        generator: Of the noise.
        word: Stands in every text, so that those of others differ.
    """
    made: dict[str, Tensor] = {
        "images": torch.randint(
            0, 256, (rows, 3, *encoder.image_size), dtype=torch.uint8, generator=generator
        ),
        "tokens": encoder.tokenize([f"{number} pictures of {word}" for number in range(rows)]),
    }
    if recipe.views:
        made["views"] = torch.randint(
            0, 256, (rows, 2, 3, *encoder.image_size), dtype=torch.uint8, generator=generator
        )
    made["indices"] = torch.arange(rows)
    for name in stored_teachers(recipe):
        for column in ("image", "text"):
            noise = torch.randn(rows, WIDTH, generator=generator)
            made[f"{name}.{column}"] = torch.nn.functional.normalize(noise, dim=-1)
        made[f"{name}.scale"] = torch.full((rows,), 10.0)
    return tuple(made[name] for name in input_names(recipe))


def views_of(terms: TermsConfig | None, size: tuple[int, int]) -> TrainTransform | None:
    """How the further views of a picture are made; None where no term wants them."""
    config = terms and terms.self_supervision
    return config and TrainTransform(
        size,
        scale=config.crop_scale,
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        grayscale=config.grayscale,
    )


def open_stream(recipe: PretrainRecipe, encoder: Encoder, rank: int, world: int) -> PairStream:
    """The training pairs of a rank.

    Raises:
        ValueError: A batch that cannot be split over the processes, or is larger than the whole set; or as
            `pair_stream` does.
    """
    if recipe.batch_size % world:
        raise ValueError(
            f"batch_size {recipe.batch_size} (over all ranks) cannot be split over {world} processes: "
            f"take a multiple of {world}"
        )
    data = recipe.data
    sources: list[Any] = [
        word if isinstance(word, str) else Source(**word.model_dump())
        for word in ((data.train,) if isinstance(data.train, str) else data.train)
    ]
    stream = pair_stream(
        sources,
        transform=TrainTransform(
            encoder.image_size, scale=data.crop_scale, hflip=data.hflip, color_jitter=data.color_jitter
        ),
        tokenize=encoder.tokenizer,
        captions=data.captions,
        word_dropout=data.word_dropout,
        scaled_decode=data.scaled_decode,
        captions_per_image=data.captions_per_image,
        labels=LabelTexts(**data.labels.model_dump()) if data.labels else None,
        stored=stored_teachers(recipe),
        views=views_of(recipe.terms, encoder.image_size),
        batch_size=recipe.batch_size // world,
        seed=recipe.seed,
        shuffle=data.shuffle,
        rank=rank,
        world_size=world,
        workers=data.workers,
        max_faults=data.max_faults,
        cache_dir=data.cache_dir,
        cache_limit=round(data.cache_gb * 1e9) if data.cache_gb else None,
        temperature=data.temperature,
        mix=data.mix,
    )
    if stream.samples < recipe.batch_size:
        raise ValueError(
            f"batch_size {recipe.batch_size} is larger than the whole set ({stream.samples} samples in "
            f"{data.names}): the pairs of a batch must differ. Take a smaller batch or more data."
        )
    return stream
