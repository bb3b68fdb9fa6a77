"""Planted copies: pictures of the set, changed as the web changes them, to see whether the search finds them."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, ImageOps

from data.pictures import Picture

CROP = 0.8  # of each side that a cut copy keeps


def recoded(image: Image.Image) -> bytes:
    return jpeg(image, 40)


def resized(image: Image.Image) -> bytes:
    return jpeg(
        image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BILINEAR)
    )


def cropped(image: Image.Image) -> bytes:
    across, down = image.width * (1 - CROP) / 2, image.height * (1 - CROP) / 2
    box = round(across), round(down), round(image.width - across), round(image.height - down)
    return jpeg(image.crop(box))


def flipped(image: Image.Image) -> bytes:
    return jpeg(ImageOps.mirror(image))


def jpeg(image: Image.Image, quality: int = 85) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


KINDS: dict[str, tuple[Callable[[Image.Image], bytes], str]] = {
    "same bytes": (lambda image: b"", "the file itself under another key"),
    "encoded again": (recoded, "JPEG of quality 40"),
    "resized": (resized, "half the width and height, JPEG of quality 85"),
    "cut": (cropped, f"the middle {CROP:.0%} of each side, JPEG of quality 85"),
    "mirrored": (flipped, "left and right exchanged, JPEG of quality 85"),
}


def plant(data: bytes, max_pixels: int) -> list[bytes]:
    """The copies of one picture, in the order of `KINDS`.

    Raises:
        Fault: The picture cannot be decoded.
    """
    image = Image.fromarray(Picture(data, max_pixels=max_pixels).pixels())
    return [make(image) or data for make, _ in KINDS.values()]
