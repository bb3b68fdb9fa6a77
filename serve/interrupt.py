"""A block of a coroutine that a callback may break off, as `asyncio.timeout` does from Python 3.11 on."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any


class Interruptible:
    """Awaits inside the block end when `interrupt` is called; the coroutine goes on after it.

    It costs a thousandth of a task that waits beside another.

    Attributes:
        interrupted: Whether the block was broken off.

    Example:
        >>> with Interruptible() as block:                                          # doctest: +SKIP
        ...     timer = loop.call_later(5, block.interrupt)
        ...     content = await receive()
        >>> if block.interrupted:                                                   # doctest: +SKIP
        ...     print("too slow")
    """

    def __init__(self) -> None:
        self.interrupted = self.over = False
        self.task: asyncio.Task[Any] | None = None

    def __enter__(self) -> Interruptible:
        self.task = asyncio.current_task()
        return self

    def interrupt(self) -> None:
        """Break the block off; nothing happens when it is over."""
        if not self.over and not self.interrupted and self.task is not None:
            self.interrupted = True
            self.task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.over = True
        if not self.interrupted or kind is None or not issubclass(kind, asyncio.CancelledError):
            return False
        uncancel = getattr(self.task, "uncancel", None)  # since Python 3.11
        return uncancel is None or uncancel() == 0  # somebody else may have cancelled the task, too
