"""Models whose weights are drawn anew, from the output backwards: an explanation must change with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pretrain.encoder import Encoder


def cascade(encoder: Encoder, stages: int = 4, seed: int = 0) -> Iterator[tuple[float, Encoder]]:
    """Encoders whose image tower is more and more random, beginning with what comes last in its forward pass.

    Matrices are drawn anew with their own mean and spread; vectors (norms, biases) are shuffled, so that activations
    keep their size. The text tower stays.

    Args:
        encoder: The trained encoder; left as it is.
        stages: How many; the last has no trained weight in its image tower.
        seed: Of the draws.

    Yields:
        The share of random parameters (by module), and the encoder.

    Reference:
        Adebayo et al. 2018, cascading randomisation.
    """
    changed = copy.copy(encoder)
    changed.model = copy.deepcopy(encoder.model)
    owners = modules_by_time(changed)
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for stage in range(1, stages + 1):
        upto = round(len(owners) * stage / stages)
        for module in owners[done:upto]:
            for parameter in module.parameters(recurse=False):
                redraw(parameter, generator)
        done = upto
        yield done / len(owners), changed


@torch.no_grad()
def redraw(parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Draw one tensor anew."""
    value = parameter.detach().float().cpu()
    if value.ndim < 2:
        new = value.reshape(-1)[torch.randperm(value.numel(), generator=generator)].view(value.shape)
    else:
        new = torch.randn(value.shape, generator=generator) * value.std() + value.mean()
    parameter.copy_(new.to(parameter))


def modules_by_time(encoder: Encoder) -> list[nn.Module]:
    """The image tower's modules that have parameters of their own, last in the forward pass first.

    A module that is never called itself (a projection inside attention) goes with the one around it.
    """
    tower: nn.Module = encoder.model.visual
    finished: dict[nn.Module, int] = {}

    def note(module: nn.Module, *_: Any) -> None:
        finished[module] = len(finished)

    handles = [module.register_forward_hook(note) for module in tower.modules()]
    try:
        with torch.no_grad():
            tower(encoder.pixels(torch.zeros(1, 3, *encoder.image_size, dtype=torch.uint8)))
    finally:
        for handle in handles:
            handle.remove()
    time: dict[nn.Module, int] = {}
    for name, module in tower.named_modules():
        around = name
        while tower.get_submodule(around) not in finished:
            around = around.rpartition(".")[0]
        time[module] = finished[tower.get_submodule(around)]
    own = [module for module in time if any(True for _ in module.parameters(recurse=False))]
    return sorted(own, key=lambda module: time[module], reverse=True)
