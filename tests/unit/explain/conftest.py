"""The smallest encoders, and pictures to explain."""

from __future__ import annotations

import pytest
import torch

from pretrain.encoder import Encoder, build_encoder
from pretrain.recipe_model import TowersModel

VIT = {
    "kind": "towers",
    "embed_dim": 16,
    "image_tower": {
        "kind": "vit",
        "image_size": 32,
        "patch_size": 8,
        "width": 16,
        "layers": 3,
        "head_width": 8,
    },
    "text_tower": {"kind": "transformer", "context_length": 16, "width": 16, "heads": 2, "layers": 2},
}
TOWERS = {
    "vit": VIT,
    "vit_avg": {**VIT, "image_tower": {**VIT["image_tower"], "pool": "avg"}},
    "resnet": {**VIT, "image_tower": {"kind": "resnet", "image_size": 64, "width": 8}},
    "timm_vit": {**VIT, "image_tower": {"kind": "timm", "name": "test_vit", "image_size": 160}},
    "timm_cnn": {**VIT, "image_tower": {"kind": "timm", "name": "test_efficientnet", "image_size": 64}},
    "channels_last": {
        **VIT,
        "image_tower": {
            "kind": "timm",
            "name": "test_mambaout",
            "projection": "classifier",
            "image_size": 64,
        },
    },
}


@pytest.fixture(scope="session")
def explained() -> dict[str, Encoder]:
    """Random encoders by kind of image tower; weights spread enough that attention is not flat."""
    found = {}
    for name, content in TOWERS.items():
        torch.manual_seed(0)
        found[name] = build_encoder(TowersModel.model_validate(content), device="cpu")
        with torch.no_grad():
            for parameter in found[name].model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(2)
    return found


@pytest.fixture(scope="session")
def pictures(make_picture):
    """`pictures(encoder, n) -> uint8 (n, 3, h, w)`."""

    def make(encoder: Encoder, count: int = 2) -> torch.Tensor:
        return torch.stack([encoder.preprocess(make_picture(seed, (96, 96))) for seed in range(count)])

    return make
