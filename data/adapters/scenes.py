"""The embedded data set `scenes`: samples composed from OpenMoji art (docs/scenes.md)."""

from __future__ import annotations

import io
import random
from typing import Any

from data.adapters.common import Counted
from data.scenes.compose import SPLITS, Scene, compose
from data.scenes.draw import PURPOSE, draw, drawings
from data.scenes.language import captions, post
from data.scenes.questions import questions
from data.scenes.vocabulary import subset
from data.shards import Sample
from pairstream.errors import nearest, require

LICENCE = "CC BY-SA 4.0"
ATTRIBUTION = (
    "Composed from emojis designed by OpenMoji (openmoji.org), some repainted. License: CC BY-SA 4.0"
)
SMALLEST = 48  # pixels; below it the smaller objects are no longer legible


def samples(
    split: str, *, seed: int = 0, count: int | None = None, size: int = 96, kinds: int | None = None
) -> Counted:
    """Pictures of one to three kinds of objects, with captions, questions, masks and, for faces, a post.

    Sample `i` depends on (seed, split, i, size, kinds) alone: a longer set begins with the shorter one.

    Args:
        split: `train`; `val` (combinations as in training, new pictures); or `test` (every combination of
            kinds never occurs in training, of any seed; every single kind does).
        seed: Of the whole set.
        count: Number of samples; 6,000, 500 and 600 when None.
        size: Side of the square pictures in pixels.
        kinds: How many kinds of objects occur, of all categories; fewer are learnt sooner. All when None.

    Returns:
        An iterator over JPEG samples with five captions. Their JSON has `questions`, `objects` (with `box` and `mask`),
        `background`, `relation`, `licence`, `attribution`, and for scenes with a face `label` and `text`.

    Raises:
        ValueError: An unknown split, a count below 1, a size below 48, a number of kinds there is not.
        ImportError: The extra `data` is not installed.

    Example:
        >>> first = next(samples("train"))                                        # doctest: +SKIP
        >>> first.captions[0]                                                     # doctest: +SKIP
    """
    if split not in SPLITS:
        raise ValueError(
            f"scenes has no split {split!r}: expected one of {', '.join(SPLITS)}{nearest(split, SPLITS)}"
        )
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1 sample, got {count}")
    if size < SMALLEST:
        raise ValueError(f"size must be at least {SMALLEST} pixels (objects get illegible below), got {size}")
    drawings()
    for module in ("emoji", "resvg_py"):
        require(module, "data", PURPOSE)
    names = subset(kinds)
    total = count or SPLITS[split]
    return Counted(total, (sample(split, seed, index, size, names) for index in range(total)))


def sample(split: str, seed: int, index: int, size: int, names: tuple[str, ...]) -> Sample:
    """The sample number `index` of a split."""
    scene = compose(split, seed, index, names)
    picture, objects = draw(scene, size)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, subsampling=0)  # full colour resolution: objects are small
    rng = random.Random(f"scenes/{seed}/{split}/{index}/words")
    meta: dict[str, Any] = {
        "width": size,
        "height": size,
        "questions": questions(scene, split, index, names, rng),
        "objects": [{**item, "unicode_name": unicode_name(item["hex"])} for item in objects],
        "background": {"name": scene.background.name, "colour": scene.colour or None},
        "relation": relation(scene),
    }
    texts = captions(scene, rng)
    posted = post(scene, rng)
    if posted is not None:
        meta["text"], meta["label"] = posted
    meta |= {"licence": LICENCE, "attribution": ATTRIBUTION}
    return Sample(f"scenes-{split}-{index:06d}", file.getvalue(), "jpg", texts, meta)


def relation(scene: Scene) -> dict[str, str] | None:
    """How the first two kinds lie to each other, where that is clear."""
    if len(scene.groups) < 2:
        return None
    one, other = scene.groups[:2]
    found = scene.relation(one, other)
    return {"subject": one.kind.name, "relation": found, "object": other.kind.name} if found else None


def unicode_name(code: str) -> str:
    """The character's Unicode name, such as `red apple`."""
    names = require("emoji", "data", PURPOSE).EMOJI_DATA
    character = chr(int(code, 16))
    entry = names.get(character) or names.get(character + "\ufe0f")
    return entry["en"].strip(":").replace("_", " ")
