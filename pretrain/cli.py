"""`pairstream pretrain RECIPE`, which is also `accelerate launch -m pretrain RECIPE`."""

from __future__ import annotations

from pairstream.command import read_training_command
from pretrain.recipe import PretrainRecipe


def main(argv: list[str]) -> int:
    """Train the dual encoder of a recipe; see `pairstream pretrain --help`."""
    command = read_training_command("pretrain", PretrainRecipe, argv)
    if command is None:
        return 0
    from pretrain.trainer import Trainer

    Trainer(command.recipe, resume=command.resume, overwrite=command.overwrite).train()
    return 0
