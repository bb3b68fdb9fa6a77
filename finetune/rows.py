"""Rows of several pictures and texts in turns, to learn from: so a model learns to go on from examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.text import IGNORED, Pair


class Turn(NamedTuple):
    """A picture of the batch, by its number, and the text that follows it."""

    picture: int
    pair: Pair


@dataclass(frozen=True)
class Rows:
    """How the texts of a batch are put into rows.

    Attributes:
        shots: Pictures with their texts that may stand in front of another one.
        prefix: Positions of a picture in the sequence.
        context: Positions of the language model.
    """

    shots: int
    prefix: int
    context: int

    def __call__(self, turns: Sequence[Turn]) -> list[list[Turn]]:
        """Each text once, in rows of different pictures that fit the context.

        A text with k others in front of it is learnt with k examples; the first of each row with none. No text is
        computed twice, so that a step costs what it costs without examples.
        """
        seen: Counter[int] = Counter()
        order: list[tuple[int, Turn]] = []
        for turn in turns:
            order.append((seen[turn.picture], turn))
            seen[turn.picture] += 1
        rows: list[list[Turn]] = []
        used = 0
        for _, turn in sorted(
            order, key=lambda entry: entry[0]
        ):  # first texts of all pictures, second ones, ...
            length = self.length(turn)
            row = rows[-1] if rows else []
            new = not rows or len(row) > self.shots or used + length > self.context
            if new or any(turn.picture == other.picture for other in row):
                row, used = [], 0
                rows.append(row)
            row.append(turn)
            used += length
        return rows

    def pack(self, turns: Sequence[Turn], pad: int) -> dict[str, Tensor]:
        """Rows for teacher forcing, padded on the right.

        Args:
            turns: All of a batch.
            pad: The padding token.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 `(n, length)`, with room for the pictures; `slots` of the
            same shape, where a picture's positions stand: its number times `prefix` and the place in it, -1 for words;
            `owner` of the same shape, which of its row's pictures each position belongs to, from 1; and `pictures`,
            int64 `(n, s)`, the rows' pictures, the last one again where a row has fewer.
        """
        rows = self(turns)
        length = max((sum(map(self.length, row)) for row in rows), default=0)
        several = max(map(len, rows), default=1)
        empty = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED, "slots": -1, "owner": 0}
        found = {
            name: torch.full((len(rows), length), value, dtype=torch.int64) for name, value in empty.items()
        }
        found["pictures"] = torch.zeros((len(rows), several), dtype=torch.int64)
        for number, row in enumerate(rows):
            start = 0
            for place, (picture, (prompt, answer)) in enumerate(row):
                words = start + self.prefix
                asked, stop = words + len(prompt), words + len(prompt) + len(answer)
                found["slots"][number, start:words] = picture * self.prefix + torch.arange(self.prefix)
                found["input_ids"][number, words:stop] = torch.tensor([*prompt, *answer], dtype=torch.int64)
                found["labels"][number, asked:stop] = torch.tensor(answer, dtype=torch.int64)
                found["attention_mask"][number, start:stop] = 1
                found["owner"][number, start:] = place + 1
                found["pictures"][number, place:] = picture
                start = stop
        return found

    def length(self, turn: Turn) -> int:
        """Positions of a picture and its text."""
        return self.prefix + len(turn.pair.prompt) + len(turn.pair.answer)
