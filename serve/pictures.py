"""A stranger's picture: from base64 to pixels, with every limit checked before the work it bounds."""

from __future__ import annotations

import base64
import binascii

from torch import Tensor

from data.faults import Fault
from data.transforms import decode_image
from serve.refusal import Refusal
from serve.settings import Limits

JPEG, SCAN = b"\xff\xd8", b"\xff\xda"  # markers; in coded pixels 0xff is followed by 0
SCANS = 100  # of a JPEG; encoders write about ten


def from_base64(text: str, limits: Limits) -> bytes:
    """The bytes of a picture given in base64, with or without a `data:` prefix.

    Raises:
        Refusal: 422: not base64; 413: too many bytes.
    """
    if text.startswith("data:"):
        head, comma, text = text[:200].partition(",")[0], text[:200].find(","), text
        if comma < 0 or not head.endswith(";base64"):
            raise Refusal(422, "bad_picture", "expected `data:image/...;base64,` before the picture")
        text = text[comma + 1 :]
    if len(text) > (limits.picture_bytes + 2) // 3 * 4:
        raise Refusal(413, "picture_too_large", f"a picture is larger than {limits.picture_bytes:,} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(422, "bad_picture", "a picture is not in base64") from None


def decode(content: bytes, limits: Limits) -> Tensor:
    """Pixels of a picture, uint8 `(3, H, W)`; the first frame of several.

    The format is one of the allowed, and the size is read from the header, before a pixel is decoded. A progressive
    JPEG goes over all its pixels once for each scan, and a scan takes some ten bytes: twelve megabytes of them
    would keep a thread busy long after everybody has given up.

    Raises:
        Refusal: 413: too many pixels or scans; 422: no picture of an allowed format, or a damaged one.
    """
    if content.startswith(JPEG) and content.count(SCAN) > SCANS:
        raise Refusal(413, "picture_too_large", f"a JPEG has more than {SCANS} scans")
    try:
        return decode_image(content, max_pixels=limits.pixels, formats=limits.formats)
    except Fault as fault:
        if fault.cause == "too_large_image":
            raise Refusal(
                413, "picture_too_large", f"a picture has more than {limits.pixels:,} pixels"
            ) from None
        raise Refusal(
            422, "bad_picture", f"not a whole picture of the formats {', '.join(limits.formats)}"
        ) from None
