"""The evaluations of a run: which was best, and when to give up."""

from __future__ import annotations

from typing import Any


class History:
    """Numbers by step.

    Args:
        main: Name of the number that the task is about.
        patience: Evaluations in a row without a new best after which a run gives up; None never does.
        numbers: Of the steps before a resume.
    """

    def __init__(self, main: str, patience: int | None, numbers: dict[str, dict[str, float]] | None = None):
        self.main, self.patience = main, patience
        self.numbers = {int(step): row for step, row in (numbers or {}).items()}

    def add(self, step: int, found: dict[str, Any]) -> dict[str, float]:
        """Keep the plain numbers of an evaluation; returns them."""
        self.numbers[step] = {name: value for name, value in found.items() if isinstance(value, int | float)}
        return self.numbers[step]

    @property
    def best(self) -> int:
        """The step of the best evaluation so far, the first of equally good ones."""
        return max(self.numbers, key=lambda step: (self.numbers[step][self.main], -step))

    @property
    def given_up(self) -> bool:
        """Whether the last `patience` evaluations brought no new best."""
        if self.patience is None or not self.numbers:
            return False
        return sum(step > self.best for step in self.numbers) >= self.patience

    def state(self) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps."""
        return {str(step): row for step, row in self.numbers.items()}
