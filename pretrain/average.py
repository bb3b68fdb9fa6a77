"""The running average of a model's weights, which is what gets evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pretrain.recipe import EMA, PretrainRecipe
from pretrain.recipe_optim import ScheduleFreeConfig
from pretrain.resolution import resize_image_tower
from pretrain.schedule_free import ScheduleFreeAverage


class WeightAverage:
    """An exponential moving average of all of a model's state, kept beside it.

    It costs one more copy of the weights and one pass over them a step; with it a learning rate that never fell
    gives a model about as good as one at the end of a decay. Every rank keeps its own, and as their weights are
    alike, so are these.

    Weights that never train are equal in both to the last bit. Batch norms' running statistics are averaged over the
    same window as the weights: they describe the activations of past weights, and to first order the statistics of
    averaged weights are the average of the statistics; the newest ones would belong to other weights than the
    average, and measuring them anew would cost passes over the data before each evaluation. Integer buffers
    (`num_batches_tracked`, positions) are copied.

    Args:
        model: Whose state is averaged, from what it is now.
        config: The recipe's `ema`.

    Reference:
        Tarvainen & Valpola 2017, Mean teachers (arXiv 1703.01780); the ramp is TensorFlow's.
    """

    def __init__(self, model: Any, config: EMA):
        self.config = config
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.follow(model)

    def follow(self, model: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Average this model's tensors from now on, by the first one's names and shapes.

        Wrapping a model for several processes may give it other tensors, and so may moving it.
        """
        self.model = model
        pairs = [
            (self.state[name], value) for name, value in model.state_dict().items()
        ]  # shares their memory
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def resize_image_tower(self, size: tuple[int, int]) -> None:
        """Let the average take pictures of another size, before the model does; then `follow` it."""
        with self.in_place():
            visual = deepcopy(self.model.visual)
        resize_image_tower(visual, size)
        self.state |= {f"visual.{name}": value for name, value in visual.state_dict().items()}

    def decay(self, step: int) -> float:
        """How much of the average stays at an update after `step` earlier ones: from 0.1 up to `ema.decay`."""
        return min(self.config.decay, (1 + step) / (10 + step)) if self.config.ramp else self.config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights that an optimiser step left; `step` is the number of those before it."""
        own, live = zip(*self.averaged, strict=True)
        torch._foreach_lerp_(own, live, 1 - self.decay(step))
        for mine, value in self.copied:
            mine.copy_(value)

    @torch.no_grad()
    def exchange(self) -> None:
        """Let the model hold the average, and this the weights that train; once more to undo it."""
        self.follow(self.model)
        for mine, value in (*self.averaged, *self.copied):
            kept = value.clone()
            value.copy_(mine)
            mine.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[dict[str, Tensor]]:
        """The model is the average inside; yields the weights that train, by name."""
        self.exchange()
        try:
            yield self.state
        finally:
            self.exchange()


Average: TypeAlias = WeightAverage | ScheduleFreeAverage


def make_average(model: Any, recipe: PretrainRecipe, saved: Mapping[str, Tensor]) -> Average | None:
    """What the recipe evaluates and saves in place of the weights that train, from what the model is now, if anything.

    Args:
        model: Of the run.
        recipe: All of it.
        saved: The optimiser's tensors of a checkpoint, by `model.NAME|KEY`.
    """
    if isinstance(recipe.optim, ScheduleFreeConfig):
        return ScheduleFreeAverage(model, recipe.optim, saved)
    return WeightAverage(model, recipe.ema) if recipe.ema else None
