"""`pairstream data ...`: get pairs, make shards and check them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

COMMANDS = {
    "list": ("data.listing:show", "show the sets that are known, with size, terms and source"),
    "prepare": ("data.prepare:prepare", "turn a data set as its authors publish it into shards"),
    "download": ("data.download.command:download", "fetch the pictures of a list of URLs into shards"),
    "curate": (
        "data.curate.command:curate",
        "keep the pairs worth training on, and report what went and why",
    ),
    "check": ("data.check:check", "count, measure and test what shards hold"),
    "doctor": ("data.doctor:doctor", "name every damaged, duplicate, oversized or empty sample"),
}
RUN_RECIPES = ("curate",)  # take `RECIPE [--key value ...]`, and read it themselves


def usage() -> str:
    """The text of `pairstream data --help`."""
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pairstream data COMMAND ...",
            "",
            *lines,
            "",
            "`pairstream data COMMAND --help` has the arguments.",
        ]
    )


def main(argv: list[str]) -> int | None:
    """Run one command of the stage.

    Args:
        argv: The words after `pairstream data`.

    Returns:
        The exit code; `check` and `doctor` give 1 for damaged shards.

    Raises:
        ValueError: No such command.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        from pairstream.errors import nearest

        raise ValueError(
            f"no command {argv[0]!r}: expected one of {', '.join(COMMANDS)}{nearest(argv[0], COMMANDS)}"
        )
    module, function = COMMANDS[argv[0]][0].split(":")
    command: Any = getattr(import_module(module), function)
    if argv[0] in RUN_RECIPES:
        return command(argv[1:])
    import tyro

    code = tyro.cli(command, args=argv[1:], prog=f"pairstream data {argv[0]}")
    return code if isinstance(code, int) else None
