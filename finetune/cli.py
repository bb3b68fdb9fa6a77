"""`pairstream finetune RECIPE`, own tables, `score` and `predict`; the first also by `python -m finetune`."""

from __future__ import annotations

from importlib import import_module

from finetune.recipe import FinetuneRecipe
from pairstream.command import read_training_command

COMMANDS = {
    "score": ("finetune.score:score", "judge a results file by the data set's annotations"),
    "predict": ("finetune.predict:predict", "write captions, answers or labels of many pictures"),
    "wise": ("finetune.wise:wise", "measure between the pretrained and the fine-tuned towers (WiSE-FT)"),
}
OWN = {
    "caption": "a captioner from a table of your own: --data my.csv --images DIR --model ENCODER",
    "classify": "a classifier, in the same way",
    "vqa": "a model that answers questions, in the same way",
    "retrieval": "both towers for finding pictures by text and back, in the same way",
    "flyp": "both towers for zero-shot classification of labelled pictures (FLYP), in the same way",
}


def main(argv: list[str]) -> int:
    """Train and measure the task model of a recipe, or run one of the other commands; see `--help`."""
    if argv and argv[0] in OWN:
        from finetune.own_data import run

        return run(argv[0], argv[1:])  # pyright: ignore[reportArgumentType]
    if argv and argv[0] in COMMANDS:
        import tyro

        module, function = COMMANDS[argv[0]][0].split(":")
        command = getattr(import_module(module), function)
        tyro.cli(command, args=argv[1:], prog=f"pairstream finetune {argv[0]}")
        return 0
    command = read_training_command("finetune", FinetuneRecipe, argv)
    if command is None:
        told = {**OWN, **{name: text for name, (_, text) in COMMANDS.items()}}
        lines = [f"  pairstream finetune {name:<10}{text}" for name, text in told.items()]
        print("\n" + "\n".join(["further commands, each with --help:", *lines]))
        return 0
    from pairstream.errors import require

    require("transformers", "finetune", "fine-tuning")
    from finetune.trainer import Finetuner

    Finetuner(command.recipe, resume=bool(command.resume), overwrite=command.overwrite).train()
    return 0
