"""The `pairstream` command: a plain dict of stages, each imported only when it is asked for."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

STAGES: dict[str, tuple[str, str]] = {
    "data": ("data.cli:main", "make, check and describe shards of image-text pairs"),
    "pretrain": ("pretrain.cli:main", "train a dual encoder on shards"),
    "finetune": ("finetune.cli:main", "turn a dual encoder into a captioner or a VQA model"),
    "retrieval": ("retrieval.cli:main", "embed, index, search, and measure image-text alignment"),
    "explain": (
        "explain.cli:main",
        "heatmaps and words behind a score, whether they are true, and consistency",
    ),
    "serve": ("serve.cli:main", "answer over HTTP, with a page for people"),
    "export": ("serve.export.cli:main", "write a model for machines without torch"),
    "quickstart": (
        "pairstream.quickstart:main",
        "watch the whole path, from pictures to numbers, in minutes",
    ),
}


def usage() -> str:
    """The text of `pairstream --help`."""
    from pairstream import __version__

    lines = [
        f"pairstream {__version__}: contrastive image-text pretraining",
        "",
        "usage: pairstream STAGE ...",
        "",
    ]
    lines += [f"  {name:<12}{text}" for name, (_, text) in STAGES.items()]
    lines += [
        "",
        "`pairstream STAGE --help` lists what a stage takes; --debug shows the traceback of an error.",
    ]
    return "\n".join(lines)


GONE = 141  # what a shell says of a program whose reader has gone, as in `pairstream data list | head`


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads; nothing more is written to it then."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # it was replaced by an object
        return False
    poll = select.poll()
    poll.register(number, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


def run_stage(main: Callable[[list[str]], int | None], argv: Sequence[str]) -> int:
    """Run one stage's `main(argv)`; a user's error becomes one message and exit code 2.

    Args:
        main: The stage's entry point.
        argv: Its arguments; `--debug` anywhere among them lets the traceback through.

    Returns:
        The exit code: 0 for success, 2 for an error in what the user gave, 130 when interrupted, 141 when whoever read
        the output has gone.
    """
    from pairstream.errors import message, require_own_packages

    arguments = [argument for argument in argv if argument != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that is not UTF-8 is no reason to print nothing.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        require_own_packages()
        code = main(arguments) or 0
        sys.stdout.flush()  # a reader that has gone is met here, not while the process ends
        return code
    except BrokenPipeError as error:
        if not reader_is_gone():  # a broken connection
            print(f"error: {message(error)}", file=sys.stderr)
            return 2
        return GONE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if len(arguments) != len(argv):
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command.

    Args:
        argv: The words after `pairstream`; `sys.argv[1:]` when None.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["-V"]):
        from pairstream import __version__

        print(__version__)
        return 0
    stage = next((argument for argument in arguments if argument != "--debug"), "--help")
    if stage in ("-h", "--help", "help"):
        print(usage())
        return 0
    if stage not in STAGES:
        import difflib

        near = difflib.get_close_matches(stage, STAGES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: no stage {stage!r}: expected one of {', '.join(STAGES)}{hint}", file=sys.stderr)
        return 2
    arguments.remove(stage)

    def load_and_run(rest: list[str]) -> int | None:
        module, function = STAGES[stage][0].split(":")
        return getattr(import_module(module), function)(rest)

    return run_stage(load_and_run, arguments)


if __name__ == "__main__":
    sys.exit(main())
