"""A loss that is not finite, or far above what it was: stop, leave the step out, or go back and leave its batch out."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from pairstream.atomic import write_text
from pairstream.run import finite
from pretrain.recipe import OnDivergence

FILE = "divergence.jsonl"


class RollBack(Exception):  # noqa: N818 - no error: the run goes on from an earlier checkpoint
    """The run must go back to a checkpoint from before a step.

    Attributes:
        step: The step that is to be left out, counted from 1 as in the log.
    """

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


@dataclass
class Seen:
    """What a step left to be judged: its number from 1, its samples, and loss and gradient norm on their way here."""

    step: int
    keys: list[str]
    numbers: Tensor
    """float32 (2,), in pinned memory when it comes from a GPU."""
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[float, float]:
        """Loss and gradient norm, once they have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm = self.numbers.tolist()
        return loss, norm


class Watch:
    """Judges the loss of every step, and writes down the samples of those that diverge.

    `stop` and `rollback` read the numbers of a step while the next one is under way, and before anything is logged
    or saved: no step waits for the device, and no checkpoint is ever of a run that has diverged. `skip` must know
    before the optimiser's step and so waits for the device once a step; on a GPU that costs the little that the
    next step's launch would have run ahead.

    What it decides is a function of the losses of the steps before, which checkpoints carry, and of what it wrote
    down: a run that was killed and resumed leaves the same batches out.

    Args:
        config: The recipe's `on_divergence`.
        accelerator: Of the run; all ranks judge the mean of their losses, and decide alike.
        folder: The run folder, for `divergence.jsonl`.
        advice: What the user can do about a run that has diverged.

    Attributes:
        left_out: Steps whose batch is not trained on, counted from 1.
    """

    def __init__(self, config: OnDivergence, accelerator: Accelerator, folder: Path, advice: str):
        self.config, self.accelerator, self.advice = config, accelerator, advice
        self.path = folder / FILE
        self.losses: deque[float] = deque(maxlen=config.window)
        self.pending: Seen | None = None
        self.left_out: set[int] = set()

    def begin(self) -> None:
        """Forget what was written down, for a run that begins anew."""
        self.losses.clear()
        self.left_out, self.pending = set(), None
        if self.accelerator.is_main_process:
            self.path.unlink(missing_ok=True)

    def state(self) -> list[float]:
        """The last losses, for a checkpoint; nothing is pending then."""
        assert self.pending is None, "settle() comes before a save"
        return list(self.losses)

    def load(self, losses: list[float]) -> None:
        """Take up a checkpoint's losses, and the steps that the run folder says to leave out.

        A step at which a run had stopped is tried again.
        """
        self.losses = deque(losses, maxlen=self.config.window)
        self.pending = None
        self.left_out = {line["step"] for line in read_incidents(self.path) if line["action"] != "stop"}

    def accepts(self, step: int, loss: Tensor, norm: Tensor, keys: list[str]) -> bool:
        """Take note of a step after its backward pass.

        Args:
            step: Its number, from 1.
            loss: This rank's loss, on the device.
            norm: The global gradient norm.
            keys: This rank's samples.

        Returns:
            Whether the optimiser may take the step.

        Raises:
            ValueError, RollBack: As `settle`.
        """
        self.settle()
        mean: Any = self.accelerator.reduce(loss.detach().clone(), reduction="mean")
        numbers = torch.stack([mean.float(), norm.detach().to(mean.device).float()])
        arrived = None
        if numbers.is_cuda:
            numbers = torch.empty(2, pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending = Seen(step, keys, numbers, arrived)
        return self.settle() if self.config.action == "skip" else True

    def settle(self) -> bool:
        """Judge the step that is pending.

        Returns:
            False for a step that must be left out (`skip`), which all ranks learn alike.

        Raises:
            ValueError: The run has diverged and stops: as its recipe says, or since more steps than
                `limit` were left out.
            RollBack: The run must go back.
        """
        seen, self.pending = self.pending, None
        if seen is None:
            return True
        loss, norm = seen.read()
        usual = median(self.losses) if len(self.losses) == self.losses.maxlen else None
        spikes = bool(self.config.spike and usual is not None and loss > self.config.spike * usual)
        if math.isfinite(loss) and math.isfinite(norm) and not spikes:
            self.losses.append(loss)
            return True
        said = f"the loss is {loss:.6g} and the gradient norm {norm:.6g} at step {seen.step}"
        if spikes:
            said += f", the loss {loss / (usual or 1):.3g} times its median over the {len(self.losses)} steps before"
        action = self.config.action
        self.write_down(seen, action, loss, norm, usual)
        if action == "stop":
            raise ValueError(f"{said}: training has diverged. {self.advice} The batch's samples: {self.path}")
        self.left_out.add(seen.step)
        if len(self.left_out) > self.config.limit:
            raise ValueError(
                f"{said}: training has diverged, and {self.config.limit} batches (on_divergence.limit) were left "
                f"out already. {self.advice} The batches' samples: {self.path}"
            )
        if action == "rollback":
            raise RollBack(seen.step)
        return False

    def write_down(self, seen: Seen, action: str, loss: float, norm: float, usual: float | None) -> None:
        """Append a line about a step that diverged; every rank must call it."""
        keys = gather_object(seen.keys)
        if self.accelerator.is_main_process:
            line = {"step": seen.step, "action": action, "loss": loss, "grad_norm": norm, "median": usual}
            lines = [*read_incidents(self.path), finite({**line, "keys": keys})]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.accelerator.wait_for_everyone()


def read_incidents(path: Path) -> list[dict[str, Any]]:
    """The lines of `divergence.jsonl`; none where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def batch_statistics(network: nn.Module, *others: nn.Module | None) -> list[tuple[Tensor, Tensor]]:
    """What the forward pass of a bad batch spoils, each with a copy.

    That is the statistics of batch norms that train, and all buffers of `others`.
    """
    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
    ]
    found = [value for layer in layers for value in layer.buffers(recurse=False)]
    found += [value for other in others if other is not None for value in other.buffers()]
    return [(value, value.clone()) for value in found]
