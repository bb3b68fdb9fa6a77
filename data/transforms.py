"""Pictures from bytes to uint8 tensors: decoding, and the crops and resizes of open_clip on integers.

Everything stays uint8 from the file to the device, which is a quarter of the memory traffic of float32; the
device normalises. On photographs the results differ from open_clip's by less than 0.1 of 255 on average; by
less than 2.5 where JPEGs are decoded at a reduced size, which only `TrainTransform.load` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.pictures import MAX_PIXELS, Picture, borrow

# What `interpolate` calls, with a place for the result, which spares the allocation and a copy.
resize_into: Any = getattr(torch.ops.aten._upsample_bicubic2d_aa, "out", None)

MOST_FRAMES = 32  # that lie side by side in what a picture is resized to, of which the middle one is taken
INTERPOLATIONS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> torch.Tensor:
    """Decode one picture to RGB; `data.pictures.Picture` has the details.

    Args:
        data: The encoded file: JPEG, PNG, WebP, or whatever Pillow reads.
        max_pixels: Largest width * height that is decoded.
        formats: The only ones that are tried; see `open_picture`.

    Returns:
        uint8 (3, H, W): a view of rows of RGB pixels, the layout that resizing is fastest from.

    Raises:
        Fault: `too_large_image` or `undecodable_image`.

    Example:
        >>> decode_image(path.read_bytes()).shape                                 # doctest: +SKIP
        torch.Size([3, 480, 640])
    """
    return as_planes(Picture(data, max_pixels=max_pixels, formats=formats).pixels())


def as_planes(pixels: np.ndarray) -> torch.Tensor:
    """Rows of pixels uint8 (H, W, 3) seen as (3, H, W), without a copy."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _resize(
    image: torch.Tensor, size: tuple[int, int], interpolation: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Antialiased resize of uint8 (3, H, W) to (3, *size), as Pillow rounds.

    It is `out`, filled, where that helps; else it has memory of its own, of any layout.
    """
    if tuple(image.shape[-2:]) == size:
        return image.clone()
    if interpolation == "bicubic":
        # torchvision's own call without its dispatch, which costs a tenth of the work at 224 px. The rows are made
        # contiguous before the batch dimension comes: only then has that dimension the stride by which torch knows
        # interleaved pixels for such, and writes them as such (at 256 px a third faster than into planes).
        rows = image.permute(1, 2, 0)  # (H, W, 3)
        if not rows.is_contiguous():
            memory = borrow("crop", rows.numel()).reshape(rows.shape)
            np.copyto(memory, rows.numpy())
            rows = torch.from_numpy(memory)
        pixels = rows[None].permute(0, 3, 1, 2)
        if out is not None and resize_into is not None:
            resize_into(pixels, size, False, None, None, out=out[None])
            return out
        return interpolate(pixels, size=size, mode="bicubic", antialias=True)[0]
    # torchvision knows on which processors the integer kernel of `bilinear` can be trusted.
    return F.resize(image, list(size), _interpolation(interpolation), antialias=True)


def middle(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle of a picture (3, H, W) that is very much longer than the frame that it is to fill; others as they are.

    A picture of 20,000 x 1 pixels is a few hundred bytes; to fill 224 x 224 it would be made 4.5 million pixels long.
    """
    height, width = image.shape[-2:]
    rows = min(height, max(MOST_FRAMES * width * size[0] // size[1], 1))
    columns = min(width, max(MOST_FRAMES * height * size[1] // size[0], 1))
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, top : top + rows, left : left + columns]


def _interpolation(name: str) -> InterpolationMode:
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation {name!r}: expected one of {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[name]


def _size(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"image size (height, width) must be positive, got {(height, width)}")
    return int(height), int(width)


@dataclass(frozen=True)
class EvalTransform:
    """open_clip's evaluation transform without the normalisation: resize, then a centre crop or padding.

    Attributes:
        size: (height, width) of the result, or one number for both.
        interpolation: `bicubic` or `bilinear`, always antialiased.
        resize_mode: `shortest` fills the frame and crops, `longest` fits into it and pads, `squash` ignores
            the aspect ratio. Of a picture more than 32 frames long `shortest` takes the middle.
        fill_color: Grey level of the padding.

    Raises:
        ValueError: An unknown mode, or a size below 1.

    Reference:
        open_clip/transform.py, image_transform.

    Example:
        >>> EvalTransform(64)(torch.zeros(3, 100, 200, dtype=torch.uint8)).shape
        torch.Size([3, 64, 64])
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.size))
        _interpolation(self.interpolation)
        if self.resize_mode not in ("shortest", "longest", "squash"):
            raise ValueError(
                f"resize_mode {self.resize_mode!r}: expected 'shortest', 'longest' or 'squash' (open_clip's names)"
            )

    def __call__(self, image: torch.Tensor, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Transform one picture.

        Args:
            image: uint8 (3, H, W).
            rng: Not used; the train transform takes one.

        Returns:
            uint8 (3, height, width), contiguous.
        """
        return self.apply(image, rng).contiguous()

    def apply(
        self,
        image: torch.Tensor,
        rng: np.random.Generator | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same: `out`, filled, where that helps; else in memory of its own, of whichever layout is fastest."""
        target_h, target_w = self.size
        if self.resize_mode == "squash":
            return _resize(image, self.size, self.interpolation, out)
        if self.resize_mode == "shortest":
            image = middle(image, self.size)
        height, width = image.shape[-2:]
        if self.resize_mode == "shortest" and target_h == target_w:
            # As torchvision's Resize(int): the long side is cut off, not rounded.
            if height <= width:
                resized = (target_h, int(target_h * width / height))
            else:
                resized = (int(target_w * height / width), target_w)
        else:
            ratios = (height / target_h, width / target_w)
            ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
            resized = (round(height / ratio), round(width / ratio))
        resized = (max(resized[0], 1), max(resized[1], 1))
        if resized == self.size:
            return _resize(image, self.size, self.interpolation, out)
        image = _resize(image, resized, self.interpolation)
        pad_h, pad_w = max(target_h - image.shape[-2], 0), max(target_w - image.shape[-1], 0)
        if pad_h or pad_w:
            sides = [pad_w // 2, pad_h // 2, (pad_w + 1) // 2, (pad_h + 1) // 2]
            image = F.pad(image, sides, fill=self.fill_color)
        top = round((image.shape[-2] - target_h) / 2)
        left = round((image.shape[-1] - target_w) / 2)
        return image[:, top : top + target_h, left : left + target_w]


@dataclass(frozen=True)
class TrainTransform:
    """A random crop resized in one step, then optional flip, colour jitter and grey; all from the given
    generator.

    The defaults are open_clip's. Flips are off: captions say left and right.

    Attributes:
        size: (height, width) of the result, or one number for both.
        scale: Share of the picture's area that the crop covers, drawn uniformly.
        ratio: Aspect ratio (width / height) of the crop before resizing, drawn log-uniformly.
        interpolation: `bicubic` or `bilinear`, always antialiased.
        hflip: Probability of a mirror image.
        color_jitter: Brightness, contrast and saturation are each scaled by a factor from 1 - j to 1 + j.
        grayscale: Probability of a grey picture.

    Raises:
        ValueError: A range or probability that cannot be.

    Reference:
        torchvision.transforms.RandomResizedCrop (same distribution, other random numbers).

    Example:
        >>> crop = TrainTransform(64)
        >>> crop(torch.zeros(3, 100, 200, dtype=torch.uint8), np.random.default_rng(0)).shape
        torch.Size([3, 64, 64])
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    hflip: float = 0.0
    color_jitter: float = 0.0
    grayscale: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.size))
        _interpolation(self.interpolation)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is a range of area shares in (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is a range of positive aspect ratios, got {self.ratio}")
        for name in ("hflip", "color_jitter", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def __call__(self, image: torch.Tensor, rng: np.random.Generator | None) -> torch.Tensor:
        """Transform one picture.

        Args:
            image: uint8 (3, H, W).
            rng: The sample's random numbers.

        Returns:
            uint8 (3, height, width), contiguous.

        Raises:
            TypeError: No generator was given.
        """
        return self.apply(image, rng).contiguous()

    def apply(
        self, image: torch.Tensor, rng: np.random.Generator | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same: `out`, filled, where that helps; else in memory of its own, of whichever layout is fastest."""
        if rng is None:
            raise TypeError("TrainTransform needs a numpy Generator: call transform(image, rng)")
        return self._finish(image, self.crop(image.shape[-2], image.shape[-1], rng), rng, out)

    def load(self, picture: Picture, rng: np.random.Generator) -> torch.Tensor:
        """Decode and transform at once, a JPEG at a reduced size where the crop stays as large as the result.

        The crop is that of `self(decode_image(data), rng)`, moved by less than a pixel of the reduced picture.
        Of a 1024 px photograph to 224 px this takes about 0.6 of the CPU time; pictures of less than twice
        the result's size come as they are. The pixels differ from open_clip's by up to 2.5 of 255 on average.

        Args:
            picture: The encoded picture.
            rng: The sample's random numbers.

        Returns:
            uint8 (3, height, width), contiguous.

        Raises:
            Fault: `undecodable_image`.
        """
        return self.apply_reduced(picture, rng).contiguous()

    def apply_reduced(
        self, picture: Picture, rng: np.random.Generator, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `load` gives: `out`, filled, where that helps; else of whichever layout is fastest."""
        top, left, height, width = self.crop(picture.height, picture.width, rng)
        pixels = picture.pixels(min(height / self.size[0], width / self.size[1]), borrowed=True)
        rows, columns = pixels.shape[0] / picture.height, pixels.shape[1] / picture.width
        top, bottom = round(top * rows), round((top + height) * rows)
        left, right = round(left * columns), round((left + width) * columns)
        return self._finish(as_planes(pixels), (top, left, bottom - top, right - left), rng, out)

    def _finish(
        self,
        image: torch.Tensor,
        box: tuple[int, int, int, int],
        rng: np.random.Generator,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        top, left, height, width = box
        image = _resize(image[:, top : top + height, left : left + width], self.size, self.interpolation, out)
        if self.hflip and rng.random() < self.hflip:
            image = image.flip(-1)
        if self.color_jitter:
            image = image.contiguous()  # the mean that contrast is taken about depends on the order in memory
            for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
                image = adjust(image, 1 + self.color_jitter * rng.uniform(-1, 1))
        if self.grayscale and rng.random() < self.grayscale:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        return image

    def crop(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw the crop box: (top, left, height, width) in pixels of the source."""
        (least, most), lowest, highest = self.scale, math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            # As `rng.uniform(low, high)` to the bit, at a fifth of its time.
            area = height * width * (least + (most - least) * rng.random())
            ratio = math.exp(lowest + (highest - lowest) * rng.random())
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
        # No such box fits: the largest centred one whose aspect ratio is in range.
        w, h = width, height
        if width / height < self.ratio[0]:
            h = round(w / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(h * self.ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w
