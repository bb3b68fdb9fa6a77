"""Our uint8 transforms against open_clip's own image_transform, on photographs."""

import io
from unittest import mock

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from data.pictures import Picture
from data.transforms import EvalTransform, TrainTransform, decode_image

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def photographs(shared):
    """Forty photographs as they are, and forty cut to other aspect ratios: those of the folder are square."""
    found = []
    for number, path in enumerate(sorted((shared / "flickr8k/Flickr8k_Dataset").glob("*.jpg"))[:40]):
        found.append(path.read_bytes())
        box = (0, 0, 160, 157 - 3 * number) if number % 2 else (0, 0, 157 - 3 * number, 160)
        file = io.BytesIO()
        Image.open(path).crop(box).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def reference(data: bytes, transform) -> torch.Tensor:
    return transform(Image.open(io.BytesIO(data))) * 255  # mean 0 and std 1 below: back to 0..255


@pytest.mark.parametrize("size", [64, 224, (96, 128)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_eval_pixels(photographs, size, mode):
    ours = EvalTransform(size, resize_mode=mode)
    theirs = image_transform(
        size, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=mode, interpolation="bicubic"
    )
    differences = []
    for data in photographs:
        expected = reference(data, theirs)
        result = ours(decode_image(data)).float()
        assert result.shape == expected.shape
        differences.append((result - expected).abs().mean().item())
    assert np.mean(differences) < 0.1
    assert np.max(differences) < 0.5


def enlarged(data: bytes, side: int) -> bytes:
    """A photograph made larger, with grain, or there would be nothing to get wrong at full size."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 5, (image.height, image.width, 1))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=90
    )
    return file.getvalue()


@pytest.mark.parametrize(("side", "size"), [(None, 64), (None, 224), (256, 224), (512, 224), (1024, 224)])
def test_train_pixels_of_the_same_crop(photographs, side, size):
    """open_clip's own training transform, given our crop; decoded in full and at a reduced size."""
    ours = TrainTransform(size)
    theirs = image_transform(size, is_train=True, mean=(0.0,) * 3, std=(1.0,) * 3)
    files = photographs if side is None else [enlarged(data, side) for data in photographs[:12]]
    exact, scaled = [], []
    for number, data in enumerate(files):
        picture = Picture(data)
        box = ours.crop(picture.height, picture.width, np.random.default_rng(number))
        with mock.patch.object(RandomResizedCrop, "get_params", return_value=box):
            expected = reference(data, theirs)
        result = ours(decode_image(data), np.random.default_rng(number))
        exact.append((result.float() - expected).abs().mean().item())
        result = ours.load(picture, np.random.default_rng(number))
        scaled.append((result.float() - expected).abs().mean().item())
    assert np.mean(exact) < 0.1
    assert np.mean(scaled) < 2.5
