"""`pairstream pretrain RECIPE`, also `accelerate launch -m pretrain RECIPE`; `pairstream pretrain interpolate A B`."""

from __future__ import annotations

from importlib import import_module

from pairstream.command import read_training_command
from pretrain.recipe import PretrainRecipe

CHECK = "--check-gradients"
COMMANDS = {
    "plan": ("pretrain.plan:main", "parameters, FLOPs, memory, time and cost of a recipe, before it starts"),
    "scaling": ("pretrain.scaling:main", "a power law through several runs"),
    "reinforce": (
        "pretrain.reinforce:main",
        "keep what teachers say of every sample in its shard, for loss.stored",
    ),
    "interpolate": ("pretrain.interpolate:main", "the model between two checkpoints of one architecture"),
    "convert": ("pretrain.convert:main", "a checkpoint as transformers' CLIPModel, or one of those as ours"),
    "push": ("pretrain.hub:main", "upload a checkpoint to the Hugging Face hub"),
}
"""What is done beside training: where it is, and what it does. A recipe of such a name needs its path."""


def main(argv: list[str]) -> int:
    """Train the dual encoder of a recipe, or run one of the other commands; see `pairstream pretrain --help`."""
    if argv and argv[0] in COMMANDS:
        module, function = COMMANDS[argv[0]][0].split(":")
        return getattr(import_module(module), function)(argv[1:])
    words = [word for word in argv if word != CHECK]
    command = read_training_command("pretrain", PretrainRecipe, words, resumes_others=True)
    if command is None:
        lines = [f"  pairstream pretrain {name:<12}{text}" for name, (_, text) in COMMANDS.items()]
        print(f"{CHECK} first compares the gradient of these processes with that of one; pretrain only")
        print("\n" + "\n".join(["further commands, each with --help:", *lines]))
        return 0
    from pretrain.trainer import Trainer

    trainer = Trainer(command.recipe, resume=command.resume, overwrite=command.overwrite)
    if CHECK in argv:
        trainer.check_gradients()
    trainer.train()
    return 0
