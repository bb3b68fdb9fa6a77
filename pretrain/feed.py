"""From a recipe's `data` to the stream of pairs that a rank trains on."""

from __future__ import annotations

from data.mixture import Source
from data.stream import PairStream, pair_stream
from data.transforms import TrainTransform
from pretrain.encoder import Encoder
from pretrain.recipe import PretrainRecipe


def open_stream(recipe: PretrainRecipe, encoder: Encoder, rank: int, world: int) -> PairStream:
    """The training pairs of one rank.

    Raises:
        ValueError: The set cannot be read, the batch is larger than it, or cannot be split over the ranks.
    """
    if recipe.batch_size % world:
        raise ValueError(
            f"batch_size {recipe.batch_size} (over all ranks) cannot be split over {world} processes: "
            f"take a multiple of {world}"
        )
    sources = [
        word if isinstance(word, str) else Source(**word.model_dump())
        for word in ((recipe.data.train,) if isinstance(recipe.data.train, str) else recipe.data.train)
    ]
    stream = pair_stream(
        sources,
        transform=TrainTransform(
            encoder.image_size,
            scale=recipe.data.crop_scale,
            hflip=recipe.data.hflip,
            color_jitter=recipe.data.color_jitter,
        ),
        tokenize=encoder.tokenizer,
        captions=recipe.data.captions,
        word_dropout=recipe.data.word_dropout,
        scaled_decode=recipe.data.scaled_decode,
        captions_per_image=recipe.data.captions_per_image,
        batch_size=recipe.batch_size // world,
        seed=recipe.seed,
        shuffle=recipe.data.shuffle,
        rank=rank,
        world_size=world,
        workers=recipe.data.workers,
        max_faults=recipe.data.max_faults,
        cache_dir=recipe.data.cache_dir,
        cache_limit=round(recipe.data.cache_gb * 1e9) if recipe.data.cache_gb else None,
        temperature=recipe.data.temperature,
        mix=recipe.data.mix,
    )
    if stream.samples < recipe.batch_size:
        raise ValueError(
            f"batch_size {recipe.batch_size} is larger than the whole set ({stream.samples} samples in "
            f"{recipe.data.names}): the pairs of a batch must differ. Take a smaller batch or more data."
        )
    return stream
