"""Explanations as pictures: a heatmap over the image, and words on colour."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from explain.gradients import resize_map
from explain.methods import Explanation
from explain.words import Words
from pairstream.atomic import write_bytes

PAPER, INK, SOFT = (255, 255, 255), (28, 30, 34), (96, 102, 112)
FOR, AGAINST = (240, 140, 40), (70, 140, 220)
GAP = 12


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries and which knows most alphabets."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def overlay(image: Image.Image, heat: np.ndarray, side: int = 320) -> Image.Image:
    """A heatmap over a picture: what matters glows, the rest is grey and dim.

    Args:
        image: RGB.
        heat: float `(rows, columns)`; only what is positive is shown, relative to the largest.
        side: Length of the longer side, pixels.

    Returns:
        RGB, as the picture in shape.
    """
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    base = image.convert("L").resize((width, height), Image.Resampling.BICUBIC)
    grey = np.asarray(base, np.float32)[..., None].repeat(3, 2) * 0.75 + 40
    warm = resize_map(torch.from_numpy(np.ascontiguousarray(heat, np.float32))[None], (height, width))[
        0
    ].numpy()
    warm = np.clip(warm, 0, None)
    if warm.max() > 0:
        warm = warm / warm.max()
    colours = matplotlib.colormaps["inferno"](warm)[..., :3].astype(np.float32) * 255
    strength = (0.85 * np.clip(warm * 1.5, 0, 1))[..., None]
    return Image.fromarray(np.clip(grey * (1 - strength) + colours * strength, 0, 255).astype(np.uint8))


def word_lines(words: Words, width: int, size: int = 20) -> Image.Image:
    """Words on colour: orange where they speak for the score, blue where against, relative to the largest."""
    face = font(size)
    pad, line = 5, int(size * 1.9)
    largest = max((abs(value) for _, value in words), default=0) or 1
    places, x, y = [], 0, 0
    for word, value in words:
        length = int(face.getlength(word)) + 2 * pad
        if x and x + length > width:
            x, y = 0, y + line
        places.append((word, value / largest, x, y, length))
        x += length + 4
    picture = Image.new("RGB", (width, y + line), PAPER)
    draw = ImageDraw.Draw(picture)
    for word, share, x, y, length in places:
        hue = FOR if share > 0 else AGAINST
        colour = tuple(round(255 + (channel - 255) * abs(share)) for channel in hue)
        draw.rounded_rectangle((x, y + 2, x + length, y + line - 4), 5, fill=colour)
        draw.text((x + pad, y + line // 2 - 1), word, font=face, fill=INK, anchor="lm")
    return picture


def paint(explanations: Sequence[Explanation], *, side: int = 320) -> Image.Image:
    """One or several explanations of one picture: the picture, then each map under its heading.

    Args:
        explanations: Of the same picture.
        side: Length of a picture's longer side, pixels.

    Returns:
        RGB.
    """
    first = explanations[0]
    longer = max(first.image.size)
    width, height = (max(1, round(length * side / longer)) for length in first.image.size)
    plain = first.image.resize((width, height), Image.Resampling.BICUBIC)
    head, small = font(15, bold=True), font(13)
    cells = [(plain, "picture", first.title if len(explanations) == 1 else "")]
    cells += [
        (
            overlay(each.image, each.heat, side),
            each.title if len(explanations) > 1 else each.method.replace("_", " "),
            f"score {each.score:.3f}",
        )
        for each in explanations
    ]
    columns = min(len(cells), 5)
    rows = -(-len(cells) // columns)
    width, height = plain.width + GAP, plain.height + 44 + GAP
    words = word_lines(first.words, columns * width - GAP) if first.words else None
    canvas = Image.new(
        "RGB", (GAP + columns * width, GAP + rows * height + (words.height + GAP if words else 0)), PAPER
    )
    draw = ImageDraw.Draw(canvas)
    for number, (picture, heading, note) in enumerate(cells):
        x, y = GAP + number % columns * width, GAP + number // columns * height
        draw.text((x, y), shorten(heading, head, plain.width), font=head, fill=INK)
        draw.text((x, y + 20), shorten(note, small, plain.width), font=small, fill=SOFT)
        canvas.paste(picture, (x, y + 42))
    if words is not None:
        canvas.paste(words, (GAP, GAP + rows * height))
    return canvas


def shorten(text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """A text cut to a width, at its start, where paths say least."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def save_picture(explanations: Sequence[Explanation], path: Path, *, side: int = 320) -> Path:
    """Write `paint` as a PNG file, whole or not at all.

    Raises:
        ValueError: The file's name does not end in .png.
        OSError: The disk is full or not writable.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG: give a name that ends in .png")
    write_bytes(path, png(paint(explanations, side=side)))
    return path
