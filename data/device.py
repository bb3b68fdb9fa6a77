"""Batches to a CUDA device ahead of the training step: pinned, copied on a stream of their own, two at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
AHEAD = 2  # batches on the device that the step has not asked for yet
WAIT = 0.1  # seconds between looks whether the consumer has left


def ahead(
    items: Iterator[Item], move: Callable[[Item], Any], *, depth: int = AHEAD, name: str = "to-device"
) -> Iterator[Any]:
    """Move items in a thread, at most `depth` before they are asked for.

    Args:
        items: Taken and closed by that thread alone.
        move: What is done with each.
        depth: Moved items that wait.
        name: Of the thread, which ends with the items, with the first error, or with the consumer.

    Yields:
        What `move` returned, in order. An error of either comes out where its item would have.
    """
    moved: queue.Queue[tuple[str, Any]] = queue.Queue(max(depth - 1, 1))  # and one in the thread's hands
    left = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not left.is_set():
            try:
                moved.put((kind, value), timeout=WAIT)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                done = move(item)
                del item  # its memory is free for another batch
                if not put("item", done):
                    break
                del done
            put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            getattr(items, "close", int)()  # loader workers end with the iterator

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = moved.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
            del value
    finally:
        left.set()
        thread.join()


def on_device(
    batches: Iterator[Any], device: str | torch.device | None, stay: Collection[str] = ()
) -> Iterator[Any]:
    """Named tuples with `data`, a dict of tensors, whose tensors lie on the device: a CUDA device's are copied ahead.

    Those that `stay` are pinned and left where they are. For any other device, or None, these are the batches as they
    come.
    """
    if device is None or torch.device(device).type != "cuda":
        return batches
    return _on_cuda(batches, ToDevice(torch.device(device), stay))


def _on_cuda(batches: Iterator[Any], to_device: ToDevice) -> Iterator[Any]:
    for batch, moved, done in ahead(batches, lambda batch: (batch._replace(data={}), *to_device(batch.data))):
        yield batch._replace(data=to_device.hand_over(moved, done))


class ToDevice:
    """Copies the tensors of dicts to a CUDA device, on a stream of its own.

    Args:
        device: A CUDA device.
        stay: Names of tensors that are pinned and not copied.
    """

    def __init__(self, device: torch.device, stay: Collection[str] = ()):
        self.device, self.stay, self.stream = device, stay, torch.cuda.Stream(device)

    def __call__(self, data: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event]:
        """Begin to copy; the event is when it is done."""
        with torch.cuda.stream(self.stream):
            moved = {name: self.copy(name, value) for name, value in data.items()}
            done = torch.cuda.Event()
            done.record(self.stream)
        return moved, done

    def copy(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        pinned = value if value.is_pinned() else value.pin_memory()
        return pinned if name in self.stay else pinned.to(self.device, non_blocking=True)

    def hand_over(self, moved: dict[str, Any], done: torch.cuda.Event) -> dict[str, Any]:
        """Let the current stream wait for the copies, and keep their memory for as long as it works on them."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for value in moved.values():
            if isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(current)
        return moved
