"""Compose a scene: which kinds, how many, where; and which combinations training never sees."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from dataclasses import dataclass

from data.scenes.vocabulary import BACKGROUND_COLOURS, BACKGROUNDS, Background, Kind, kinds

SPLITS = {"train": 6000, "val": 500, "test": 600}  # and how many pictures each has by default
HELD_OUT = 5  # one pair of kinds in five occurs in the test split alone


@dataclass(frozen=True)
class Placement:
    """Where one drawing goes; lengths are shares of the picture's side.

    Attributes:
        x, y: Its centre.
        size: Its longer side before turning.
        angle: Degrees, counter-clockwise.
        mirrored: Whether left and right are swapped.
    """

    x: float
    y: float
    size: float
    angle: float
    mirrored: bool


@dataclass(frozen=True)
class Group:
    """All objects of one kind in a scene.

    Attributes:
        kind: What they are.
        colour: Theirs; "" where no single colour stands out.
        size: `big` or `small` where that is worth saying, otherwise "".
        places: One placement for each.
    """

    kind: Kind
    colour: str
    size: str
    places: tuple[Placement, ...]

    @property
    def count(self) -> int:
        return len(self.places)

    @property
    def code(self) -> str:
        """Code point of the drawing, in hex."""
        return self.kind.looks[self.colour][0]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of them all."""
        lefts, tops, rights, bottoms = zip(
            *((p.x - p.size / 2, p.y - p.size / 2, p.x + p.size / 2, p.y + p.size / 2) for p in self.places),
            strict=True,
        )
        return min(lefts), min(tops), max(rights), max(bottoms)


@dataclass(frozen=True)
class Scene:
    """What a picture shows; everything else (pixels, captions, questions) follows from it."""

    groups: tuple[Group, ...]
    background: Background
    colour: str
    texture: int

    def relation(self, one: Group, other: Group) -> str:
        """`left of`, `right of`, `above`, `below`, or "" where neither is clearly the case.

        One group is left of another when none of it reaches beyond the other's left edge and the two
        are further apart sideways than up and down.
        """
        a, b = one.box, other.box
        across = (a[0] + a[2] - b[0] - b[2]) / 2
        down = (a[1] + a[3] - b[1] - b[3]) / 2
        if abs(across) > 1.2 * abs(down):
            if a[2] <= b[0] + 0.02:
                return "left of"
            if b[2] <= a[0] + 0.02:
                return "right of"
        elif abs(down) > 1.2 * abs(across):
            if a[3] <= b[1] + 0.02:
                return "above"
            if b[3] <= a[1] + 0.02:
                return "below"
        return ""


def held_out(one: str, other: str) -> bool:
    """Whether training must not show these two kinds together.

    The rule knows no seed: whatever was trained on, the test split of any seed stays unseen.
    """
    pair = "+".join(sorted((one, other)))
    return hashlib.sha256(pair.encode()).digest()[0] % HELD_OUT == 0


@functools.cache
def held_out_pairs() -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in itertools.combinations(kinds(), 2) if held_out(*pair))


@functools.cache
def test_order(seed: int) -> tuple[tuple[str, str], ...]:
    """The held-out pairs as the test split goes through them: no two of its pictures share one early on."""
    pairs = list(held_out_pairs())
    random.Random(f"scenes/{seed}/test order").shuffle(pairs)
    return tuple(pairs)


def choose_kinds(split: str, seed: int, index: int, rng: random.Random) -> list[str]:
    """Names of the one to three kinds of a picture.

    In training and validation no two of them are a held-out pair; in the test split all pairs are.
    """
    names = list(kinds())
    wanted = rng.choices((1, 2, 3), (2, 6, 2) if split != "test" else (0, 8, 2))[0]
    if split == "test":
        order = test_order(seed)
        chosen = list(order[index % len(order)])
    else:
        chosen = [rng.choice(names)]
    for name in rng.sample(names, len(names)):
        if len(chosen) == wanted:
            break
        if name not in chosen and all(held_out(name, other) == (split == "test") for other in chosen):
            faces = {kinds()[n].sentiment for n in (*chosen, name)} - {""}
            if len(faces) < 2:  # faces in one picture agree, so that its label is clear
                chosen.append(name)
    rng.shuffle(chosen)
    return chosen


