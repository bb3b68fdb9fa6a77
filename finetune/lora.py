"""LoRA and DoRA on the language model, through peft: added, saved beside the base, and opened again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from finetune.recipe_model import Lora
from pairstream.errors import require
from pretrain.checkpoint import save_tensors

ADAPTER = "adapter.safetensors"


def add_lora(model: nn.Module, config: Lora) -> nn.Module:
    """Put adapters into a model, in place; its other weights are frozen.

    The module stays what it is (class, `generate`, configuration): only the adapted layers are replaced.

    Args:
        model: A language model of transformers', or any module when `config.targets` names its layers.
        config: Rank, scale, dropout, DoRA and targets.

    Raises:
        ImportError: peft is not installed.
        ValueError: No layer has one of the target names.
    """
    require("peft", "finetune", "LoRA")
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - any number is right
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules=list(config.targets) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layers
    )
    try:
        inject_adapter_in_model(peft_config, model)
    except ValueError as error:
        raise ValueError(f"lora.targets {list(config.targets)}: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def has_lora(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any("lora_" in name for name, _ in model.named_parameters())


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """For a block, a model as it was before its adapters, so that it is saved as any other (of 8 or 4 bits, too)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, BaseTunerLayer)
    ]
    for parent, name, layer in adapted:
        setattr(parent, name, layer.get_base_layer())
    try:
        yield
    finally:
        for parent, name, layer in adapted:
            setattr(parent, name, layer)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapters alone."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_tensors({name: value.detach().cpu().contiguous() for name, value in state.items()}, folder / ADAPTER)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Give adapters that `add_lora` made the weights that were saved.

    Raises:
        ValueError: They do not fit.
    """
    from peft import set_peft_model_state_dict

    state = load_file(folder / ADAPTER)
    own = {name for name, _ in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        result: Any = set_peft_model_state_dict(model, state)
    absent = sorted(own & set(result.missing_keys))
    if absent or result.unexpected_keys:
        raise ValueError(f"{folder / ADAPTER} does not fit: {absent or list(result.unexpected_keys)}")
