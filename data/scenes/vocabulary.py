"""What scenes are made of: the objects with their words, the colours, the backgrounds with theirs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

# OpenMoji's own palette, light and dark tone of each colour. Art drawn in one pair is repainted in another.
PALETTE = {
    "red": ("#EA5A47", "#D22F27"),
    "blue": ("#92D3F5", "#61B2E4"),
    "green": ("#B1CC33", "#5C9E31"),
    "yellow": ("#FCEA2B", "#F1B31C"),
    "pink": ("#FFA7C0", "#E67A94"),
    "purple": ("#B399C8", "#8967AA"),
}
COLOUR_SYNONYMS = {
    "red": ("bright red",),
    "blue": ("light blue",),
    "green": ("light green",),
    "yellow": ("golden",),
    "orange": ("dark orange",),
    "pink": ("rose",),
    "purple": ("violet",),
    "brown": ("dark brown",),
    "white": ("off white",),
    "grey": ("gray",),
}


@dataclass(frozen=True)
class Kind:
    """One kind of object.

    Attributes:
        name: What most people call it, singular.
        category: `animal`, `fruit`, `food`, `vehicle`, `plant`, `clothing`, `thing`, `shape` or `face`.
        looks: Colour -> (code point of the drawing in hex, the colour it is drawn in or None when it is
            used as it is). More than one entry: the colour varies and has to be read from the picture.
        synonyms: Other words for it, singular.
        mirror: Whether the drawing may be mirrored (False for writing).
        sentiment: Of a face: `positive`, `neutral` or `negative`.
        mood: Of a face: how it feels, one word.
    """

    name: str
    category: str
    looks: Mapping[str, tuple[str, str | None]]
    synonyms: tuple[str, ...] = ()
    mirror: bool = True
    sentiment: str = ""
    mood: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return (self.name, *self.synonyms)

    @property
    def colourful(self) -> bool:
        """Whether pictures show this kind in several colours."""
        return len(self.looks) > 1


# code point, colour of the drawing ("" where no single colour stands out), name, synonyms
ANIMALS = """
1F404 -      cow
1F416 pink   pig, piglet, hog
1F418 grey   elephant
1F992 -      giraffe
1F993 -      zebra
1F43C -      panda, panda bear
1F438 green  frog, toad
1F427 -      penguin
1F9A9 pink   flamingo
1F433 blue   whale
1F419 red    octopus
1F980 red    crab
1F40C -      snail
1F41D -      bee, honeybee
1F41E red    ladybug, ladybird
"""
FRUIT = """
1F34A orange orange, tangerine
1F34C yellow banana
1F349 -      slice of watermelon, watermelon slice, piece of watermelon
1F347 purple bunch of grapes
1F353 red    strawberry
1F34D -      pineapple
"""
FOOD = """
1F955 orange carrot
1F344 red    mushroom, toadstool
1F354 -      burger, hamburger
1F355 -      slice of pizza, pizza slice, piece of pizza
1F369 -      donut, doughnut
1F366 -      ice cream cone, ice cream
"""
VEHICLES = """
1F692 red    fire truck, fire engine
1F6B2 -      bicycle, bike
2708  grey   airplane, plane
1F680 -      rocket, spaceship
26F5  -      sailboat, sailing boat
"""
PLANTS = """
1F332 green  pine tree, fir tree
1F334 -      palm tree, palm
1F335 green  cactus
1F33B yellow sunflower
1F339 red    rose
"""
CLOTHES = """
1F451 yellow crown
1F3A9 black  top hat
"""
THINGS = """
26BD  -      soccer ball, football
1F3C0 orange basketball
1F381 -      gift, present
1F3B8 red    guitar
1F511 orange key
1F4FA black  television, tv
1F3E0 -      house, home
26C4  white  snowman
1F319 yellow moon, crescent moon
2B50  yellow star
2601  grey   cloud
1F308 -      rainbow
"""
SHAPES = """
1F53A red    triangle
"""
# name: synonyms, category, the drawing and the colour it has, further colours
REPAINTED = {
    "car": (("automobile",), "vehicle", "1F697", "red", ("blue", "green", "yellow", "purple")),
    "balloon": ((), "thing", "1F388", "red", ("blue", "green", "yellow", "purple", "pink")),
    "umbrella": ((), "thing", "2602", "purple", ("red", "blue", "green", "yellow")),
    "shirt": (("t-shirt",), "clothing", "1F455", "blue", ("red", "green", "yellow", "purple", "pink")),
    "dress": (("gown",), "clothing", "1F457", "blue", ("red", "green", "yellow", "purple", "pink")),
    "backpack": (("rucksack",), "clothing", "1F392", "red", ("blue", "green", "yellow", "purple")),
    "fish": ((), "animal", "1F41F", "blue", ("red", "green", "yellow", "purple")),
    "butterfly": ((), "animal", "1F98B", "blue", ("red", "green", "yellow", "pink")),
}
# families that OpenMoji draws in several colours itself
FAMILIES = {
    "heart": ((), "shape", "red 2764, orange 1F9E1, yellow 1F49B, green 1F49A, blue 1F499, purple 1F49C"),
    "circle": (("disc",), "shape", "red 1F534, yellow 1F7E1, green 1F7E2, blue 1F535, purple 1F7E3"),
    "square": ((), "shape", "red 1F7E5, orange 1F7E7, yellow 1F7E8, green 1F7E9, blue 1F7E6, purple 1F7EA"),
    "book": ((), "thing", "red 1F4D5, green 1F4D7, blue 1F4D8, orange 1F4D9"),
    "apple": ((), "fruit", "red 1F34E, green 1F34F"),
}  # fmt: skip
# code point, sentiment, mood, name, synonyms
FACES = """
1F600 positive happy      grinning face, happy face, smiley
1F60D positive "in love"  face with heart eyes, smiley with heart eyes
1F60E positive relaxed    face with sunglasses, cool face
1F610 neutral  bored      neutral face, straight face
1F634 neutral  tired      sleeping face, sleepy face
1F62D negative sad        crying face, weeping face
1F621 negative angry      angry face, furious face
1F922 negative sick       sick face, nauseated face
"""
UNMIRRORED = {"book"}
FEWEST = 12  # kinds; of fewer, too few combinations are left to hold out


@functools.cache
def kinds() -> dict[str, Kind]:
    """All kinds by name, in a fixed order."""
    found: list[Kind] = []
    tables = {
        "animal": ANIMALS,
        "fruit": FRUIT,
        "food": FOOD,
        "vehicle": VEHICLES,
        "plant": PLANTS,
        "clothing": CLOTHES,
        "thing": THINGS,
        "shape": SHAPES,
    }
    for category, table in tables.items():
        for line in table.strip().splitlines():
            code, colour, words = line.split(maxsplit=2)
            name, *synonyms = words.split(", ")
            looks = {colour.replace("-", ""): (code, None)}
            found.append(Kind(name, category, looks, tuple(synonyms), name not in UNMIRRORED))
    for name, (synonyms, category, code, colour, others) in REPAINTED.items():
        looks = {colour: (code, None), **dict.fromkeys(others, (code, colour))}
        found.append(Kind(name, category, looks, synonyms))
    for name, (synonyms, category, variants) in FAMILIES.items():
        pairs = [variant.split() for variant in variants.split(", ")]
        looks = {colour: (code, None) for colour, code in pairs}
        found.append(Kind(name, category, looks, synonyms, name not in UNMIRRORED))
    for line in FACES.strip().splitlines():
        code, sentiment, rest = line.split(maxsplit=2)
        mood, words = rest[1:].split('" ', 1) if rest[0] == '"' else rest.split(maxsplit=1)
        name, *synonyms = words.strip().split(", ")
        found.append(Kind(name, "face", {"": (code, None)}, tuple(synonyms), sentiment=sentiment, mood=mood))
    return {kind.name: kind for kind in found}


def subset(count: int | None) -> tuple[str, ...]:
    """Names of so many kinds, as varied as that number can be: the categories take turns.

    Args:
        count: How many; a larger subset holds the smaller ones. All, in the order of `kinds`, when None.

    Returns:
        The names.

    Raises:
        ValueError: Fewer than FEWEST, or more than there are.
    """
    if count is None:
        return tuple(kinds())
    if not FEWEST <= count <= len(kinds()):
        raise ValueError(
            f"scenes has {len(kinds())} kinds of objects: expected {FEWEST} to as many, got {count}"
        )
    categories: dict[str, list[str]] = {}
    for name, kind in kinds().items():
        categories.setdefault(kind.category, []).append(name)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*categories.values()))
    return tuple(itertools.islice((name for name in turns if name), count))


@functools.cache
def alike(one: str, other: str) -> bool:
    """Whether two kinds could be mistaken in words, as a heart and a face with heart eyes: never in one picture."""
    table = kinds()
    return one == other or any(
        one in name.split() or other in known.split()
        for name in table[other].names
        for known in table[one].names
    )


@dataclass(frozen=True)
class Background:
    """One background.

    Attributes:
        name: `meadow`, `beach`, ..., or `plain`, `gradient`, `stripes`, `dots`, `checks`, `noise`.
        phrases: What a caption may say about it; `{colour}` stands for its colour.
        place: What somebody answers to "where is it?"; empty where it is no place.
        synonyms: Other such answers.
        shows: Kinds that can be seen in it already; no object of theirs is put in front of it.
    """

    name: str
    phrases: tuple[str, ...]
    place: str = ""
    synonyms: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()


BACKGROUNDS = (
    Background("meadow", ("in a meadow", "on the grass", "in a green field"), "meadow", ("grass", "field")),
    Background("beach", ("on the beach", "at the beach", "on a sandy beach"), "beach", ("sand",)),
    Background(
        "night", ("under the stars", "at night", "in the night sky"), "night sky", ("stars", "sky"), ("star",)
    ),
    Background("snow", ("in the snow", "in a snowy landscape"), "snow", ("snowy landscape",)),
    Background("desert", ("in the desert", "in a sandy desert"), "desert", ("sand dunes",)),
    Background("sea", ("in the sea", "under water", "in the ocean"), "sea", ("ocean", "water")),
    Background("room", ("in a room", "indoors", "inside a room"), "room", ("indoors", "house"), ("house",)),
    Background("street", ("on a street", "on the road", "in the street"), "street", ("road",), ("house",)),
    Background("plain", ("on a {colour} background", "in front of a {colour} wall")),
    Background("gradient", ("on a {colour} background", "against a {colour} backdrop")),
    Background("stripes", ("on a striped {colour} background", "in front of striped {colour} wallpaper")),
    Background("dots", ("on a dotted {colour} background", "in front of dotted {colour} wallpaper")),
    Background("checks", ("on a checkered {colour} background", "on a checkered {colour} tablecloth")),
    Background("noise", ("on a rough {colour} wall", "on a grainy {colour} background")),
)
# pale, so that every object stands out
BACKGROUND_COLOURS = {
    "white": (252, 252, 250),
    "grey": (205, 207, 210),
    "blue": (190, 218, 246),
    "green": (200, 233, 196),
    "yellow": (253, 242, 184),
    "pink": (252, 212, 224),
    "purple": (222, 208, 242),
    "brown": (219, 196, 168),
}
