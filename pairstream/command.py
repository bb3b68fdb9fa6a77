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
    resume: bool | str
    """Continue from the run folder's newest complete checkpoint; a text names another one to fall back on."""
    overwrite: bool
    """Replace what the run folder holds."""


def read_training_command(
    stage: str, kind: type[RecipeT], argv: Sequence[str], *, resumes_others: bool = False
) -> TrainingCommand[RecipeT] | None:
    """Parse the words after `pairstream STAGE`.

    Args:
        stage: The stage's package name.
        kind: Its recipe class.
        argv: The words.
        resumes_others: Whether `--resume` may be followed by the place of another checkpoint.

    Returns:
        The command; None when help was asked for and has been printed.

    Raises:
        FileNotFoundError: No such recipe.
        ValueError: No recipe given, or a fault in it.
    """
    overwrite = "--overwrite" in argv
    resume, words = take_resume([word for word in argv if word != "--overwrite"])
    if isinstance(resume, str) and not resumes_others:
        raise ValueError(
            f"--resume {resume}: `pairstream {stage}` continues only the run folder's own checkpoints"
        )
    helping = any(word in ("-h", "--help") for word in words)
    if not words or words[0].startswith("-"):
        if not helping:
            raise ValueError(f"which recipe? One of {', '.join(recipe_names(stage))}, or a YAML file")
        place = " [auto|PLACE]" if resumes_others else ""
        print(
            f"usage: pairstream {stage} RECIPE [--KEY VALUE ...] [--resume{place}] [--overwrite]\n\n"
            f"RECIPE is a YAML file or one of: {', '.join(recipe_names(stage))}\n"
            "--KEY VALUE changes a key of it; its keys are listed by "
            f"`pairstream {stage} RECIPE --help`\n"
            "--resume continues the run folder's newest checkpoint, or begins; --overwrite replaces the run"
        )
        return None
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite replaces it: give one of them")
    if helping:
        override(load_recipe(kind, stage, words[0]), ["--help"], f"pairstream {stage} {words[0]}")
    return TrainingCommand(load_recipe(kind, stage, words[0], words[1:]), resume, overwrite)


def take_resume(argv: Sequence[str]) -> tuple[bool | str, list[str]]:
    """Take `--resume`, `--resume auto` or `--resume PLACE` out of a command.

    Before the recipe, `--resume` takes no place: the word after it is the recipe.

    Returns:
        True for `--resume` and `--resume auto`, the place, or False; and the other words.
    """
    words: list[str] = []
    resume: bool | str = False
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word.startswith("--resume="):
            resume = word.removeprefix("--resume=")
        elif word == "--resume":
            named = bool(rest) and not rest[0].startswith("-") and (bool(words) or rest[0] == "auto")
            resume = rest.pop(0) if named else True
        else:
            words.append(word)
    return (True if resume == "auto" else resume), words