# regions (left, top, right, bottom) for one, two and three groups
REGIONS = {
    1: [[(0, 0, 1, 1)]],
    2: [
        [(0, 0, 0.5, 1), (0.5, 0, 1, 1)],
        [(0, 0, 1, 0.5), (0, 0.5, 1, 1)],
        [(0, 0, 1, 1), (0, 0, 1, 1)],
    ],
    3: [
        [(0, 0, 0.5, 1), (0.5, 0, 1, 0.5), (0.5, 0.5, 1, 1)],
        [(0, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)],
        [(0, 0.1, 0.34, 0.9), (0.33, 0.1, 0.67, 0.9), (0.66, 0.1, 1, 0.9)],
        [(0.1, 0, 0.9, 0.34), (0.1, 0.33, 0.9, 0.67), (0.1, 0.66, 0.9, 1)],
    ],
}
MARGIN = 0.02  # of the picture's side, around each drawing


def compose(split: str, seed: int, index: int) -> Scene:
    """The scene number `index` of a split; it depends on nothing else.

    Args:
        split: `train`, `val` or `test`.
        seed: Of the whole set.
        index: From 0.

    Returns:
        Its groups with their placements, and its background.
    """
    rng = random.Random(f"scenes/{seed}/{split}/{index}")
    chosen = [kinds()[name] for name in choose_kinds(split, seed, index, rng)]
    counts = [1] * len(chosen)
    if len(chosen) == 1:
        counts = rng.choices((1, 2, 3, 4), (3, 3, 3, 3))
    elif len(chosen) == 2:
        counts = list(rng.choice([(1, 1), (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2), (2, 3), (3, 2)]))
    elif rng.random() < 0.4:
        counts[0] = rng.choice((2, 3))
    sizes = [""] * len(chosen)
    if counts == [1, 1] and rng.random() < 0.6:
        sizes = rng.choice([["big", "small"], ["small", "big"]])
    regions = list(rng.choices(REGIONS[len(chosen)], (5, 4, 2) if len(chosen) == 2 else None)[0])
    if counts == [1] * len(chosen):
        rng.shuffle(regions)
    placed = place(regions, counts, sizes, [kind.mirror for kind in chosen], rng)
    groups = tuple(
        Group(kind, rng.choice(list(kind.looks)), size, tuple(places))
        for kind, size, places in zip(chosen, sizes, placed, strict=True)
    )
    background = rng.choice(BACKGROUNDS)
    colour = "" if background.place else rng.choice(list(BACKGROUND_COLOURS))
    return Scene(groups, background, colour, rng.getrandbits(32))


def place(regions, counts, sizes, mirror, rng: random.Random) -> list[list[Placement]]:
    """Throw drawings into their regions like darts; where they do not fit, make all a little smaller."""
    scale = 1.0
    while True:
        found: list[list[Placement]] = []
        everything: list[Placement] = []
        for (left, top, right, bottom), count, size, may_mirror in zip(
            regions, counts, sizes, mirror, strict=True
        ):
            room = min(right - left, bottom - top) - 2 * MARGIN
            low, high = {"big": (0.46, 0.54), "small": (0.23, 0.27), "": (0.30, 0.44)}[size]
            if len(regions) == 1 and count == 1:
                high = 0.62
            most = max(0.24, scale * min(rng.uniform(low, high), max(room, 0.46 if size == "big" else 0)))
            group: list[Placement] = []
            for _ in range(count):
                for _ in range(30):
                    side = most * rng.uniform(0.9, 1.0)
                    half = side / 2 + MARGIN
                    x0, x1 = max(left, 0) + half, min(right, 1) - half
                    y0, y1 = max(top, 0) + half, min(bottom, 1) - half
                    x = rng.uniform(x0, x1) if x0 < x1 else min(max((x0 + x1) / 2, half), 1 - half)
                    y = rng.uniform(y0, y1) if y0 < y1 else min(max((y0 + y1) / 2, half), 1 - half)
                    if all(
                        max(abs(x - p.x), abs(y - p.y)) > (side + p.size) / 2 + MARGIN for p in everything
                    ):
                        spot = Placement(
                            x, y, side, rng.uniform(-14, 14), may_mirror and rng.random() < 0.5
                        )
                        group.append(spot)
                        everything.append(spot)
                        break
                else:
                    break
            if len(group) < count:
                break
            found.append(group)
        if len(found) == len(regions):
            return found
        scale *= 0.93
