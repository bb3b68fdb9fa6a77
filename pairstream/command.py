"""The shape of commands that run a recipe: `STAGE RECIPE [--key value ...] [--flag ...]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from pairstream.recipe import RecipeT, load_recipe, override, recipe_names


@dataclass(frozen=True)
class TrainingCommand(Generic[RecipeT]):
    """A parsed training command."""

    recipe: RecipeT
    resume: bool
    """Continue from the run folder's newest complete checkpoint."""
    overwrite: bool
    """Replace what the run folder holds."""


TRAINING_FLAGS = {
    "--resume": "continues the run folder's newest checkpoint",
    "--overwrite": "replaces the run",
}


def read_training_command(
    stage: str, kind: type[RecipeT], argv: Sequence[str]
) -> TrainingCommand[RecipeT] | None:
    """Parse the words after `pairstream STAGE`.

    Args:
        stage: The stage's package name.
        kind: Its recipe class.
        argv: The words.

    Returns:
        The command; None when help was asked for and has been printed.

    Raises:
        FileNotFoundError: No such recipe.
        ValueError: No recipe given, or a fault in it.
    """
    found = read_recipe_command(stage, kind, argv, stage, TRAINING_FLAGS)
    if found is None:
        return None
    recipe, flags = found
    if len(flags) == len(TRAINING_FLAGS):
        raise ValueError("--resume continues a run and --overwrite replaces it: give one of them")
    return TrainingCommand(recipe, "--resume" in flags, "--overwrite" in flags)


def read_recipe_command(
    stage: str, kind: type[RecipeT], argv: Sequence[str], command: str, flags: Mapping[str, str]
) -> tuple[RecipeT, set[str]] | None:
    """Parse the words after a command that runs a recipe.

    Args:
        stage: The package whose `recipes/` folder is searched.
        kind: Its recipe class.
        argv: The words.
        command: How the command is called, after `pairstream`.
        flags: What each flag besides the recipe's keys does.

    Returns:
        The recipe and the flags that were given; None when help was asked for and has been printed.

    Raises:
        FileNotFoundError: No such recipe.
        ValueError: No recipe given, or a fault in it.
    """
    given = {word for word in argv if word in flags}
    words = [word for word in argv if word not in flags]
    helping = any(word in ("-h", "--help") for word in words)
    if not words or words[0].startswith("-"):
        if not helping:
            raise ValueError(f"which recipe? One of {', '.join(recipe_names(stage))}, or a YAML file")
        told = "; ".join(f"{flag} {does}" for flag, does in flags.items())
        print(
            f"usage: pairstream {command} RECIPE [--KEY VALUE ...]{''.join(f' [{flag}]' for flag in flags)}\n\n"
            f"RECIPE is a YAML file or one of: {', '.join(recipe_names(stage))}\n"
            "--KEY VALUE changes a key of it; its keys are listed by "
            f"`pairstream {command} RECIPE --help`\n{told}"
        )
        return None
    if helping:
        override(load_recipe(kind, stage, words[0]), ["--help"], f"pairstream {command} {words[0]}")
    return load_recipe(kind, stage, words[0], words[1:]), given
