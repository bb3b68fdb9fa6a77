"""Batch normalisation over the rows of all ranks, on any device and with uneven ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from pretrain.collectives import sum_over_ranks


def global_batch_norm(layer: Any, input: Tensor) -> Tensor:
    """Normalise by the statistics of the whole batch over all ranks, and update the running ones.

    Two all-reduces of C + 1 numbers; torch's own SyncBatchNorm does the same but runs on GPUs only.

    Args:
        layer: Holds the gains, biases, momentum and running statistics.
        input: This rank's `(b_r, c, h, w)`.

    Returns:
        `(b_r, c, h, w)`.
    """
    wide = input.to(torch.promote_types(input.dtype, torch.float32))  # bf16 cannot even hold the count
    count = torch.tensor([wide.numel() / wide.shape[1]], dtype=wide.dtype, device=wide.device)
    total = sum_over_ranks(torch.cat([wide.sum((0, 2, 3)), count]))
    n = total[-1].detach()
    mean = total[:-1] / n  # (c,)
    centred = wide - mean.view(1, -1, 1, 1)
    # A second pass over centred values: E[x^2] - E[x]^2 would lose half the digits.
    variance = sum_over_ranks(centred.square().sum((0, 2, 3))) / n  # (c,)
    if layer.running_mean is not None and layer.running_var is not None:
        with torch.no_grad():
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked += 1
            share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
            unbiased = variance * n / (n - 1).clamp(min=1)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), share)
    normalised = centred * torch.rsqrt(variance + layer.eps).view(1, -1, 1, 1)
    if layer.affine:
        normalised = normalised * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    return normalised.to(input.dtype)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that sees all ranks. Without it a ResNet tower on W ranks is another function than on one."""

    def forward(self, input: Tensor) -> Tensor:
        return global_batch_norm(self, input) if self.training else super().forward(input)


class GlobalBatchNormAct2d(BatchNormAct2d):
    """timm's batch norm with activation, seeing all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        drop: Any = self.drop
        act: Any = self.act
        return act(drop(global_batch_norm(self, x)))


GLOBAL = {nn.BatchNorm2d: GlobalBatchNorm2d, BatchNormAct2d: GlobalBatchNormAct2d}


def use_global_batch_norm(model: nn.Module) -> int:
    """Let every batch norm of a model see all ranks; does nothing in a single process.

    Parameters and their names stay as they are, so checkpoints do too.

    Returns:
        How many layers were changed.

    Raises:
        TypeError: A kind of batch norm for which no global form is known; it would silently train another model.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 0
    changed = 0
    for name, layer in model.named_modules():
        if type(layer) in GLOBAL:
            layer.__class__ = GLOBAL[type(layer)]
            changed += 1
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and type(layer) not in GLOBAL.values():
            raise TypeError(
                f"{name}: a {type(layer).__name__} takes its statistics from one rank only, so that training on "
                "several ranks would differ from one. Use a tower with another normalisation, or one process."
            )
    return changed
