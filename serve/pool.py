"""Small jobs of many requests for few threads: several go to a thread at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")
TOGETHER = 8  # jobs that one thread takes at once
TOGETHER_SIZE = 64 * 1024  # and their size together, but for a job that is larger alone


@dataclass(eq=False)
class Job:
    """What is to be done, and who waits for it."""

    work: Callable[[], Any]
    future: asyncio.Future[Any]
    size: int


class Pool:
    """Threads that take what waits in groups, in order.

    To hand a job to a thread and its result back takes both threads some 50 to 100 microseconds, as much as decoding a
    thumbnail. A group is what waits for each of the free threads; large jobs go alone, so that small ones are not held
    up behind them while a thread is free.

    Args:
        threads: How many.
        name: Of the threads.

    Example:
        >>> pixels = await pool.submit(lambda: decode(content), size=len(content))  # doctest: +SKIP
    """

    def __init__(self, threads: int, name: str):
        self.threads, self.executor = threads, ThreadPoolExecutor(threads, name)
        self.waiting: deque[Job] = deque()
        self.running = 0
        self.called = False

    def submit(self, work: Callable[[], Result], size: int = 0) -> asyncio.Future[Result]:
        """Have a function called in one of the threads.

        Args:
            work: The function; not called any more when the future is cancelled before its turn.
            size: What it costs, in bytes of its input.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self.waiting.append(Job(work, future, size))
        if not self.called:  # what other requests bring in the same turn of the loop joins
            self.called = True
            loop.call_soon(self._start)
        return future

    def shutdown(self) -> None:
        """End the threads; whoever submitted has been answered."""
        self.executor.shutdown()

    def _start(self) -> None:
        self.called = False
        loop = asyncio.get_running_loop()
        while self.waiting and self.running < self.threads:
            group = self._group()
            if group:
                self.running += 1
                done = loop.run_in_executor(self.executor, attempt, group)
                done.add_done_callback(lambda done, group=group: self._deliver(group, done))

    def _group(self) -> list[Job]:
        share = -(-len(self.waiting) // (self.threads - self.running))
        group: list[Job] = []
        size = 0
        while self.waiting and len(group) < min(share, TOGETHER):
            if group and size + self.waiting[0].size > TOGETHER_SIZE:
                break
            job = self.waiting.popleft()
            if not job.future.done():
                group.append(job)
                size += job.size
        return group

    def _deliver(self, group: list[Job], done: asyncio.Future[list[Any]]) -> None:
        self.running -= 1
        for job, (result, error) in zip(group, done.result(), strict=True):
            if job.future.done():
                continue
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
        self._start()


def attempt(group: list[Job]) -> list[tuple[Any, Exception | None]]:
    """Result or exception of each job; runs in a thread."""
    found: list[tuple[Any, Exception | None]] = []
    for job in group:
        if job.future.cancelled():
            found.append((None, None))
            continue
        try:
            found.append((job.work(), None))
        except Exception as error:
            found.append((None, error))
    return found
