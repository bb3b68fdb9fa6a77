"""`pairstream pretrain RECIPE`, which is also `accelerate launch -m pretrain RECIPE`."""

from __future__ import annotations

from pairstream.command import read_training_command
from pretrain.recipe import PretrainRecipe

CHECK = "--check-gradients"


def main(argv: list[str]) -> int:
    """Train the dual encoder of a recipe; see `pairstream pretrain --help`."""
    words = [word for word in argv if word != CHECK]
    command = read_training_command("pretrain", PretrainRecipe, words, resumes_others=True)
    if command is None:
        print(f"{CHECK} first compares the gradient of these processes with that of one; pretrain only")
        return 0
    from pretrain.trainer import Trainer

    trainer = Trainer(command.recipe, resume=command.resume, overwrite=command.overwrite)
    if CHECK in argv:
        trainer.check_gradients()
    trainer.train()
    return 0
