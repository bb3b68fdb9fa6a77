"""Keeping what pretraining gave: parts that wait for others (LP-FT), a pull to the starting weights (L2-SP), attacks on
word embeddings (FGM)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.families import begin
from finetune.recipe import FinetuneRecipe, Waits


def starting_weights(recipe: FinetuneRecipe, prefix: str) -> dict[str, Tensor]:
    """The pretrained towers' parameters under the names that the task model has for them.

    Read from the recipe's own `model`, so that a resumed run is pulled to the same weights.

    Args:
        recipe: Which encoder.
        prefix: `image_tower.` or `towers.`.
    """
    encoder = begin(recipe, "auto")
    module: nn.Module = encoder.model.visual if prefix == "image_tower." else encoder.model
    return {f"{prefix}{name}": value.detach().clone() for name, value in module.named_parameters()}


def waiting(model: nn.Module, waits: Waits, towers: str, step: int) -> dict[str, nn.Parameter]:
    """The parameters that are to train and do not yet, by name.

    Args:
        model: The task model.
        waits: Until which step its parts wait.
        towers: What the names of the towers' parameters begin with.
        step: Optimiser steps taken.
    """
    until = {towers: waits.towers, "language_model.": waits.language_model}
    prefixes = tuple(prefix for prefix, begins in until.items() if step < begins)
    return {
        name: parameter
        for name, parameter in (model.named_parameters() if prefixes else ())
        if parameter.requires_grad and name.startswith(prefixes)
    }


@torch.no_grad()
def pull_back(optimizer: torch.optim.Optimizer, start: Mapping[str, Tensor], strength: float) -> None:
    """Move each parameter by `strength` times its learning rate of the way back to where it began.

    Parameters without a gradient, which the optimiser passed over, stay.

    Reference:
        Xuhong et al. 2018 (L2-SP); decoupled from the gradient as Loshchilov and Hutter 2019 decouple the decay, so
        that AdamW's scaling leaves it alone.
    """
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in start and parameter.grad is not None:
                parameter.lerp_(start[name], min(1.0, group["lr"] * strength))


@contextmanager
def perturbed(table: nn.Parameter, size: float) -> Iterator[None]:
    """Word embeddings moved along their gradient, to where the loss grows fastest, for a block; then as they were.

    Args:
        table: With the gradient of the loss.
        size: Euclidean norm of the move.

    Raises:
        ValueError: The embeddings do not train.

    Reference:
        Miyato et al. 2017 (FGM); the table moves as a whole, as in the usual reimplementations, not each text's words.
    """
    if table.grad is None:
        raise ValueError(
            "adversarial moves the word embeddings along their gradient, and they do not train: leave it at 0, or let "
            "the text tower (language model) train"
        )
    kept = table.detach().clone()
    with torch.no_grad():
        norm = table.grad.norm()
        table.add_(table.grad * (size / norm.clamp(min=1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            table.copy_(kept)
