"""Fixtures for all tests: the real data sets where they lie, and small pictures."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets beside the repository; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("PAIRSTREAM_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(
            f"no data sets at {folder} (set PAIRSTREAM_SHARED to the folder that holds flickr8k/ and vqav2_small/)"
        )
    return folder


def picture(seed: int, size: tuple[int, int] = (48, 48), format: str = "JPEG") -> bytes:
    """A small encoded picture of smooth coloured noise, the same for the same seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="session")
def make_picture():
    """`make_picture(seed, size=(w, h), format="JPEG") -> bytes`."""
    return picture
