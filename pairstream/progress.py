"""Progress of long work: a bar in a terminal, a line at every tenth otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBar:
    """Shows how far a loop is; a no-op where `show` is False (ranks above 0).

    Args:
        what: A few words, such as `pretrain`.
        total: Number of steps.
        start: Steps already done, after a resume.
        show: Whether this process may print.

    Example:
        >>> with ProgressBar("count", 3, show=False) as bar:
        ...     for _ in range(3):
        ...         bar.advance(note="samples/s 12")
    """

    def __init__(self, what: str, total: int, *, start: int = 0, show: bool = True):
        self.what, self.total, self.done, self.show = what, max(total, 1), start, show
        self.began = time.monotonic()
        self.terminal = show and sys.stderr.isatty()
        self.printed = int(10 * start / self.total)
        self.note = ""
        self.bar: Progress | None = None

    def __enter__(self) -> ProgressBar:
        if self.terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(self.what, total=self.total, completed=self.done, note="")
            self.bar.start()
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` as done; `note` is a short text such as the loss and samples/s, shown until the next."""
        self.done += steps
        self.note = note or self.note
        if self.bar is not None:
            self.bar.advance(self.task, steps)
            self.bar.update(self.task, note=self.note)
        elif self.show and int(10 * self.done / self.total) > self.printed:
            self.printed = int(10 * self.done / self.total)
            spent = time.monotonic() - self.began
            print(
                f"{self.what}: {self.done}/{self.total}, {spent:.0f} s  {self.note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
