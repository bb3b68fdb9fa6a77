"""Compose a scene: which kinds, how many, where; and which combinations training never sees."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from dataclasses import dataclass

from data.scenes.vocabulary import BACKGROUND_COLOURS, BACKGROUNDS, Background, Kind, alike, kinds, subset

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

    @functools.cached_property
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

    def toward(self, one: Group, other: Group, relation: str) -> bool:
        """Whether somebody could say that relation of the two, clear or not (a diagonal is a bit of both)."""
        a, b = one.box, other.box
        across, down = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
        return {"left of": -across, "right of": across, "above": -down, "below": down}[relation] > 0.08


@functools.cache
def held_out(one: str, other: str) -> bool:
    """Whether training must not show these two kinds together.

    The rule knows no seed: whatever was trained on, the test split of any seed stays unseen.
    """
    pair = "+".join(sorted((one, other)))
    return hashlib.sha256(pair.encode()).digest()[0] % HELD_OUT == 0


@functools.cache
def together(one: str, other: str) -> bool:
    """Whether two kinds may share a picture: no two words for one thing, and no faces of two minds."""
    faces = {kinds()[one].sentiment, kinds()[other].sentiment} - {""}
    return one != other and len(faces) < 2 and not alike(one, other)


@functools.cache
def unseen_combinations(seed: int, names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """What the test split goes through in turn: every held-out pair, and a quarter as many triples of them.

    All differ, so that no two pictures show the same kinds before all have been shown.
    """
    pairs, triples = (
        [
            chosen
            for chosen in itertools.combinations(names, size)
            if all(held_out(*pair) and together(*pair) for pair in itertools.combinations(chosen, 2))
        ]
        for size in (2, 3)
    )
    rng = random.Random(f"scenes/{seed}/test order")
    order = pairs + rng.sample(triples, len(pairs) // 4)
    rng.shuffle(order)
    return tuple(order)


def choose_kinds(split: str, seed: int, index: int, names: tuple[str, ...], rng: random.Random) -> list[str]:
    """Names of the one to three kinds of a picture, out of `names`.

    In training and validation no two of them are a held-out pair; in the test split all pairs are.
    """
    if split == "test":
        order = unseen_combinations(seed, names)
        chosen = list(order[index % len(order)])
        rng.shuffle(chosen)
        return chosen
    wanted = rng.choices((1, 2, 3), (2, 6, 2))[0]
    chosen = [rng.choice(names)]
    for _ in range(1000):  # each name fits with most others; the bound is for a triple that may not exist
        if len(chosen) == wanted:
            break
        name = rng.choice(names)
        if all(together(name, other) and not held_out(name, other) for other in chosen):
            chosen.append(name)
    rng.shuffle(chosen)
    return chosen


# of the objects of two kinds; one of each is the most common
COUNTS = ((1, 1), (1, 1), (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (2, 3), (3, 2))
Region = tuple[float, float, float, float]  # left, top, right, bottom as shares of the side
MARGIN = 0.022  # of the picture's side, around each drawing
SIZES = {"big": (0.44, 0.52), "small": (0.23, 0.27), "": (0.28, 0.44)}


def regions(counts: list[int], sizes: list[str], rng: random.Random) -> list[Region]:
    """A part of the picture for each group; a group of many or of big objects gets more of it."""
    if len(counts) == 1:
        return [(0, 0, 1, 1)]
    if len(counts) == 2:
        weigh = [
            count + {"big": 2, "small": 0}.get(size, 1) for count, size in zip(counts, sizes, strict=True)
        ]
        cut = 0.5 + max(-0.1, min(0.1, 0.04 * (weigh[0] - weigh[1])))
        if rng.random() < 0.55:
            parts = [(0, 0, cut, 1), (cut, 0, 1, 1)]
        else:
            parts = [(0, 0, 1, cut), (0, cut, 1, 1)]
    else:
        parts = rng.choice(
            [
                [(0, 0, 0.5, 1), (0.5, 0, 1, 0.5), (0.5, 0.5, 1, 1)],
                [(0, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)],
                [(0.5, 0, 1, 1), (0, 0, 0.5, 0.5), (0, 0.5, 0.5, 1)],
                [(0, 0.5, 1, 1), (0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5)],
            ]
            if max(counts) > 1
            else [
                [(0, 0, 0.5, 1), (0.5, 0, 1, 0.5), (0.5, 0.5, 1, 1)],
                [(0, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)],
                [(0, 0.1, 0.34, 0.9), (0.33, 0.1, 0.67, 0.9), (0.66, 0.1, 1, 0.9)],
                [(0.1, 0, 0.9, 0.34), (0.1, 0.33, 0.9, 0.67), (0.1, 0.66, 0.9, 1)],
            ]
        )
    if rng.random() < 0.5 and len(counts) == 2:  # turned by half: the first group right or below
        parts = [(1 - right, 1 - bottom, 1 - left, 1 - top) for left, top, right, bottom in parts]
    return parts


def scatter(region: Region, count: int, size: str, may_mirror: bool, rng: random.Random) -> list[Placement]:
    """Objects of one kind anywhere in a region, none over another.

    Thrown like darts, which looks natural; where they do not fit that way, on a jittered grid, which always does.
    """
    left, top, right, bottom = region
    across, down = right - left, bottom - top
    rows, columns = max(
        ((rows, -(-count // rows)) for rows in range(1, count + 1)),
        key=lambda grid: min(down / grid[0], across / grid[1]),
    )
    cell = min(down / rows, across / columns) - 2 * MARGIN
    low, high = SIZES[size] if count > 1 or across * down < 1 else (0.3, 0.62)
    side = min(rng.uniform(low, high), cell)

    def spot(x: float, y: float, side: float) -> Placement:
        return Placement(x, y, side, rng.uniform(-12, 12), may_mirror and rng.random() < 0.5)

    placed: list[Placement] = []
    for _ in range(25 * count):
        half = side * rng.uniform(0.45, 0.5)
        x = rng.uniform(left + half + MARGIN, right - half - MARGIN)
        y = rng.uniform(top + half + MARGIN, bottom - half - MARGIN)
        if all(max(abs(x - p.x), abs(y - p.y)) > half + p.size / 2 + 2 * MARGIN for p in placed):
            placed.append(spot(x, y, 2 * half))
            if len(placed) == count:
                return placed
    cells = rng.sample([(row, column) for row in range(rows) for column in range(columns)], count)
    free_x, free_y = across / columns - side - 2 * MARGIN, down / rows - side - 2 * MARGIN
    return [
        spot(
            left + across * (column + 0.5) / columns + free_x * rng.uniform(-0.5, 0.5),
            top + down * (row + 0.5) / rows + free_y * rng.uniform(-0.5, 0.5),
            side * rng.uniform(0.92, 1),
        )
        for row, column in cells
    ]


def compose(split: str, seed: int, index: int, names: tuple[str, ...] = ()) -> Scene:
    """The scene number `index` of a split; it depends on nothing else.

    Args:
        split: `train`, `val` or `test`.
        seed: Of the whole set.
        index: From 0.
        names: Of the kinds that may occur; all when empty.

    Returns:
        Its groups with their placements, and its background.
    """
    rng = random.Random(f"scenes/{seed}/{split}/{index}")
    chosen = [kinds()[name] for name in choose_kinds(split, seed, index, names or subset(None), rng)]
    counts, sizes = [1] * len(chosen), [""] * len(chosen)
    if len(chosen) == 1:
        counts = [rng.randint(1, 4)]
    elif len(chosen) == 2:
        counts = list(rng.choice(COUNTS))
        if counts == [1, 1] and rng.random() < 0.6:
            sizes = rng.choice([["big", "small"], ["small", "big"]])
    elif rng.random() < 0.4:
        counts[0] = rng.choice((2, 3))
    groups = tuple(
        Group(kind, rng.choice(list(kind.looks)), size, tuple(scatter(region, count, size, kind.mirror, rng)))
        for kind, count, size, region in zip(chosen, counts, sizes, regions(counts, sizes, rng), strict=True)
    )
    shown = {kind.name for kind in chosen}
    background = rng.choice([background for background in BACKGROUNDS if not shown & set(background.shows)])
    colour = "" if background.place else rng.choice(list(BACKGROUND_COLOURS))
    return Scene(groups, background, colour, rng.getrandbits(32))
