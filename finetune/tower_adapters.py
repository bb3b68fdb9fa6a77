"""LoRA and DoRA in the image tower: added, saved so that training goes on exactly, and opened again."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from finetune.recipe_model import TowerLora
from pretrain.adapters import LowRank, add_adapters
from pretrain.checkpoint import save_tensors
from pretrain.encoder import Encoder
from pretrain.recipe import LoRA

FILE = "tower_adapters.safetensors"
INSIDE = ".parametrizations."


def adapt_image_tower(encoder: Encoder, config: TowerLora, folder: Path | None = None) -> None:
    """Give the image tower adapters, new ones or those of a saved model.

    A saved model's encoder has them added, so that stock open_clip and prediction need not know of them. To go on
    training bit for bit, the adapters and the matrices under them are read from the file beside it.

    Args:
        encoder: Changed in place; nothing happens for rank 0.
        config: Rank, scale, DoRA.
        folder: A saved task model; new adapters on top of its encoder when it has none.

    Raises:
        ValueError: Nothing to adapt, or saved adapters of another rank.
    """
    if not config.rank:
        return
    add_adapters(encoder.model, LoRA(towers=("image",), **config.model_dump()))
    if folder is None or not (folder / FILE).is_file():
        return
    tower, state = encoder.model.visual, load_file(folder / FILE)
    own = {name: value for name, value in tower.state_dict().items() if INSIDE in name}
    if {name: value.shape for name, value in own.items()} != {
        name: value.shape for name, value in state.items()
    }:
        raise ValueError(
            f"{folder / FILE} has other adapters than tower_lora {config.model_dump()}: a model that goes on keeps its "
            "own, so give them as `tower_lora`"
        )
    with torch.no_grad():
        tower.load_state_dict(state, strict=False)


def save_tower_adapters(encoder: Encoder, folder: Path) -> None:
    """Write the adapters, and the matrices under them, if there are some."""
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in encoder.model.visual.state_dict().items()
        if INSIDE in name
    }
    if state:
        save_tensors(state, folder / FILE)


def train_adapters_alone(tower: nn.Module) -> None:
    """Freeze all but the adapters of a tower that has some."""
    layers = [layer for layer in tower.modules() if isinstance(layer, LowRank)]
    free = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for parameter in tower.parameters():
        if layers and id(parameter) not in free:
            parameter.requires_grad_(False)
