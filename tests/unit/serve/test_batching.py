"""The queue: batches, bounds, deadlines, and who pays for a bad request."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.batching import Batcher, Observer
from serve.refusal import Refusal
from serve.settings import Batching


class Slow:
    """Doubles numbers once it is let go; remembers the passes."""

    def __init__(self):
        self.go = threading.Event()
        self.passes: list[list[int]] = []

    def __call__(self, items):
        self.passes.append(list(items))
        assert self.go.wait(10)
        if 13 in items:
            raise ValueError("thirteen")
        return [2 * item for item in items]


@pytest.fixture
def slow():
    return Slow()


def batcher(run, observer=None, **config) -> Batcher:
    config = Batching(**{"batch": 8, "queue": 20, "deadline": 10.0, "wait": 0.0, **config})
    return Batcher("the queue of numbers", run, config, ThreadPoolExecutor(1), observer)


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def test_what_arrives_during_a_pass_shares_the_next(slow):
    async def main():
        queue = batcher(slow)
        first = asyncio.create_task(queue.submit([0]))
        await until(lambda: slow.passes)
        others = [asyncio.create_task(queue.submit([number, number + 100])) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        slow.go.set()
        assert await first == [0]
        assert [await other for other in others] == [[2, 202], [4, 204], [6, 206]]
        assert slow.passes == [[0], [1, 101, 2, 102, 3, 103]]
        await queue.close()

    asyncio.run(main())


def test_a_large_request_is_cut_into_passes(slow):
    async def main():
        queue = batcher(slow)
        slow.go.set()
        assert await queue.submit(range(20, 40)) == [2 * number for number in range(20, 40)]
        assert [len(one) for one in slow.passes] == [8, 8, 4]
        assert await queue.submit([]) == []
        await queue.close()

    asyncio.run(main())


def test_a_pass_waits_for_half_of_what_is_being_decoded(slow):
    async def main():
        queue = batcher(slow, wait=60.0)
        slow.go.set()
        with queue.admit(1):
            assert await queue.submit([1]) == [2]  # alone: not held back
        with queue.admit(5):
            first = asyncio.create_task(queue.submit([2]))
            await asyncio.sleep(0.05)
            assert slow.passes == [[1]]
            assert await queue.submit([3]) == [6]
            assert await first == [4]
        with queue.admit(20):
            tasks = [asyncio.create_task(queue.submit([number])) for number in range(20, 28)]
            assert [await task for task in tasks] == [
                [2 * number] for number in range(20, 28)
            ]  # a whole batch
        assert slow.passes == [[1], [2, 3], list(range(20, 28))]
        await queue.close()

    asyncio.run(main())


def test_the_wait_for_what_is_being_decoded_has_an_end(slow):
    async def main():
        queue = batcher(slow, wait=0.05)
        slow.go.set()
        with queue.admit(20):
            assert await queue.submit([1]) == [2]
            closing = asyncio.create_task(queue.submit([2]))
            await asyncio.sleep(0)
            queue.config = queue.config.model_copy(update={"wait": 60.0})
            await queue.close()  # nor does a server that goes down wait
            assert await closing == [4]

    asyncio.run(main())


def test_a_full_queue_says_when_to_come_again(slow):
    reasons = []

    async def main():
        queue = batcher(slow, Observer(rejected=reasons.append), queue=3)
        with (
            queue.admit(2),
            pytest.raises(Refusal, match="the queue of numbers is full") as refusal,
            queue.admit(2),
        ):
            pass
        assert refusal.value.status == 503
        assert int(refusal.value.headers["Retry-After"]) >= 1
        with queue.admit(3):
            assert queue.admitted == 3
        assert queue.admitted == 0
        with pytest.raises(Refusal, match="4 items: the queue of numbers takes 3") as refusal, queue.admit(4):
            pass
        assert refusal.value.status == 413

    asyncio.run(main())
    assert reasons == ["busy"]


def test_a_request_past_its_deadline_is_dropped_unworked(slow):
    async def main():
        queue = batcher(slow, deadline=0.1)
        with pytest.raises(Refusal, match="deadline") as refusal:
            await asyncio.gather(queue.submit([0]), queue.submit([1], time.monotonic() + 0.1))
        assert refusal.value.status == 504
        late = asyncio.create_task(queue.submit([2]))
        await asyncio.sleep(0.2)
        with pytest.raises(Refusal, match="deadline"):
            await late
        slow.go.set()
        assert await queue.submit([3], time.monotonic() + 10) == [6]
        assert [2] not in slow.passes
        await queue.close()

    asyncio.run(main())


def test_a_cancelled_request_leaves_the_queue(slow):
    async def main():
        queue = batcher(slow)
        first = asyncio.create_task(queue.submit([0]))
        await until(lambda: slow.passes)
        gone, stays = asyncio.create_task(queue.submit([1])), asyncio.create_task(queue.submit([2]))
        await asyncio.sleep(0)
        gone.cancel()
        slow.go.set()
        assert [await first, await stays] == [[0], [4]]
        assert slow.passes == [[0], [2]]
        await queue.close()

    asyncio.run(main())


def test_a_bad_request_fails_alone(slow):
    async def main():
        queue = batcher(slow)
        first = asyncio.create_task(queue.submit([0]))
        await until(lambda: slow.passes)
        tasks = [asyncio.create_task(queue.submit([number])) for number in (1, 13, 2)]
        await asyncio.sleep(0)
        slow.go.set()
        assert await first == [0]
        good, bad, also = await asyncio.gather(*tasks, return_exceptions=True)
        assert (good, also) == ([2], [4])
        assert isinstance(bad, ValueError)
        await queue.close()

    asyncio.run(main())


def test_closing_finishes_what_was_taken_and_takes_nothing_more(slow):
    async def main():
        queue = batcher(slow)
        tasks = [asyncio.create_task(queue.submit([number] * 5)) for number in range(4)]
        await until(lambda: slow.passes)
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="going down"), queue.admit(1):
            pass
        slow.go.set()
        assert [await task for task in tasks] == [[2 * number] * 5 for number in range(4)]
        await closing

    asyncio.run(main())
