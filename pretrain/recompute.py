"""Activation checkpointing: a tower's blocks keep their inputs only, and are run again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

INSTEAD_OF_BATCH_NORM = (
    "Take a tower with another normalisation (a ViT), lock this one (phases: image_groups: 0)"
)


def recompute_activations(model: Any, on: bool = True) -> None:
    """Let towers and decoder recompute the activations of their blocks in the backward pass, or keep them again.

    Memory falls to the blocks' inputs and one block's activations, for one more forward pass (about 4/3 of the
    time). Random layers draw the same numbers again. open_clip's own switch is not used where it does nothing or
    cannot be switched back.

    Args:
        model: An open_clip model.
        on: Whether to.

    Raises:
        ValueError: A tower that cannot, or whose own switch would change nothing.
    """
    visual, text = model.visual, getattr(model, "text", model)
    if isinstance(visual, VisionTransformer):
        visual.transformer.grad_checkpointing = on
    elif isinstance(visual, TimmModel):
        try:
            trunk: Any = visual.trunk
            trunk.set_grad_checkpointing(on)
        except (AssertionError, AttributeError, TypeError) as error:
            raise cannot(f"timm's {type(visual.trunk).__name__}") from error
    else:
        raise cannot(f"an image tower {type(visual).__name__}")
    if isinstance(text, HFTextEncoder):
        backbone: Any = text.transformer
        if not backbone.supports_gradient_checkpointing:
            raise cannot(f"transformers' {type(backbone).__name__}")
        # Of another name before transformers 5.20 or so.
        word = "activation" if hasattr(backbone, "activation_checkpointing_enable") else "gradient"
        if on:
            getattr(backbone, f"{word}_checkpointing_enable")({"use_reentrant": False})
            backbone.disable_input_require_grads()  # else a locked tower would have a backward pass
        else:
            getattr(backbone, f"{word}_checkpointing_disable")()
    else:
        text.transformer.grad_checkpointing = on
    if hasattr(model, "text_decoder"):  # CoCa's
        model.text_decoder.grad_checkpointing = on


def cannot(tower: str) -> ValueError:
    """The error about a tower."""
    return ValueError(
        f"checkpoint_activations: {tower} cannot recompute its activations. Take a ViT, leave the key out, or hold "
        "fewer rows at a time (micro_batch)."
    )


def require_no_statistics(model: nn.Module) -> None:
    """Refuse batch norms in training: run again, they would move their running statistics twice a step.

    Raises:
        ValueError: There is one.
    """
    for name, kind in batch_norms(model):
        raise ValueError(
            f"checkpoint_activations: {name} is a {kind}, which would move its running statistics "
            f"twice a step. {INSTEAD_OF_BATCH_NORM}, or leave checkpoint_activations out."
        )


def batch_norms(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names and classes of the batch norms that would take statistics of what they see now."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            yield name, type(layer).__name__
