import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from data.device import AHEAD, ahead, on_device

NAME = "to-device-test"


class Batch(NamedTuple):
    step: int
    data: dict[str, Any]


class Source:
    """Numbers, and whether it was closed."""

    def __init__(self, count: int, fails_at: int = -1):
        self.given, self.closed, self.count, self.fails_at = 0, False, count, fails_at

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.given == self.fails_at:
            raise ValueError("no more shards")
        if self.given == self.count:
            raise StopIteration
        self.given += 1
        return self.given - 1

    def close(self) -> None:
        self.closed = True


def no_threads() -> bool:
    return all(thread.name != NAME for thread in threading.enumerate())


def test_items_come_in_order_and_no_further_ahead_than_said():
    source, moved, waiting = Source(20), [], threading.Event()

    def move(number: int) -> int:
        moved.append(number)
        if len(moved) == AHEAD + 1:
            waiting.set()
        return number * 10

    found = ahead(source, move, name=NAME)
    assert next(found) == 0
    assert waiting.wait(20)  # it goes on by itself while the consumer works
    assert len(moved) == AHEAD + 1
    assert list(found) == [number * 10 for number in range(1, 20)]
    assert source.closed
    assert no_threads()


def test_an_error_of_the_source_or_the_copy_comes_where_its_item_would_have():
    source = Source(9, fails_at=3)
    found = ahead(source, lambda number: number, name=NAME)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no more shards"):
        next(found)
    assert source.closed

    def move(number: int) -> int:
        if number == 2:
            raise RuntimeError("out of memory")
        return number

    found = ahead(Source(9), move, name=NAME)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(found)
    assert no_threads()


def test_a_consumer_that_leaves_ends_the_thread_and_closes_the_source():
    source = Source(10**9)
    found = ahead(source, lambda number: number, name=NAME)
    assert next(found) == 0
    found.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert source.closed
    assert source.given <= AHEAD + 2
    assert no_threads()


def test_no_items():
    assert list(ahead(Source(0), lambda number: number, name=NAME)) == []
    assert no_threads()


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_elsewhere_than_on_cuda_the_batches_are_left_alone(device):
    batches = iter([Batch(0, {"a": torch.ones(2), "b": ["x"]})])
    assert on_device(batches, device) is batches


@pytest.mark.gpu
def test_on_cuda_the_tensors_lie_there():
    batches = [
        Batch(step, {"a": torch.full((1000, 1000), step), "b": ["x"], "c": torch.ones(1)})
        for step in range(9)
    ]
    for step, batch in enumerate(on_device(iter(batches), "cuda", stay=["c"])):
        assert batch.step == step
        assert batch.data["c"].is_pinned()
        assert batch.data["a"].is_cuda
        assert batch.data["b"] == ["x"]
        assert batch.data["a"].eq(step).all()
