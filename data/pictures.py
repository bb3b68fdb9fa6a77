"""Open a picture by its header: its format and size are known before anything is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

from data.faults import Fault

MAX_PIXELS = 50_000_000


def open_picture(
    data: bytes, *, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> Image.Image:
    """Read a picture's header with Pillow.

    Args:
        data: The encoded file.
        max_pixels: Largest width * height that may be decoded later.
        formats: The only ones that are tried, by Pillow's names; None tries all that Pillow knows, which is too
            many for a stranger's bytes.

    Returns:
        The opened picture: `format`, `size` and `mode` are known, pixels are not decoded yet.

    Raises:
        Fault: `too_large_image` or `undecodable_image`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own warning about large pictures: the limit is ours
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except Image.DecompressionBombError as error:
            raise Fault("too_large_image", str(error)) from error
        except UnidentifiedImageError as error:
            detail = f"not a picture: {len(data)} bytes that start with {data[:16]!r}"
            raise Fault("undecodable_image", detail) from error
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise undecodable(data, error) from error
    width, height = image.size
    if width * height > max_pixels:
        detail = f"{width} x {height} pixels, more than max_pixels = {max_pixels:,}"
        raise Fault("too_large_image", detail)
    return image


def undecodable(data: bytes, error: Exception) -> Fault:
    """The fault for a picture that turned out to be damaged."""
    return Fault("undecodable_image", f"{len(data)} bytes: {error or type(error).__name__}")
