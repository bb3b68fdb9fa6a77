"""Being told to leave: on SIGTERM or SIGUSR1 a run finishes its step, saves, and exits so that it can be resumed."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from pretrain.collectives import gather_numbers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """A run has saved and leaves because it was told to; the same command with `--resume` goes on.

    A `SystemExit`, so that a program that does not care ends with `code`. `metrics.json` is only written by a run
    that came to its last step, which tells a finished run from one that was told to leave.

    Attributes:
        step: Optimiser steps taken, all of them in the newest checkpoint.
        code: The exit code, `preempted_exit_code` of the recipe.
    """

    def __init__(self, step: int, code: int):
        super().__init__(code)
        self.step = step


class StopRequest:
    """Takes note of the signals with which schedulers announce that they will end a process.

    SLURM sends SIGTERM (or what `--signal` names) ahead of the end of an allocation, Kubernetes SIGTERM before it
    evicts a pod, torchrun SIGTERM when it is ended itself. The handler only sets a flag: the loop looks at it
    once a step. Signals that come again change nothing. Outside the main thread, where Python allows no handlers,
    nothing is noted.

    Args:
        world: Number of processes; several agree on the step after which they leave.
        device: Of their exchange.

    Attributes:
        requested: Whether a signal has come to this process.

    Example:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.requested
        True
    """

    def __init__(self, world: int = 1, device: torch.device | None = None):
        self.world, self.device = world, device
        self.requested = self.heard = False
        self.before: dict[signal.Signals, Any] = {}

    def exchange(self, rows: int) -> list[int]:
        """How many rows of a step each rank has; with it goes whether one of them was told to leave."""
        if self.world == 1:
            return [rows]
        found = gather_numbers([rows, int(self.requested)], self.device or torch.device("cpu"))
        self.heard = any(stop for _, stop in found)
        return [count for count, _ in found]

    @property
    def agreed(self) -> bool:
        """Whether the step under way is the last; several ranks learn it of one another at its `exchange`."""
        return self.requested if self.world == 1 else self.heard

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            # None stands for a handler that was not Python's, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.before = {}
