"""A contrastive batch of any size in little memory: the features of all, the activations of a few."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.recompute import INSTEAD_OF_BATCH_NORM, batch_norms

Features = tuple[Tensor, ...]


def cached_backward(
    network: Callable[..., Features],
    inputs: tuple[Tensor, ...],
    loss: Callable[[Features], Tensor],
    *,
    micro_batch: int,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    compiled: bool = False,
    passes: int = 0,
) -> Tensor:
    """Loss and gradients of a whole batch, with the activations of `micro_batch` rows at a time.

    Features first, without activations; then the loss on them and its gradient by each feature; then each part
    once more with activations, as if its features' dot product with those gradients were the loss. One more
    forward pass in all: about 4/3 of the time. Random layers draw the same numbers both times.

    Dividing a batch and adding gradients up, which is exact for losses that are means over samples, is wrong
    here: a contrastive loss compares all pairs.

    Args:
        network: Inputs of some rows to features: tensors with a row for each, then scalars that do not depend
            on the inputs (logit_scale, logit_bias).
        inputs: Tensors `(b, ...)`.
        loss: Of the whole batch's features.
        micro_batch: Rows at a time.
        backward: Starts the loss's own backward pass; a gradient scaler scales here.
        no_sync: Holds back DistributedDataParallel's reduction, which the last part does for all.
        compiled: The network is compiled: kernels without a backward pass may draw other random numbers than those
            with one, so that the first pass, too, takes those, and drops what they keep.
        passes: Calls of the network in each of both passes, on ranks that must make as many as the others (FSDP2
            gathers weights in each): a rank of fewer parts runs its first row again, without a gradient.

    Returns:
        The loss, detached. Gradients are added to the parameters' `.grad`.

    Raises:
        ValueError: A micro-batch below 1.

    Reference:
        Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache),
        here with the scalars' gradients as well, so that logit_scale's is exact too.
    """
    if micro_batch < 1:
        raise ValueError(f"expected a micro_batch of at least 1 row, got {micro_batch}")
    parts = list(zip(*(tensor.split(micro_batch) for tensor in inputs), strict=True))
    device = inputs[0].device
    row, idle = tuple(tensor[:1] for tensor in inputs), range(passes - len(parts))
    states, found = [], []
    with nullcontext() if compiled else torch.no_grad(), no_sync():
        for _ in idle:
            network(*row)
        for part in parts:
            states.append(random_state(device))
            found.append([value.detach() for value in network(*part)])
    features = tuple(
        (torch.cat(values) if values[0].ndim else values[0]).detach().requires_grad_()
        for values in zip(*found, strict=True)
    )
    del found
    value = loss(features)
    backward(value)
    gradients = [torch.zeros_like(feature) if feature.grad is None else feature.grad for feature in features]
    # A scalar belongs to no row: the last part has its gradient.
    none = [0.0] * (len(parts) - 1)
    shares = [gradient.split(micro_batch) if gradient.ndim else [*none, gradient] for gradient in gradients]
    after = random_state(device)
    for _ in idle:
        with no_sync():
            (0 * torch.stack([output.sum() for output in network(*row)]).sum()).backward()
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        set_random_state(device, state)
        with no_sync() if number < len(parts) - 1 else nullcontext():
            again = network(*part)
            terms = [(output * share[number]).sum() for output, share in zip(again, shares, strict=True)]
            sum(terms[1:], terms[0]).backward()
    set_random_state(device, after)
    return value.detach()


def require_row_by_row(model: nn.Module) -> None:
    """Refuse a model whose training features depend on what else is in the batch.

    Raises:
        ValueError: It has a batch norm that would take its statistics from each part.
    """
    for name, kind in batch_norms(model):
        raise ValueError(
            f"micro_batch: {name} is a {kind}: it would take its statistics from parts of the batch, and the gradient "
            f"would not be that of the batch. {INSTEAD_OF_BATCH_NORM}, or leave micro_batch out."
        )


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the CPU's generator and the device's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
