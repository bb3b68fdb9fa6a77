"""The gradients of one global batch, in one pass or by GradCache."""

from __future__ import annotations

import math
from collections.abc import Callable

from accelerate import Accelerator
from torch import Tensor

from pretrain.compiled import sizes_vary
from pretrain.gradcache import cached_backward
from pretrain.objectives import Features
from pretrain.recipe import PretrainRecipe
from pretrain.wrapping import Replicas


def backward(
    wrap: Replicas,
    inputs: tuple[Tensor, ...],
    loss: Callable[[Features], Tensor],
    recipe: PretrainRecipe,
    accelerator: Accelerator,
    *,
    rows: int,
    length: int,
) -> Tensor:
    """Leave the global batch's gradients in the parameters.

    Args:
        wrap: What trains.
        inputs: Columns of `pretrain.inputs.input_names`, this rank's rows.
        loss: Of the features of all of this rank's rows, in float32.
        recipe: The run.
        accelerator: Of the run.
        rows: The most that a rank has.
        length: Places of the texts that the network is given.

    Returns:
        This rank's loss.
    """
    images, tokens, *more = inputs
    seen = images, tokens[..., :length].contiguous(), *more

    def network(*part: Tensor) -> Features:
        if recipe.compile:
            sizes_vary(*part)
        with accelerator.autocast():
            features = wrap.wrapped(*part)
        return tuple(feature.float() for feature in features)

    if recipe.micro_batch is None:
        value = loss(network(*seen))
        wrap.backward(value)
        return value
    with wrap.one_step():
        return cached_backward(
            network,
            seen,
            loss,
            micro_batch=recipe.micro_batch,
            backward=accelerator.backward,
            no_sync=wrap.no_sync,
            compiled=recipe.compile,
            passes=math.ceil(rows / recipe.micro_batch) if wrap.gathers else 0,
        )
