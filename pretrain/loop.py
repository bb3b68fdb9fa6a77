"""What training loops share: the processes, the sums of a log line, the seed of a step."""

from __future__ import annotations

import hashlib
import math
import os
import resource
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, patch_environment
from torch import Tensor

from pairstream.memory import keep_freed_memory
from pretrain.precision import accelerate_precision, precision_options


class Launch(Protocol):
    """The keys of a recipe that say how it is launched; recipes of both training stages have them."""

    @property
    def run(self) -> str: ...
    @property
    def processes(self) -> int | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def trackers(self) -> Sequence[str]: ...


class Window:
    """Sums over the steps between two lines of the log; tensors, so that no step waits for the device."""

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.steps = self.samples = 0
        self.waiting = 0.0
        self.began = time.monotonic()

    def add(self, loss: Tensor, norm: Tensor, samples: int) -> None:
        """Count one step in: its loss, its gradient norm, and the samples of all ranks."""
        self.loss += loss
        self.norm = norm
        self.steps += 1
        self.samples += samples

    def mean_loss(self, accelerator: Accelerator, step: int, advice: str) -> float | None:
        """The mean loss over steps and ranks; None for a window without a step.

        Every rank must call it. It waits for the device.

        Args:
            accelerator: Of the run.
            step: Optimiser steps taken, for the message.
            advice: What the user can do about a run that has diverged.

        Raises:
            ValueError: It, or the last gradient, is not finite.
        """
        if not self.steps:
            return None
        loss = float(accelerator.reduce(self.loss / self.steps, reduction="mean"))  # pyright: ignore
        norm = float(self.norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(
                f"the loss is {loss} and the gradient norm {norm} at step {step}: training has diverged. {advice}"
            )
        return loss


def wants_shards() -> bool:
    """Whether the launcher asks for FSDP; on CPUs Accelerate reads this and trains replicas without a word."""
    return asked_for("FSDP")


def asked_for(engine: str) -> bool:
    """Whether the launcher asks for `FSDP`, `DEEPSPEED` or `MEGATRON_LM`, in Accelerate's own variables."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1")


def make_accelerator(
    recipe: Launch, *, rank_timeout: float | None = None, shards: bool = False
) -> Accelerator:
    """Accelerate's view of the machine, with the number of processes checked.

    Args:
        recipe: How the run is launched.
        rank_timeout: Seconds that processes wait for one another; None leaves torch's own.
        shards: Whether the trainer takes FSDP and DeepSpeed; see `pretrain.wrapping` and `pretrain.zero`.

    Raises:
        ValueError: The launcher's world size is not what Accelerate or the recipe has, the machine does not give the
            precision, or the set-up shards the model, compiles it or accumulates gradients, which the trainers do not
            leave to Accelerate.
        ImportError: A tracker or fp8's library is not installed.
    """
    gpu = torch.cuda.is_available()
    if not gpu:
        keep_freed_memory()
    precision = accelerate_precision(recipe.precision)
    refuse_engines(shards)
    for tracker in sorted(set(recipe.trackers) - {str(known) for known in get_available_trackers()}):
        raise ImportError(f"the tracker {tracker} cannot be imported: pip install {tracker}")
    # Told of DeepSpeed, Accelerate would cast the weights, and ignore it on CPUs: `pretrain.zero` starts it itself.
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
        accelerator = Accelerator(
            cpu=not gpu,
            mixed_precision=precision,
            log_with=list(recipe.trackers) or None,
            project_dir=recipe.run,
            kwargs_handlers=[
                *precision_options(precision),
                *([InitProcessGroupKwargs(timeout=timedelta(seconds=rank_timeout))] if rank_timeout else []),
            ],
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {launched} processes but Accelerate sees {accelerator.num_processes}: each "
            "would train alone on all of the data. Start with `torchrun --nproc-per-node N -m STAGE RECIPE`."
        )
    if recipe.processes and recipe.processes != launched:
        raise ValueError(
            f"the recipe asks for {recipe.processes} processes, {launched} started. "
            f"Start with `torchrun --nproc-per-node {recipe.processes} -m STAGE RECIPE`."
        )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP"):
        raise ValueError(f"Accelerate is set up for {kind}; this trainer takes CPUs and CUDA GPUs")
    plugin: Any = accelerator.state.dynamo_plugin
    backend = plugin.backend.value
    if backend != "NO":
        raise ValueError(
            f"Accelerate is set up to compile ({backend}): leave --dynamo_backend "
            "and ACCELERATE_DYNAMO_BACKEND out and set `compile: true` in the recipe of a pretraining, which keeps "
            "the kernels of a resumed run those of the first"
        )
    parts = accelerator.gradient_accumulation_steps
    if parts != 1:
        raise ValueError(
            f"Accelerate is set up for {parts} gradient accumulation steps: it would divide every gradient by "
            f"{parts}, while each batch here is a whole step. Nor could parts be added up, since a contrastive loss "
            "compares all pairs of its batch. Set ACCELERATE_GRADIENT_ACCUMULATION_STEPS to 1 (or leave it out) "
            "and choose batch_size instead."
        )
    return accelerator


def refuse_engines(shards: bool) -> None:
    """Refuse what a trainer does not take.

    Raises:
        ValueError: The launcher asks for it.
    """
    if asked_for("MEGATRON_LM"):
        raise ValueError(
            "Accelerate is set up for Megatron-LM, whose engine has its own models, backward pass, optimizer step and "
            "checkpoints. FSDP2 shards the same tensors: accelerate launch --use_fsdp --fsdp_version 2 -m pretrain "
            "RECIPE. Or leave it out to train replicas."
        )
    for engine, flag in (("FSDP", "--use_fsdp"), ("DEEPSPEED", "--use_deepspeed")):
        if asked_for(engine) and not shards:
            name = "DeepSpeed" if engine == "DEEPSPEED" else engine
            raise ValueError(
                f"Accelerate is set up for {name}, which this trainer does not take (pretraining does): launch without "
                f"{flag}"
            )


def mix(seed: int, step: int, rank: int) -> int:
    """A seed for one step of one rank, unrelated to its neighbours'."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far, in MB: of the GPU on a GPU, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
