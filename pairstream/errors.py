"""Errors for the user: what was expected, what came, from where, what to do."""

from __future__ import annotations

import difflib
import errno
import importlib.util
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType

OWN_PACKAGES = ("data", "pretrain", "finetune", "retrieval", "explain", "serve")


def message(error: BaseException) -> str:
    """The one message the command line prints for an error.

    Args:
        error: What a stage raised.

    Returns:
        Text without a traceback; a full disk is named as such.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return (
            f"the disk is full{where}. What was complete before is untouched; "
            "free some space or choose another folder, then run the same command again "
            "(with --resume for training)."
        )
    return str(error) or type(error).__name__


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; did you mean 'lr'?`, or an empty string when nothing is close."""
    found = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional library or say which extra brings it.

    Args:
        module: The import name.
        extra: The extra of this package that carries it.
        purpose: What it is needed for, as a noun phrase.

    Returns:
        The imported module.

    Raises:
        ImportError: The library is absent; the message has the install line.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {module!r}, which could not be imported ({error}). "
            f"Install it with: pip install 'pairstream[{extra}]'"
        ) from error


def require_own_packages(names: Iterable[str] = OWN_PACKAGES) -> None:
    """Make sure that `import data` and its sisters find ours and nobody else's.

    Raises:
        ImportError: Another module or package of that name comes first on the import path.
    """
    home = Path(__file__).resolve().parent.parent
    for name in names:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec else None
        if origin is None or Path(origin).resolve().parent.parent != home:
            found = origin or (list(spec.submodule_search_locations or []) if spec else "nothing")
            raise ImportError(
                f"PairStream's package {name!r} is shadowed: expected it in {home / name}, found {found}. "
                f"Rename that module, or run from a folder that has no {name}.py and no {name}/__init__.py."
            )
