"""Our uint8 transforms against open_clip's own image_transform, on photographs."""

import io

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms.functional import resized_crop
from torchvision.transforms.v2 import InterpolationMode

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
    assert np.mean(differences) < 0.5
    assert np.max(differences) < 1.5


def test_train_pixels_of_the_same_crop(photographs):
    ours = TrainTransform(64)
    differences = []
    for number, data in enumerate(photographs):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = ours.crop(image.height, image.width, np.random.default_rng(number))
        expected = resized_crop(image, *box, [64, 64], InterpolationMode.BICUBIC)
        result = ours(decode_image(data), np.random.default_rng(number))
        expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        differences.append((result.float() - expected.float()).abs().mean().item())
    assert np.mean(differences) < 0.5
