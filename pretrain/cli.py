"""`pairstream pretrain RECIPE`, also `accelerate launch -m pretrain RECIPE`; `pairstream pretrain interpolate A B`."""

from __future__ import annotations

from importlib import import_module

from pairstream.command import read_training_command
from pretrain.recipe import PretrainRecipe

CHECK = "--check-gradients"
COMMANDS = {
    "interpolate": (
        "pretrain.interpolate:main",
        "writes the model between two checkpoints of one architecture",
    ),
}
"""What is done beside training: where it is, and what it does. A recipe of such a name needs its path."""


def main(argv: list[str]) -> int:
    """Train the dual encoder of a recipe; see `pairstream pretrain --help`."""
    if argv and argv[0] in COMMANDS:
        import tyro

        module, function = COMMANDS[argv[0]][0].split(":")
        tyro.cli(
            getattr(import_module(module), function), args=argv[1:], prog=f"pairstream pretrain {argv[0]}"
        )
        return 0
    words = [word for word in argv if word != CHECK]
    command = read_training_command("pretrain", PretrainRecipe, words)
    if command is None:
        print(f"{CHECK} first compares the gradient of these processes with that of one; pretrain only")
        for name, (_, what) in COMMANDS.items():
            print(f"pairstream pretrain {name} {what}; see its --help")
        return 0
    from pretrain.trainer import Trainer

    trainer = Trainer(command.recipe, resume=command.resume, overwrite=command.overwrite)
    if CHECK in argv:
        trainer.check_gradients()
    trainer.train()
    return 0
