"""Small jobs for few threads, and blocks that a callback breaks off."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serve.interrupt import Interruptible
from serve.pool import TOGETHER, TOGETHER_SIZE, Pool, attempt


class Gatekeeper:
    """Jobs that wait until they are let go; remembers which thread did which, and in what order."""

    def __init__(self):
        self.go, self.done = threading.Event(), []

    def job(self, number, *, wait=True):
        def work():
            if wait:
                assert self.go.wait(10)
            self.done.append(number)
            if number == 13:
                raise ValueError("thirteen")
            return 2 * number

        return work


@pytest.fixture
def keeper():
    return Gatekeeper()


@pytest.fixture
def groups(monkeypatch):
    """Sizes of the groups that went to a thread."""
    found = []
    monkeypatch.setattr("serve.pool.attempt", lambda group: found.append(len(group)) or attempt(group))
    return found


def test_what_arrives_together_goes_to_a_thread_together(keeper, groups):
    async def main():
        pool = Pool(2, "jobs")
        keeper.go.set()
        assert await asyncio.gather(*(pool.submit(keeper.job(n)) for n in range(7))) == list(range(0, 14, 2))
        assert sorted(groups) == [3, 4]  # half of them for each thread
        assert await asyncio.gather(*(pool.submit(keeper.job(n)) for n in range(20, 60)))
        assert max(groups) == TOGETHER
        pool.shutdown()

    asyncio.run(main())


def test_large_jobs_go_alone(keeper, groups):
    async def main():
        pool = Pool(1, "jobs")
        keeper.go.set()
        sizes = [1, TOGETHER_SIZE, 1, 1]
        await asyncio.gather(*(pool.submit(keeper.job(n), size) for n, size in enumerate(sizes)))
        assert groups == [1, 1, 2]
        assert keeper.done == [0, 1, 2, 3]
        pool.shutdown()

    asyncio.run(main())


def test_a_job_that_fails_or_is_given_up_is_its_own_affair(keeper):
    async def main():
        pool = Pool(1, "jobs")
        first = pool.submit(keeper.job(0))
        await asyncio.sleep(0.05)  # it has the thread
        later = [pool.submit(keeper.job(n, wait=False)) for n in (1, 13, 2, 3)]
        later[3].cancel()
        keeper.go.set()
        assert await first == 0
        found = await asyncio.gather(*later, return_exceptions=True)
        assert (found[0], found[2]) == (2, 4)
        assert str(found[1]) == "thirteen"
        assert isinstance(found[3], asyncio.CancelledError)
        assert keeper.done == [0, 1, 13, 2]
        pool.shutdown()

    asyncio.run(main())


def test_a_block_ends_when_it_is_interrupted():
    async def main():
        loop = asyncio.get_running_loop()
        with Interruptible() as block:
            loop.call_later(0.01, block.interrupt)
            await asyncio.sleep(10)
        assert block.interrupted
        await asyncio.sleep(0.01)  # the task goes on as if nothing had been

        with Interruptible() as block:
            await asyncio.sleep(0)
        block.interrupt()  # too late
        assert not block.interrupted
        await asyncio.sleep(0.01)

        with pytest.raises(ValueError, match="mine"), Interruptible() as block:
            raise ValueError("mine")

    asyncio.run(main())


def test_who_cancels_the_task_itself_is_heard():
    async def main():
        async def work():
            with Interruptible():
                await asyncio.sleep(10)
            raise AssertionError("it went on")

        task = asyncio.ensure_future(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
