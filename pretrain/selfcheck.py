"""`--check-gradients`: whether these processes, as they run here, train with the gradient of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.collectives import as_one_process, gather_counts, gather_rows
from pretrain.encoder import Encoder
from pretrain.inputs import random_inputs
from pretrain.objectives import Objective
from pretrain.recipe import PretrainRecipe

ROWS = 3
"""Pairs of each rank; the first has one more, where there are several."""
TOLERANCE = 1e-3
"""Largest relative difference of a part's gradient, computed in float32."""


def check_gradients(
    network: nn.Module,
    encoder: Encoder,
    objective: Objective,
    accelerator: Accelerator,
    recipe: PretrainRecipe,
    *,
    tolerance: float = TOLERANCE,
) -> dict[str, tuple[float, float]]:
    """Compare the gradient that DistributedDataParallel leaves with that of one process and all rows.

    A few random pictures and texts, another number of them on the first rank, go through the actual model,
    wrapping, exchange and loss; each rank then computes the same by itself on everybody's rows. In evaluation
    mode (no dropout, stored batch statistics) and in float32. Costs three small steps.

    Args:
        network: The dual encoder that training wraps; it is left in evaluation mode, without gradients.
        encoder: For the size of the inputs.
        objective: The recipe's loss.
        accelerator: Of the run.
        recipe: The run.
        tolerance: Relative difference past which a gradient is wrong.

    Returns:
        For each part (`image tower`, `text tower`, `logit_scale`, ...) the cosine between both gradients and
        the ratio of their lengths.

    Raises:
        ValueError: A part's gradient is another one; the message has the numbers.
    """
    network.eval()
    inputs = random_pairs(encoder, accelerator, recipe)
    wrapped = network
    if accelerator.num_processes > 1:
        # As Accelerate wraps it, but without autocast: bf16 rounds differently for another number of rows.
        device = accelerator.device
        wrapped = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    objective(wrapped(*inputs), *inputs).backward()
    came = take_gradients(network)
    if accelerator.num_processes > 1:
        counts = gather_counts(len(inputs[0]), inputs[0].device)
        inputs = tuple(
            gather_rows(rows.reshape(len(rows), -1), counts).reshape(-1, *rows.shape[1:]) for rows in inputs
        )
    with as_one_process():
        objective(network(*inputs), *inputs).backward()
    expected = take_gradients(network)
    parts = {part: compare(came[part], expected[part]) for part in expected}
    wrong = {
        part: numbers
        for part, numbers in parts.items()
        if float((came[part] - expected[part]).norm()) > tolerance * float(expected[part].norm())
    }
    if wrong:
        told = "; ".join(
            f"{part}: cosine {cosine:.4f}, length x {ratio:.4f}" for part, (cosine, ratio) in wrong.items()
        )
        raise ValueError(
            f"--check-gradients: {accelerator.num_processes} processes do not have the gradient of one process with "
            f"the whole batch: {told}. A length of 1/{accelerator.num_processes} or x {accelerator.num_processes} "
            "means a wrong scaling over ranks, a cosine below 1 a lost part of it. Do not train like this: try "
            "another loss.exchange or launcher, and report it."
        )
    return parts


def random_pairs(encoder: Encoder, accelerator: Accelerator, recipe: PretrainRecipe) -> tuple[Tensor, ...]:
    """Noise pictures, token rows, and what else a step takes, that differ from rank to rank."""
    rank = accelerator.process_index
    generator = torch.Generator().manual_seed(rank)
    inputs = random_inputs(recipe, encoder, ROWS + (rank == 0), generator, f"the rank {rank}")
    return tuple(column.to(accelerator.device) for column in inputs)


def take_gradients(network: nn.Module) -> dict[str, Tensor]:
    """The gradients by part, each as one float64 vector; they are removed from the parameters."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            found.setdefault(part_of(name), []).append(parameter.grad.double().flatten())
            parameter.grad = None
    return {part: torch.cat(values) for part, values in found.items()}


def part_of(name: str) -> str:
    """Which part of a dual encoder a parameter belongs to."""
    name = name.removeprefix("model.")
    if name in ("logit_scale", "logit_bias"):
        return name
    if name.startswith(("terms.", "text_decoder.")):
        return "terms" if name.startswith("terms.") else "decoder"
    return "image tower" if name.startswith("visual.") else "text tower"


def compare(came: Tensor, expected: Tensor) -> tuple[float, float]:
    """Cosine and ratio of lengths."""
    cosine: Any = torch.cosine_similarity(came, expected, dim=0)
    return float(cosine), float(came.norm() / expected.norm().clamp(min=1e-30))
