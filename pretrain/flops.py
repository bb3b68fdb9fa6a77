"""FLOPs and saved activations of a step, counted from the operators that it runs, without computing anything."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pretrain.collectives import as_one_process
from pretrain.recipe import PretrainRecipe

# Dense peak of matrix products in bf16 with fp32 sums, 1e12 FLOPs/s, by a part of the name that the driver gives.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "GH200": 989.4,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "MI300X": 1307.4,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


@dataclass(frozen=True)
class Count:
    """What a training step of a network takes, per pair."""

    forward: float
    """FLOPs of the forward pass; a multiply-add is two."""
    step: float
    """FLOPs of forward and backward pass."""
    activations: float
    """Bytes that the forward pass leaves for the backward pass, at the network's own precision (float32)."""


def count_flops(
    network: nn.Module,
    image_size: tuple[int, int],
    context: int,
    captions: int = 1,
    views: int = 0,
    *,
    by_shapes: bool = True,
) -> Count:
    """Count a training step of the dual encoder, at its present `requires_grad`.

    Forward and backward pass run on tensors that have shapes and no numbers: a ViT-L takes a second and no memory.
    The count is of matrix products and convolutions (as torch's counter has them); element-wise work is left out, as it
    is in the usual MFU. Two batch sizes tell what each pair costs from what is there once.

    Args:
        network: Takes uint8 images `(b, 3, h, w)` and int64 tokens `(b, context)` or `(b, k, context)`; left as it is.
        image_size: Height and width, pixels.
        context: Tokens of a text.
        captions: Texts of an image, k.
        views: Further views of an image, v: uint8 `(b, v, 3, h, w)` is then a third input.
        by_shapes: False computes a few rows for real. So are networks counted that decide by values (the attention
            masks of some transformers text towers), which shapes do not have.

    Returns:
        FLOPs and bytes per pair.
    """
    modes = {layer: layer.training for layer in network.modules()}
    device = next(network.parameters()).device
    counted = partial(run, network, image_size, context, captions, views)
    network.train()
    try:
        with as_one_process(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            if by_shapes:
                try:
                    with FakeTensorMode():
                        one, two = (counted(rows, None) for rows in (2, 4))
                    return Count(*((b - a) / 2 for a, b in zip(one, two, strict=True)))
                except DataDependentOutputException:
                    pass
            one, two = (counted(rows, device) for rows in (2, 4))
            return Count(*((b - a) / 2 for a, b in zip(one, two, strict=True)))
    finally:
        for layer, training in modes.items():
            layer.training = training


def run(
    network: nn.Module,
    image_size: tuple[int, int],
    context: int,
    captions: int,
    views: int,
    rows: int,
    device: torch.device | None,
) -> tuple[int, int, int]:
    """FLOPs of the forward pass, of both, and bytes saved, of one batch; device None in a fake mode."""
    stand_ins = {
        **{name: stand_in(value, device) for name, value in network.named_parameters()},
        **{name: stand_in(value, device).clone() for name, value in network.named_buffers()},
    }
    fixed = {storage_of(value) for value in stand_ins.values()}
    saved: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        if storage_of(value) not in fixed:
            saved[storage_of(value)] = value  # held, so that its storage is not another's later
        return value

    images = torch.zeros(rows, 3, *image_size, dtype=torch.uint8, device=device)
    tokens = torch.ones(rows, captions, context, dtype=torch.int64, device=device)
    more = [images[:, None].expand(-1, views, -1, -1, -1)] if views else []
    inputs = images, tokens.squeeze(1) if captions == 1 else tokens, *more
    counter = FlopCounterMode(display=False)
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            outputs: Any = torch.func.functional_call(network, stand_ins, inputs)
            total = torch.stack([value.float().sum() for value in outputs]).sum()
        forward = counter.get_total_flops()
        kept = sum(value.untyped_storage().nbytes() for value in saved.values())
        if total.requires_grad:
            total.backward()
    return forward, counter.get_total_flops(), kept


def stand_in(value: Tensor, device: torch.device | None) -> Tensor:
    """The parameter itself, but with a gradient of its own; with device None one of its shape and memory layout."""
    if device is None:
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    else:
        made = value.detach()
    return made.requires_grad_(value.requires_grad)


def storage_of(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def loss_flops(batch_size: int, embed_dim: int) -> float:
    """FLOPs of a contrastive loss per pair: one row of logits, forward, and two products with it, backward."""
    return 6.0 * batch_size * embed_dim


def view_flops(recipe: PretrainRecipe) -> float:
    """FLOPs per pair of the contrast of further views: two rows of logits, each with two views of all pictures."""
    term = recipe.terms and recipe.terms.self_supervision
    return 24.0 * recipe.batch_size * term.embed_dim if term else 0.0


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU, FLOPs/s; None for those that we have no figure of, and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), None)
