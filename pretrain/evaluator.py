"""What training needs from above: something that measures an encoder."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from pretrain.encoder import Encoder
from pretrain.recipe import Evaluation


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
