"""What benchmarks share: two ways timed in turns, the figures of their ratios, and the machine they were taken on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Timed(NamedTuple):
    """A run: seconds of processor time, and what came out."""

    seconds: float
    result: Any


def timed(run: Callable[[], Any]) -> Timed:
    """Processor time of this process, all threads."""
    start = time.process_time()
    result = run()
    return Timed(time.process_time() - start, result)


def in_turns(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> list[tuple[Timed, Timed]]:
    """Pairs of runs, A B B A, after one of each that is not counted."""
    first()
    second()
    rounds = []
    for number in range(pairs):
        if number % 2 == 0:
            one = timed(first)
            rounds.append((one, timed(second)))
        else:
            other = timed(second)
            rounds.append((timed(first), other))
    return rounds


def spread(ratios: Sequence[float], name: str = "ratio", digits: int = 2) -> dict[str, float]:
    """Median, least and largest, under `name`, `low` and `high`."""
    figures = {name: statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {key: round(value, digits) for key, value in figures.items()}


def machine() -> dict[str, Any]:
    """Of a result line: the processor, torch's version and how busy the machine is."""
    import torch

    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}",
        "load": round(os.getloadavg()[0], 1),
    }
