"""Folded image towers say what the library's say, and explanations of them too."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from open_clip.modified_resnet import Bottleneck
from torch import nn

from explain.methods import explain_pair
from pretrain.encoder import build_encoder, load_encoder
from pretrain.recipe_model import TowersModel
from serve.folding import fold
from serve.models import load_models, settle


@pytest.fixture
def resnet(tiny_models):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build_encoder(TowersModel.model_validate(tiny_models["resnet"]), device="cpu")
        for layer in encoder.model.visual.modules():
            if isinstance(layer, nn.BatchNorm2d):  # as after training: no norm is the identity
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
                nn.init.normal_(layer.weight, 1, 0.2)
                nn.init.normal_(layer.bias, 0, 0.2)
    return encoder


def layers(encoder, kind):
    return [each for each in encoder.model.visual.modules() if isinstance(each, kind)]


def blocks(encoder):
    return layers(encoder, Bottleneck)


@pytest.mark.parametrize("part", ["shortcut", "query"])
def test_the_comparison_sees_a_wrong_shortcut_and_a_wrong_query(resnet, part):
    folded, pictures = copy.deepcopy(resnet), torch.randint(0, 256, (5, 3, *resnet.image_size)).byte()
    fold(folded)
    changed = blocks(folded)[0].conv3 if part == "shortcut" else folded.model.visual.attnpool.q_proj
    changed.weight.data[:, changed.weight.shape[1] // 2 :] *= -1
    assert (folded.encode_images(pictures) - resnet.encode_images(pictures)).abs().max() > 1e-4


def test_what_is_loaded_is_no_work_for_the_garbage_collector():
    gc.unfreeze()
    settle()
    assert gc.get_freeze_count() > 100_000
    assert len(gc.get_objects()) < 10_000


def test_rows_and_maps_stay_and_norms_go(resnet):
    folded = copy.deepcopy(resnet)
    norms = sum(isinstance(each, nn.BatchNorm2d) for each in resnet.model.visual.modules())
    assert fold(folded) == norms > 4
    assert not any(isinstance(each, nn.BatchNorm2d) for each in folded.model.visual.modules())
    shortcuts = sum(part.downsample is not None for part in blocks(resnet))
    assert len(layers(resnet, nn.Conv2d)) - len(layers(folded, nn.Conv2d)) == shortcuts >= 4
    pictures = torch.randint(0, 256, (5, 3, *resnet.image_size), dtype=torch.uint8)
    expected = resnet.encode_images(pictures)
    torch.testing.assert_close(folded.encode_images(pictures), expected, rtol=0, atol=1e-5)
    changed = copy.deepcopy(resnet)
    next(each for each in changed.model.visual.modules() if isinstance(each, nn.BatchNorm2d)).bias.data += 1
    assert (changed.encode_images(pictures) - expected).abs().max() > 1e-4  # the rows would show a lost norm
    for method in ("gradcam", "occlusion"):
        maps = [
            explain_pair(each, pictures[0], "a red thing", method=method).heat for each in (resnet, folded)
        ]
        torch.testing.assert_close(*(torch.as_tensor(each) for each in maps), rtol=0, atol=1e-4)
    assert fold(folded) == 0


def test_other_towers_stay_as_they_are(small_encoder):
    encoder = small_encoder()
    before = encoder.fingerprint
    assert fold(encoder) == 0
    assert encoder.fingerprint == before


def test_served_models_are_folded_under_their_own_name(resnet, tmp_path):
    resnet.save(tmp_path / "model")
    models = load_models(tmp_path / "model", device="cpu")
    assert models.identity.fingerprint == load_encoder(tmp_path / "model", device="cpu").fingerprint
    assert not any(isinstance(each, nn.BatchNorm2d) for each in models.encoder.model.visual.modules())
