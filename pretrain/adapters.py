"""LoRA towers: their matrices stay, and small ones that are added to them train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pretrain.locks import image_projection, text_projection, tower_parts
from pretrain.recipe import LoRA


class LowRank(nn.Module):
    """What a weight is with its adapter: `weight + alpha / rank * up @ down`; the weight itself at first.

    A parametrization of torch's, so that whatever reads the weight gets it with the adapter, functional code too.
    peft's wrappers do not suit open_clip: its attention reads `out_proj.weight` without calling `out_proj`, whose
    adapter is then silently dead, and peft's wrapper of whole attentions adds and subtracts the adapter at each
    forward pass, so that locked weights drift by rounding.

    Args:
        weight: Float `(rows, columns)`.
        rank: Columns of `up` and rows of `down`.
        alpha: The adapter counts alpha / rank times.
        dora: Learn the length of each row apart from its direction.

    Reference:
        Hu et al. 2021, LoRA (arXiv 2106.09685), section 4.1. Liu et al. 2024, DoRA (arXiv 2402.09353), equation 5, with
        no gradient through the norm (section 4.3).
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, dora: bool = False):
        super().__init__()
        rows, columns = weight.shape
        options: Any = {"device": weight.device, "dtype": weight.dtype}
        self.down = nn.Parameter(torch.empty(rank, columns, **options))
        self.up = nn.Parameter(torch.zeros(rows, rank, **options))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.length = nn.Parameter(row_lengths(weight)) if dora else None
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its adapter, `(rows, columns)`."""
        adapted = torch.addmm(weight, self.up, self.down, alpha=self.scale)
        return adapted if self.length is None else adapted * (self.length / row_lengths(adapted))


def row_lengths(weight: Tensor) -> Tensor:
    """Euclidean length of each row, `(rows, 1)`, without a gradient."""
    return torch.linalg.vector_norm(weight.detach(), dim=1, keepdim=True)


def add_adapters(model: Any, config: LoRA) -> int:
    """Give the matrices of linear layers and attentions of a dual encoder's towers their adapters.

    Projections are left alone: they train whole.

    Args:
        model: open_clip's module, changed in place; its outputs stay as they are.
        config: The recipe's `lora`.

    Returns:
        How many matrices have one.

    Raises:
        ValueError: A tower has no such layers.
    """
    count = 0
    for tower in config.towers:
        found = 0
        apart = {id(layer) for part in projection_of(model, tower) for layer in inside(part)}
        layers = [layer for part in tower_parts(model, f"{tower}_groups") for layer in inside(part)]
        for layer in layers:
            for name in matrices(layer) if id(layer) not in apart else ():
                adapter = LowRank(getattr(layer, name), config.rank, config.alpha, config.dora)
                parametrize.register_parametrization(layer, name, adapter)
                found += 1
        if not found:
            raise ValueError(
                f"lora.towers: the {tower} tower has no linear layers or attentions to adapt; take it out of the list, "
                "or take a transformer"
            )
        count += found
    return count


def matrices(layer: nn.Module) -> tuple[str, ...]:
    """The tensors of a layer that get adapters."""
    if isinstance(layer, nn.MultiheadAttention):
        whole = layer.in_proj_weight is not None
        return ("in_proj_weight",) if whole else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ("weight",) if isinstance(layer, nn.Linear) else ()


def projection_of(model: Any, tower: str) -> list[nn.Module | nn.Parameter]:
    return image_projection(model) if tower == "image" else text_projection(model)


def inside(part: nn.Module | nn.Parameter) -> Iterator[nn.Module]:
    return part.modules() if isinstance(part, nn.Module) else iter(())


def lock_all_but_adapters(model: Any, config: LoRA) -> None:
    """Let nothing of the adapted towers train but projections, and those adapters whose layers a phase lets train."""
    for tower in config.towers:
        parts = tower_parts(model, f"{tower}_groups")
        layers = [layer for part in projection_of(model, tower) for layer in inside(part)]
        layers += [layer for part in parts for layer in inside(part) if isinstance(layer, LowRank)]
        free = {id(part) for part in projection_of(model, tower) if isinstance(part, nn.Parameter)}
        free |= {id(value) for layer in layers for value in layer.parameters(recurse=False)}
        for part in parts:
            for value in [part] if isinstance(part, nn.Parameter) else part.parameters():
                if id(value) not in free:
                    value.requires_grad = False


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state as one without adapters would have it: each weight with its adapter added."""
    state = model.state_dict()
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer):
            of_adapters = f"{name}.parametrizations."
            state = {key: value for key, value in state.items() if not key.startswith(of_adapters)}
            for tensor in adapted(layer):
                state[f"{name}.{tensor}"] = getattr(layer, tensor).detach()
    return state


def merge_adapters(model: nn.Module) -> None:
    """Add all adapters to their weights for good; the model is then one without."""
    for layer in list(model.modules()):
        if parametrize.is_parametrized(layer):
            for tensor in adapted(layer):
                parametrize.remove_parametrizations(layer, tensor, leave_parametrized=True)


def adapted(layer: nn.Module) -> list[str]:
    """Names of a layer's tensors that have adapters."""
    return list(layer.parametrizations)  # pyright: ignore[reportArgumentType]
