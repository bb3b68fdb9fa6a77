"""What a frozen image tower makes of the training pictures, kept in memory so that each is encoded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.faults import Fault
from data.samples import RawSample
from data.stream import PairStream
from finetune.recipe import FinetuneRecipe
from finetune.samples import ImageCollate, ImageLoad
from pairstream.progress import ProgressBar


@dataclass(frozen=True)
class Present:
    """Loads a training sample without its picture, unless that was found to be bad when its tokens were made.

    Attributes:
        load: Loads all but the picture.
        bad: Numbers of the samples whose pictures have no tokens.
    """

    load: Any
    bad: frozenset[int]

    def __call__(self, sample: RawSample, rng: np.random.Generator) -> Any:
        if sample.index in self.bad:
            raise Fault("undecodable_image", "as it was found when the tokens of all pictures were made")
        return self.load(sample, rng)


def keep_image_tokens(recipe: FinetuneRecipe, model: Any, *, show: bool) -> tuple[Tensor, frozenset[int]]:
    """The frozen tower's tokens of all training pictures, in main memory.

    Every rank keeps all of them: an epoch deals the pictures anew.

    Args:
        recipe: Whose training shards.
        model: The task model.
        show: Show the progress.

    Returns:
        `(samples, n, token_dim)`; and the numbers of the samples that have none, since they cannot be decoded.
    """
    encoder = model.encoder
    stream = PairStream(
        recipe.data.train,
        ImageLoad(encoder.transform),
        ImageCollate(encoder.image_size),
        batch_size=64,
        shuffle=False,
        workers=recipe.data.workers,
        max_faults=recipe.data.max_faults,
    )
    kept: Tensor | None = None
    bad = set(range(stream.samples))
    with ProgressBar("encode", stream.batches_per_epoch, show=show) as bar, torch.no_grad():
        for batch in stream.epoch():
            tokens = model.image_tokens(batch["images"]).cpu()
            if kept is None:
                kept = torch.zeros((stream.samples, *tokens.shape[1:]), dtype=tokens.dtype)
            kept[batch.indices] = tokens
            bad -= set(batch.indices.tolist())
            bar.advance()
    assert kept is not None, "an epoch has at least one batch"
    return kept, frozenset(bad)
