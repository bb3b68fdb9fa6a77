"""What a frozen image tower makes of the training pictures, kept in memory so that each is encoded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data.stream import PairStream
from finetune.recipe import FinetuneRecipe
from finetune.samples import ImageCollate, ImageLoad
from pairstream.progress import ProgressBar


def keep_image_tokens(recipe: FinetuneRecipe, model: Any, *, show: bool) -> Tensor:
    """The frozen tower's tokens of all training pictures, `(samples, n, token_dim)`, in main memory.

    Every rank keeps all of them: an epoch deals the pictures anew.

    Args:
        recipe: Whose training shards.
        model: The task model.
        show: Show the progress.
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
    with ProgressBar("encode", stream.batches_per_epoch, show=show) as bar, torch.no_grad():
        for batch in stream.epoch():
            tokens = model.image_tokens(batch["images"]).cpu()
            if kept is None:
                kept = torch.zeros((stream.samples, *tokens.shape[1:]), dtype=tokens.dtype)
            kept[batch.indices] = tokens
            bar.advance()
    assert kept is not None, "an epoch has at least one batch"
    return kept
