"""The shape that every training command has: `STAGE RECIPE [--key value ...] [--resume] [--overwrite]`."""

from __future__ import annotations

from collections.abc import Sequence
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
    words = list(argv)
    resume, overwrite = (flag in words for flag in ("--resume", "--overwrite"))
    words = [word for word in words if word not in ("--resume", "--overwrite")]
    helping = any(word in ("-h", "--help") for word in words)
    if not words or words[0].startswith("-"):
        if not helping:
            raise ValueError(f"which recipe? One of {', '.join(recipe_names(stage))}, or a YAML file")
        print(
            f"usage: pairstream {stage} RECIPE [--KEY VALUE ...] [--resume] [--overwrite]\n\n"
            f"RECIPE is a YAML file or one of: {', '.join(recipe_names(stage))}\n"
            "--KEY VALUE changes a key of it; its keys are listed by "
            f"`pairstream {stage} RECIPE --help`\n"
            "--resume continues the run folder's newest checkpoint; --overwrite replaces the run"
        )
        return None
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite replaces it: give one of them")
    if helping:
        override(load_recipe(kind, stage, words[0]), ["--help"], f"pairstream {stage} {words[0]}")
    return TrainingCommand(load_recipe(kind, stage, words[0], words[1:]), resume, overwrite)
