"""Other processes that are gone: a cut line or a dead host ends a run with one clear error, in a set time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

# What the back ends say, in RuntimeErrors of no class of their own.
SIGNS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "timed out")


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error means that another process did not answer."""
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in SIGNS)


@contextmanager
def peers_present(world: int, advice: Callable[[], str]) -> Iterator[None]:
    """Turn the back end's error about a process that is gone into one that says what to do.

    Gloo raises after the time-out of the process group, or at once where the other side closed the line. NCCL's
    watchdog ends the process itself after the same time, with its own words; its checkpoints are as safe.

    Args:
        world: Number of processes; with one, nothing is changed.
        advice: What is safe and how to go on, asked when it is needed.

    Raises:
        ConnectionError: Another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if world == 1 or not is_lost_peer(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise ConnectionError(f"lost another of the {world} processes ({first}). {advice()}") from error
