"""What training needs from above: something that measures an encoder, now and then."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from pretrain.encoder import Encoder
from pretrain.recipe import Evaluation, PretrainRecipe


@runtime_checkable
class Evaluator(Protocol):
    """Measures an encoder; the recipe names the class by its import string.

    It runs on rank 0 while the others wait, unless the class says `over_ranks = True`: then every rank runs it at the
    same time, and they may share the work through torch.distributed. What rank 0 gets is logged.
    """

    def run(self, encoder: Encoder) -> dict[str, float]:
        """Numbers by name, such as `image_to_text/recall@1`. The encoder's weights are left as they are."""
        ...


def load_evaluator(config: Evaluation) -> Evaluator:
    """Make the evaluator that a recipe names.

    Raises:
        ValueError: The import string finds nothing, the options are not its, or it has no `run`.
    """
    module, name = config.use.split(":")
    try:
        made: Any = getattr(import_module(module), name)(**config.options)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"evaluate.use {config.use!r}: could not be made: {error}") from error
    if not isinstance(made, Evaluator):
        raise ValueError(f"evaluate.use {config.use!r}: has no run(encoder) -> dict[str, float]")
    return made


class Evaluations:
    """A recipe's evaluators: when each is due, and what they have found.

    Args:
        recipe: All of the run.

    Raises:
        ValueError: An evaluator cannot be made.

    Attributes:
        history: What was found, by step (a text, as JSON has it); part of a checkpoint.
    """

    def __init__(self, recipe: PretrainRecipe):
        self.last = recipe.steps
        self.evaluators = [(config.every, load_evaluator(config)) for config in recipe.evaluate]
        self.history: dict[str, dict[str, float]] = {}

    def due(self, step: int, *, every: bool = True) -> list[Evaluator]:
        """Those that run after a step: by their intervals and after the last, or all of them unless `every`."""
        return [
            evaluator
            for interval, evaluator in self.evaluators
            if not every or step % interval == 0 or step == self.last
        ]

    def fall_on(self, step: int) -> bool:
        """Whether the interval of one ends at a step."""
        return any(step % interval == 0 for interval, _ in self.evaluators)

    def made_at(self, step: int) -> bool:
        """Whether what is due at a step has run."""
        return str(step) in self.history

    def run(self, due: list[Evaluator], encoder: Encoder, *, main: bool) -> dict[str, float]:
        """Numbers by name: on every rank of those that share their work, on rank 0 of the others too."""
        numbers: dict[str, float] = {}
        for evaluator in due:
            if main or getattr(evaluator, "over_ranks", False):
                numbers |= evaluator.run(encoder)
        return numbers

    def keep(self, step: int, numbers: dict[str, float]) -> None:
        """Note what was found after a step."""
        self.history[str(step)] = numbers
