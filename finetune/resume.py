"""What makes a run the same run, so that it may go on from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.recipe import FinetuneRecipe

FIXED = (
    "model",
    "task",
    "connector",
    "language_model",
    "freeze_image_tower",
    "tower_lr",
    "rates",
    "waits",
    "lora",
    "tower_lora",
    "reward",
    "shots",
    "l2_sp",
    "adversarial",
    "batch_size",
    "seed",
    "steps",
    "optim",
    "schedule",
)
"""Keys of a recipe that must not change when a run is resumed."""


def identity(recipe: FinetuneRecipe) -> dict[str, Any]:
    """What must not change when a run is resumed."""
    content = recipe.model_dump(mode="json")
    return {key: content[key] for key in FIXED}


def refuse_another(recipe: FinetuneRecipe, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to go on with a run that is not the one that was begun.

    Args:
        recipe: Of the run that would go on.
        saved: `identity` of the one that was saved.
        checkpoint: Where it lies, for the message.

    Raises:
        ValueError: They differ.
    """
    changed = [key for key, value in identity(recipe).items() if saved.get(key) != value]
    if changed:
        raise ValueError(
            f"{checkpoint}: cannot resume with another {', '.join(changed)}: the run would not be the one that "
            "was begun. Change it back, or start a new run with --run NAME."
        )
