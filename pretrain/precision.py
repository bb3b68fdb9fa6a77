"""In which numbers a run computes: what this machine gives, and the loss scale that fp16 needs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

FP8_CAPABILITY = (8, 9)
"""Least compute capability whose matrix units take fp8: Ada (RTX 4090, L4), then Hopper (H100) and later."""


def accelerate_precision(wanted: str) -> str:
    """A recipe's `precision` in Accelerate's words, on this machine.

    Args:
        wanted: `auto`, `fp32`, `bf16`, `fp16` or `fp8`.

    Returns:
        `no`, `bf16`, `fp16` or `fp8`.

    Raises:
        ValueError: This machine does not give it; the message says what it would need.
        ImportError: fp8's library is not installed.
    """
    gpu = torch.cuda.is_available()
    if wanted == "auto":
        wanted = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    if wanted == "fp16" and not gpu:
        raise ValueError(
            "precision: fp16 needs a GPU, and there is none here: Accelerate scales no loss on a CPU. Take bf16, which "
            "has float32's range and needs no scale, or fp32 (usually faster on a CPU)."
        )
    if wanted == "fp8":
        found = torch.cuda.get_device_capability() if gpu else None
        if found is None or found < FP8_CAPABILITY:
            here = "no GPU" if found is None else f"one of capability {found[0]}.{found[1]}"
            raise ValueError(
                f"precision: fp8 needs a GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or more "
                f"(L4, RTX 4090, H100 and later), here is {here}. Take bf16 or fp32."
            )
        if find_spec("torchao") is None:
            raise ImportError(
                "precision: fp8 goes through Accelerate's torchao back end, which is not installed: pip install "
                "torchao. (Its TransformerEngine back end is not used: it puts other layers into the towers, whose "
                "checkpoints open_clip would not open.)"
            )
    return "no" if wanted == "fp32" else wanted


def precision_options(precision: str) -> list[Any]:
    """What Accelerate is told besides its word for the precision."""
    if precision != "fp8":
        return []
    from accelerate.utils import AORecipeKwargs

    # Inner dimensions are padded to multiples of 16: the rows of a gradient's product are whatever a batch has.
    return [AORecipeKwargs(pad_inner_dim=True, enable_fsdp_float8_all_gather=False)]


class LossScale:
    """fp16's loss scale, as torch's GradScaler keeps it; does nothing where Accelerate has none.

    The loss is multiplied so that small gradients do not vanish in fp16. A scale that is too large makes some of them
    infinite: such a step is left out and the scale halved, which belongs to fp16 and is no divergence. It is one when
    the loss itself is not finite, or with a scale of 1, where the gradient is too large without it.

    Looking for such gradients waits for the device once a step.

    Args:
        accelerator: Of the run; a scaler that it has is used by its `backward` and by the optimizers that it prepares.

    Attributes:
        skipped: Steps that were left out so far.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.skipped = accelerator, 0

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Accelerate's own."""
        return self.accelerator.scaler

    def state(self) -> dict[str, Any] | None:
        """JSON that resuming needs."""
        return {"skipped": self.skipped, **self.scaler.state_dict()} if self.scaler else None

    def load(self, state: dict[str, Any] | None) -> None:
        """Take up a checkpoint's scale, before the optimizer is prepared; None, of a run without one, begins anew."""
        self.skipped = state["skipped"] if state else 0
        if self.scaler is None:
            return
        # Another one, since the old one may be in the middle of a step that the run goes back from.
        scaler = torch.amp.GradScaler(self.accelerator.device.type)
        if state:
            scaler.load_state_dict({key: value for key, value in state.items() if key != "skipped"})
        self.accelerator.scaler = scaler

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring gradients to their own size, before anybody looks at them."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def overflows(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether a step must be left out for its scale, which is then halved; every rank learns the same.

        Args:
            loss: This rank's.
            norm: Of the gradients of all ranks, unscaled.
        """
        if self.scaler is None or bool(norm.isfinite()):
            return False
        mean: Any = self.accelerator.reduce(loss.detach().clone(), reduction="mean")
        if not bool(mean.isfinite()) or self.scaler.get_scale() <= 1:
            return False  # the loss has diverged, not its scale
        self.leave_out()
        self.skipped += 1
        return True

    def leave_out(self) -> None:
        """End a step that the optimizer does not take."""
        if self.scaler is not None:
            self.scaler.update()

    def record(self) -> dict[str, Any]:
        """The log line's part."""
        if self.scaler is None:
            return {}
        return {"loss_scale": self.scaler.get_scale(), "overflows": self.skipped}


def clip_gradients(parameters: list[torch.nn.Parameter], largest: float) -> Tensor:
    """Scale gradients down to a global norm of at most `largest`; returns the norm before.

    Gradients must be unscaled. Those that are sharded over ranks have the norm of all shards.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    whole = getattr(norm, "full_tensor", None)
    return whole() if whole else norm
