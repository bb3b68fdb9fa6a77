"""`pairstream finetune RECIPE`, which is also `accelerate launch -m finetune RECIPE`."""

from __future__ import annotations

from finetune.recipe import FinetuneRecipe
from pairstream.command import read_training_command


def main(argv: list[str]) -> int:
    """Train and measure the captioner or VQA model of a recipe; see `pairstream finetune --help`."""
    command = read_training_command("finetune", FinetuneRecipe, argv)
    if command is None:
        return 0
    from pairstream.errors import require

    require("transformers", "finetune", "fine-tuning")
    from finetune.trainer import Finetuner

    Finetuner(command.recipe, resume=command.resume, overwrite=command.overwrite).train()
    return 0
