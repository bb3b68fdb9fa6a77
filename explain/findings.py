"""What consistency checks look at, and where they put what they find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.samples import index_shards, read_sample
from data.scenes.vocabulary import BACKGROUNDS
from data.tar import ShardReader
from pairstream.report import Card
from retrieval.metrics import retrieval_ranks

WORST = 12  # cases of each check that are shown


@dataclass(frozen=True)
class Pair:
    """One picture with what is known of it."""

    key: str
    file: bytes
    captions: list[str]
    objects: list[str] | None


@dataclass
class Consistency:
    """What was found.

    Attributes:
        numbers: For JSON: `checks` by name (`value`, `chance`, `count`, `says`), `left_out` (check: reason),
            `controls`, `chair`, and what was compared.
        worst: The worst cases by heading, worst first.
    """

    numbers: dict[str, Any]
    worst: dict[str, list[Card]] = field(default_factory=dict)

    def add(
        self, name: str, values: Sequence[float] | Tensor, says: str, chance: float | None = None
    ) -> None:
        """One check: the mean of values over its cases."""
        row = torch.as_tensor(values, dtype=torch.float64)
        if len(row) == 0:
            self.leave_out(name, "no picture or caption that it could be asked of")
            return
        self.numbers["checks"][name] = {
            "value": float(row.mean()),
            "chance": chance,
            "count": len(row),
            "says": says,
        }

    def leave_out(self, name: str, reason: str) -> None:
        self.numbers["left_out"][name] = reason


def read_pairs(data: str | Sequence[str], limit: int) -> list[Pair]:
    """The first pictures with captions.

    Raises:
        ValueError: Fewer than two.
    """
    reader, pairs, number = ShardReader(), [], 0
    for index in index_shards(data):
        for place in range(len(index)):
            if len(pairs) == limit:
                return pairs
            sample = read_sample(index, place, number, reader)
            number += 1
            captions = sample.captions()
            names = shown_objects(sample.record)
            if captions:
                pairs.append(Pair(sample.key, sample.image, captions, names))
    if len(pairs) < 2:
        raise ValueError(f"{data}: {len(pairs)} pictures with captions, expected at least two to compare")
    return pairs


def shown_objects(record: dict[str, Any]) -> list[str] | None:
    """What a record says there is, with what its background shows; None where it says nothing of objects."""
    if record.get("objects") is None:
        return None
    background = (record.get("background") or {}).get("name")
    behind = [name for each in BACKGROUNDS if each.name == background for name in each.shows]
    return [item["name"] for item in record["objects"]] + behind


def in_batches(encode: Callable[[Any], Tensor], rows: Any, size: int) -> Tensor:
    """Rows of a model, some at a time, on the CPU."""
    return torch.cat([encode(rows[start : start + size]).cpu() for start in range(0, len(rows), size)])


def card(pair: Pair, title: str, lines: list[str]) -> Card:
    """A picture of the report."""
    from finetune.tasks import shrink

    return Card(shrink(pair.file), title, lines)


def own_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """Expected rank from 0 of each text's picture, ties shared, float64 `(n,)`."""
    return retrieval_ranks(images, texts, owner)[1].best().expected().double() - 1


def at_chance(ranks: Tensor) -> dict[str, Any]:
    """Whether ranks are those of a random order: the mean rank within four standard errors of the middle."""
    n = len(ranks)
    middle, error = (n - 1) / 2, float(np.sqrt((n**2 - 1) / 12 / n))
    mean = float(ranks.mean())
    return {
        "recall@1": float((ranks < 1).double().mean()),
        "mean_rank": mean + 1,
        "expected_mean_rank": middle + 1,
        "at_chance": abs(mean - middle) <= 4 * error,
    }
