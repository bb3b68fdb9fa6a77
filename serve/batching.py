"""Requests that come in side by side share a forward pass; a bounded queue says no before memory runs out."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from serve.refusal import Refusal, busy
from serve.settings import Batching

Run = Callable[[list[Any]], Sequence[Any]]


@dataclass(eq=False)
class Job:
    """One request's items on their way."""

    items: list[Any]
    future: asyncio.Future
    expires: float
    began: float
    taken: int = 0
    results: list[Any] = field(default_factory=list)


@dataclass
class Observer:
    """What a queue reports; by default to nobody.

    Attributes:
        batch: Called with a pass's items and seconds.
        waited: Called with the seconds a job stood before its first pass.
        depth: Called with the number of items admitted whenever it changes.
        rejected: Called with `busy` or `deadline`.
    """

    batch: Callable[[int, float], None] = lambda items, seconds: None
    waited: Callable[[float], None] = lambda seconds: None
    depth: Callable[[int], None] = lambda items: None
    rejected: Callable[[str], None] = lambda reason: None


class Batcher:
    """Collects items of many requests into passes of one worker thread, first come first served.

    While a pass runs, what arrives waits, and the next pass takes all of it (at most `batch`): under load passes grow
    by themselves. A pass begins when half of the items that hold places are there, or after `wait` seconds: a lone
    request never waits for company, and among many none goes alone while the others are still being decoded.

    A pass that fails is repeated request by request, so that one request's bad luck stays its own.

    Args:
        name: For messages, such as `the queue of captions`.
        run: Items of one pass to as many results; called in the worker thread.
        config: Sizes and times.
        executor: Where passes run. Queues that must not run at the same time share one of one thread.
        observer: Receives measurements.

    Example:
        >>> batcher = Batcher("texts", encode, Batching(), ThreadPoolExecutor(1))   # doctest: +SKIP
        >>> with batcher.admit(2):                                                  # doctest: +SKIP
        ...     rows = await batcher.submit(["a cat", "a dog"])
    """

    def __init__(
        self, name: str, run: Run, config: Batching, executor: Executor, observer: Observer | None = None
    ):
        self.name, self.run, self.config, self.executor = name, run, config, executor
        self.observer = observer or Observer()
        self.jobs: deque[Job] = deque()
        self.arrived = asyncio.Event()
        self.admitted = 0
        self.seconds_per_item = 0.01
        self.closing = False
        self.worker: asyncio.Task | None = None

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold places for items from before they are decoded until they are answered.

        Raises:
            Refusal: 503: there is no room, or the server is going down; 413: there never is room for so many.
        """
        if count > self.config.queue:
            raise Refusal(413, "too_many_items", f"{count} items: {self.name} takes {self.config.queue}")
        if self.closing:
            raise busy("the server is going down: this queue", 5)
        if self.admitted + count > self.config.queue:
            self.observer.rejected("busy")
            raise busy(self.name, self.admitted * self.seconds_per_item)
        self.admitted += count
        self.observer.depth(self.admitted)
        try:
            yield
        finally:
            self.admitted -= count
            self.observer.depth(self.admitted)

    async def submit(self, items: Sequence[Any], expires: float | None = None) -> list[Any]:
        """Results of admitted items, in order.

        Args:
            items: What `run` takes.
            expires: `time.monotonic()` at which the caller gives up; by default `deadline` from now.

        Raises:
            Refusal: 504: the deadline passed.
            Exception: What `run` raised for these items.
        """
        if not items:
            return []
        if self.worker is None:
            self.worker = asyncio.create_task(self._work())
        loop, now = asyncio.get_running_loop(), time.monotonic()
        expires = now + self.config.deadline if expires is None else expires
        job = Job(list(items), loop.create_future(), expires, now)
        self.jobs.append(job)
        self.arrived.set()
        timer = loop.call_later(max(0.0, expires - now), self._expire, job)
        try:
            return await job.future
        finally:
            timer.cancel()

    def _expire(self, job: Job) -> None:
        if not job.future.done():
            self.observer.rejected("deadline")
            job.future.set_exception(deadline_passed())

    async def close(self) -> None:
        """Finish what was taken, and take nothing more."""
        self.closing = True
        self.arrived.set()
        if self.worker is not None:
            await self.worker
            self.worker = None

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self.jobs:
                if self.closing:
                    return
                self.arrived.clear()
                await self.arrived.wait()
            await self._gather()
            batch = self._take()
            if not batch:
                continue
            began = time.perf_counter()
            outcome = await loop.run_in_executor(self.executor, self._attempt, batch)
            seconds, count = time.perf_counter() - began, sum(len(items) for _, items in batch)
            self.observer.batch(count, seconds)
            self.seconds_per_item += 0.2 * (seconds / count - self.seconds_per_item)
            for (job, _), result in zip(batch, outcome, strict=True):
                self._deliver(job, result)

    async def _gather(self) -> None:
        """Wait, for a while, for half of what was admitted: the rest is still being read or decoded.

        A pass of the few that are there would keep the processor from the others, which then come late for the next
        as well, and passes would stay small.
        """
        until = time.monotonic() + self.config.wait
        await asyncio.sleep(0)  # those who have just been answered leave their places
        while not self.closing and self._waiting() < min(self.config.batch, self.admitted // 2):
            left = until - time.monotonic()
            if left <= 0:
                return
            self.arrived.clear()
            try:
                await asyncio.wait_for(self.arrived.wait(), left)
            except (asyncio.TimeoutError, TimeoutError):
                return

    def _waiting(self) -> int:
        """Items that no pass has taken yet."""
        return sum(len(job.items) - job.taken for job in self.jobs)

    def _take(self) -> list[tuple[Job, list[Any]]]:
        """Items of the next pass; requests nobody waits for any more are dropped."""
        batch, room, now = [], self.config.batch, time.monotonic()
        while self.jobs and room:
            job = self.jobs[0]
            if job.future.done() or job.expires <= now:
                self.jobs.popleft()
                continue
            if not job.taken:
                self.observer.waited(now - job.began)
            part = job.items[job.taken : job.taken + room]
            job.taken += len(part)
            room -= len(part)
            batch.append((job, part))
            if job.taken == len(job.items):
                self.jobs.popleft()
        return batch

    def _attempt(self, batch: list[tuple[Job, list[Any]]]) -> list[Any]:
        """Results or an exception for each job's part; runs in the worker thread."""
        try:
            results = list(self.run([item for _, items in batch for item in items]))
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [self._attempt([part])[0] for part in batch]
        outcome, start = [], 0
        for _, items in batch:
            outcome.append(results[start : start + len(items)])
            start += len(items)
        assert start == len(results), f"{self.name}: {start} items gave {len(results)} results"
        return outcome

    def _deliver(self, job: Job, result: Any) -> None:
        if job.future.done():
            return
        if isinstance(result, Exception):
            job.future.set_exception(result)
            return
        job.results += result
        if len(job.results) == len(job.items):
            job.future.set_result(job.results)


def deadline_passed() -> Refusal:
    """The answer to a request that took too long."""
    return Refusal(504, "deadline", "the deadline passed before the answer was ready", {"Retry-After": "1"})
