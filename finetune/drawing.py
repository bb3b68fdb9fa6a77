"""Drawing tokens so that each text has luck of its own, whatever stands beside it in the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from finetune.recipe_task import Decoding


def luck(seed: int, name: str) -> int:
    """The seed of one text, from that of the model and what the text is about."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


class OwnLuck(LogitsProcessor):
    """Adds Gumbel noise to each row from a generator of its own: the largest is then a draw from the softmax.

    Drawn on the CPU, so that all devices draw the same.

    Reference:
        Maddison, Tarlow and Minka 2014, A* Sampling: the Gumbel-max trick.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        drawn = torch.stack(
            [torch.empty(scores.shape[-1]).exponential_(generator=each) for each in self.generators]
        )
        return scores - drawn.log().to(scores.device)


def own_draws(decoding: Decoding, seeds: Sequence[int]) -> tuple[Decoding, LogitsProcessorList]:
    """Greedy decoding and the noise that together draw as `decoding` does, a seed a row."""
    steps: list[Any] = []
    if decoding.temperature != 1:
        steps.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_p < 1:
        steps.append(TopPLogitsWarper(decoding.top_p))
    plain = {"sample": False, "temperature": 1.0, "top_p": 1.0}
    return decoding.model_copy(update=plain), LogitsProcessorList([*steps, OwnLuck(seeds)])
