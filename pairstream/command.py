"""The shape of commands that run a recipe: `STAGE RECIPE [--key value ...] [--flag ...]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from pairstream.recipe import RecipeT, load_recipe, recipe_names, show_keys


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
    resume, words = take_resume(argv)
    if isinstance(resume, str) and not resumes_others:
        raise ValueError(
            f"--resume {resume}: `pairstream {stage}` continues only the run folder's own checkpoints"
        )
    word = "--resume [auto|PLACE]" if resumes_others else "--resume"
    flags = {
        word: "continues the run folder's newest checkpoint, or begins",
        "--overwrite": "replaces the run",
    }
    found = read_recipe_command(stage, kind, words, stage, flags)
    if found is None:
        return None
    recipe, given = found
    if resume and given:
        raise ValueError("--resume continues a run and --overwrite replaces it: give one of them")
    return TrainingCommand(recipe, resume, "--overwrite" in given)


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
        told = "; ".join(f"{flag.split()[0]} {does}" for flag, does in flags.items())
        print(
            f"usage: pairstream {command} RECIPE [--KEY VALUE ...]{''.join(f' [{flag}]' for flag in flags)}\n\n"
            f"RECIPE is a YAML file or one of: {', '.join(recipe_names(stage))}\n"
            "--KEY VALUE changes a key of it; its keys are listed by "
            f"`pairstream {command} RECIPE --help`\n{told}"
        )
        return None
    if helping:
        show_keys(kind, stage, words[0], f"pairstream {command} {words[0]}")
    return load_recipe(kind, stage, words[0], words[1:]), given


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
