"""Pictures from bytes to uint8 pixels: the header first, then the decoder that fits.

Plain JPEGs, which are nearly everything on the web, go through libjpeg-turbo (`simplejpeg`) straight into an
array: 0.8 to 0.9 of the CPU time of Pillow's decoding, plus 0.03 to 0.06 ms a picture that Pillow takes to
open it, and the same bytes. All else, and every JPEG that is not quite in order, goes through Pillow, whose
verdict is the one that counts.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from data.faults import Fault

MAX_PIXELS = 50_000_000
ORIENTATION = 0x0112  # EXIF tag
TURNED_SIDEWAYS = (5, 6, 7, 8)  # its values that exchange width and height
REDUCTIONS = (8, 4, 2)  # libjpeg-turbo has fast inverse transforms for these; 7/8 to 3/8 cost more than 1
LEAST_BORROWED = 1 << 23  # bytes; numpy asks for huge pages from 4 MB on
MOST_BORROWED = (
    1 << 25
)  # bytes (11 megapixels); what needs more is given fresh memory, so that no thread keeps it
_kept = threading.local()


def borrow(purpose: str, size: int) -> np.ndarray:
    """Memory that the same thread gets again the next time that it asks for the same purpose.

    A picture is larger than what the C library keeps between two allocations. Fresh memory comes from the kernel page
    by page, which takes as long as half the decoding.

    Args:
        purpose: Tells apart what must not overwrite each other.
        size: Bytes.

    Returns:
        uint8 (size,), with anything in it; valid until the next call.
    """
    if size > MOST_BORROWED:
        return np.empty(size, dtype=np.uint8)
    memory = getattr(_kept, purpose, None)
    if memory is None or len(memory) < size:
        memory = np.empty(max(size, LEAST_BORROWED), dtype=np.uint8)
        setattr(_kept, purpose, memory)
    return memory[:size]


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
            image = Image.open(io.BytesIO(data), formats=None if formats is None else list(formats))
        except Image.DecompressionBombError as error:
            raise Fault("too_large_image", str(error)) from error
        except UnidentifiedImageError as error:
            detail = f"not a picture: {len(data)} bytes that start with {data[:16]!r}"
            raise Fault("undecodable_image", detail) from error
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise undecodable(data, error) from error
    check_size(*image.size, max_pixels)
    return image


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        detail = f"{width} x {height} pixels, more than max_pixels = {max_pixels:,}"
        raise Fault("too_large_image", detail)


def undecodable(data: bytes, error: Exception) -> Fault:
    """The fault for a picture that turned out to be damaged."""
    return Fault("undecodable_image", f"{len(data)} bytes: {error or type(error).__name__}")


class Picture:
    """An encoded picture: its size as it is shown, then its pixels.

    The size is read from the header before anything is decoded, so that a 30,000 x 30,000 picture costs
    microseconds.

    Args:
        data: The encoded file: JPEG, PNG, WebP, or whatever Pillow reads.
        max_pixels: Largest width * height that is decoded.
        formats: The only ones that are tried; see `open_picture`.

    Raises:
        Fault: `too_large_image` or `undecodable_image`.

    Example:
        >>> picture = Picture(path.read_bytes())                                  # doctest: +SKIP
        >>> picture.height, picture.width, picture.pixels().shape                 # doctest: +SKIP
        (480, 640, (480, 640, 3))
    """

    def __init__(self, data: bytes, *, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None):
        self.data = data
        self.max_pixels, self.formats = max_pixels, formats
        self.orientation = 1
        self.image: Image.Image | None = None  # Pillow's view of it, where that is needed
        size = _plain_jpeg_size(data) if formats is None or "JPEG" in formats else None
        if size is not None:
            self.height, self.width = size
            check_size(self.width, self.height, max_pixels)
            return
        self.image = open_picture(data, max_pixels=max_pixels, formats=formats)
        self.orientation = _orientation(self.image)
        self.width, self.height = self.image.size
        if self.orientation in TURNED_SIDEWAYS:
            self.width, self.height = self.height, self.width

    def pixels(self, reduction: float = 1.0, *, borrowed: bool = False) -> np.ndarray:
        """Decode to RGB.

        EXIF orientation is applied (open_clip ignores it). Alpha is dropped as `convert("RGB")` does; 16-bit
        grey is scaled to 8 bit rather than clipped to white.

        Args:
            reduction: By how much a JPEG may be decoded smaller ("scaled DCT"): by 8, 4 or 2, the first of these
                that is no more. Other files come in full.
            borrowed: Give pixels that are valid only until the next such call in the same thread, which saves a
                tenth of the time at 256 px and a third at 1024 px.

        Returns:
            uint8 (H, W, 3); C-contiguous.

        Raises:
            Fault: `undecodable_image`.
        """
        if self.image is None or (self.orientation == 1 and self.image.format == "JPEG"):
            fast = self._decode_jpeg(next((by for by in REDUCTIONS if by <= reduction), 1), borrowed)
            if fast is not None:
                return fast
        image = self.image or open_picture(self.data, max_pixels=self.max_pixels, formats=self.formats)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF, odd palettes
            try:
                return _decode_pillow(image, self.orientation)
            except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
                raise undecodable(self.data, error) from error

    def _decode_jpeg(self, reduction: int, borrowed: bool) -> np.ndarray | None:
        if self.image is not None and self.image.mode not in ("RGB", "L"):
            return None  # CMYK, whose inverted variants Pillow knows
        height, width = math.ceil(self.height / reduction), math.ceil(self.width / reduction)
        memory = borrow("pixels", height * width * 3) if borrowed else None
        try:
            # It takes the smallest scale that gives this size, which is 1 / reduction exactly.
            decoded = simplejpeg.decode_jpeg(
                self.data, "RGB", min_height=height, min_width=width, buffer=memory
            )
        except ValueError:  # damaged, or only odd: Pillow may still manage, and has the better message
            return None
        return decoded if decoded.shape == (height, width, 3) else None


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that can be shown as it lies there; None for everything that Pillow must see."""
    if data[:2] != b"\xff\xd8" or _has_exif(data):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (int(height), int(width)) if space in ("YCbCr", "Gray", "RGB") else None


def _has_exif(data: bytes) -> bool:
    """Whether a JPEG has EXIF before its first scan, or segments that cannot be followed."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if kind == 0xDA:
            return False
        if kind == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return True
        at += 1 if kind == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    return True


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:  # the common case, and parsing EXIF is slow
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1  # damaged EXIF is no reason to lose the picture


def _decode_pillow(image: Image.Image, orientation: int) -> np.ndarray:
    image.load()
    upright = image if orientation == 1 else ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(upright)
        if grey.max(initial=0) > 255:
            grey = grey // 257
        upright = Image.fromarray(grey.astype(np.uint8))
    elif upright.mode == "P":
        upright = upright.convert("RGBA")  # a palette's own transparency, which "RGB" alone complains about
    return np.array(upright.convert("RGB"))
