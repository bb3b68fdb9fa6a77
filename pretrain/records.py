"""Where the numbers of a pretraining go: the run folder's log, and the trackers of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pairstream.run import RunFolder
from pretrain.recipe import PretrainRecipe
from pretrain.report import flatten


class Records:
    """Writes each record to `log.jsonl` and its numbers to the trackers, if there are any.

    Args:
        folder: Of the run; ranks above 0 write nothing.
        accelerator: Of the run, which knows the trackers.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator

    def begin(self, recipe: PretrainRecipe) -> None:
        """Tell the trackers what runs."""
        if recipe.trackers:
            settings = {key: str(value) for key, value in flatten(recipe.model_dump(mode="json"))}
            self.accelerator.init_trackers(Path(recipe.run).name, config=settings)

    def step(self, record: dict[str, Any]) -> None:
        """Keep a record about some steps, the last of which is `record["step"]`."""
        self.folder.log(record)
        self.track(record, record["step"])

    def evaluation(self, step: int, samples_seen: int, numbers: dict[str, float]) -> None:
        """Keep what evaluators found at a step."""
        self.folder.log({"step": step, "samples_seen": samples_seen, "evaluation": numbers})
        self.track({f"eval/{name}": value for name, value in numbers.items()}, step)

    def track(self, record: dict[str, Any], step: int) -> None:
        """Give the numbers of a record to the trackers."""
        if self.accelerator.trackers:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=step)

    def end(self) -> None:
        """Let the trackers finish."""
        if self.accelerator.trackers:
            self.accelerator.end_training()
