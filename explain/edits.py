"""Captions changed so that they are no longer true: sides swapped, something denied, colours exchanged."""

from __future__ import annotations

import random
import re

COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "pink",
    "purple",
    "brown",
    "white",
    "black",
    "grey",
)  # no fruit among them
SIDES = {"left": "right", "right": "left"}
COUNTED = re.compile(r"\b(a|an|one|two|three|four|five|six)\b (?=\w)", re.IGNORECASE)


def swap_sides(text: str) -> str | None:
    """Left for right and right for left; None where neither is said.

    Example:
        >>> swap_sides("A cat left of a dog on the right")
        'A cat right of a dog on the left'
    """
    changed, count = re.subn(
        r"\b(left|right)\b", lambda match: SIDES[match[1].lower()], text, flags=re.IGNORECASE
    )
    return changed if count else None


def mirror(text: str) -> str:
    """What a caption says of the mirrored picture."""
    return swap_sides(text) or text


def deny(text: str) -> str | None:
    """The first thing that is said to be there is said not to be there; None where nothing is counted.

    Example:
        >>> deny("two red hearts and a cow")
        'no red hearts and a cow'
    """
    changed, count = COUNTED.subn("no ", text, count=1)
    return changed if count else None


def swap_colours(text: str, rng: random.Random) -> str | None:
    """Two colours exchanged, or the only one replaced by another; None where there is none.

    Example:
        >>> swap_colours("a red car and a blue dress", random.Random(0))
        'a blue car and a red dress'
    """
    found = list(dict.fromkeys(re.findall(rf"\b({'|'.join(COLOURS)})\b", text.lower())))
    if not found:
        return None
    if len(found) == 1:
        other = rng.choice([colour for colour in COLOURS if colour != found[0]])
        change = {found[0]: other}
    else:
        change = {found[0]: found[1], found[1]: found[0]}
    return re.sub(
        rf"\b({'|'.join(change)})\b", lambda match: change[match[1].lower()], text, flags=re.IGNORECASE
    )
