"""Which parameters train, by the number of layer groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.encoder import build_encoder
from pretrain.locks import apply_lock, image_groups, set_training_mode, text_groups
from pretrain.recipe import Lock, TowersModel


@pytest.fixture(scope="module")
def models(tiny_models, tiny_bert) -> dict:
    timm = {
        **tiny_models["vit"],
        "image_tower": {"kind": "timm", "name": "test_efficientnet", "image_size": 64},
        "text_tower": {"kind": "transformers", "name": str(tiny_bert), "context_length": 8},
    }
    pooler = {**tiny_models["vit"], "text_tower": {**timm["text_tower"], "pooler": "cls_pooler"}}
    return {
        name: build_encoder(TowersModel.model_validate(content), device="cpu").model
        for name, content in {**tiny_models, "timm": timm, "pooler": pooler}.items()
    }


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm", "pooler"])
def test_groups_and_projection_cover_each_tower_once(models, kind):
    """A parameter in no group would train while its tower is locked."""
    model = models[kind]
    covered = []
    for groups, projection in (image_groups(model), text_groups(model)):
        for part in [part for group in groups for part in group] + list(projection):
            covered += [part] if isinstance(part, nn.Parameter) else list(part.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len({id(parameter) for parameter in covered}) == len(covered)
    assert {names[key] for key in names} - {names[id(p)] for p in covered} == {"logit_scale"}


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_more_groups_train_more_from_the_output_side(models, kind):
    model = models[kind]
    count = len(image_groups(model)[0])
    trained = []
    for wanted in (*range(count + 1), "all"):
        apply_lock(model, Lock(image_groups=wanted, text_groups=0))
        trained.append({name for name, value in model.named_parameters() if value.requires_grad})
    assert "logit_scale" in trained[0]
    sizes = [len(names) for names in trained[:-1]]
    assert sizes == sorted(set(sizes))
    assert set.union(*trained) == trained[-2] == trained[-1]
    apply_lock(model, Lock())
    assert all(value.requires_grad for value in model.parameters())


def test_too_many_groups_are_refused(models):
    with pytest.raises(ValueError, match="locks: text_groups 7: expected 0 to 3 or 'all'"):
        apply_lock(models["vit"], Lock(text_groups=7))
    apply_lock(models["vit"], Lock())


def test_an_unknown_image_tower_can_only_train_as_a_whole():
    model = nn.Module()
    model.visual = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="cannot lock parts of an image tower Linear; use image_groups: all"):
        apply_lock(model, Lock(image_groups=1))


def test_a_text_tower_that_is_no_bert_can_only_train_as_a_whole(tiny_models, tiny_bert):
    transformers = pytest.importorskip("transformers")
    text = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    content = {**tiny_models["vit"], "text_tower": text}
    model = build_encoder(TowersModel.model_validate(content), device="cpu").model
    config = transformers.DistilBertConfig(vocab_size=11, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    for tower in (
        transformers.DistilBertModel(config),  # its layers are in transformer.layer
        transformers.T5EncoderModel(  # encoder.block
            transformers.T5Config(vocab_size=11, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
    ):
        model.text.transformer = tower  # pyright: ignore
        with pytest.raises(
            ValueError, match=f"parts of a text tower {type(tower).__name__}: .* text_groups: all"
        ):
            apply_lock(model, Lock(text_groups=1))
        apply_lock(model, Lock(image_groups=0))
        assert all(parameter.requires_grad for parameter in tower.parameters())


def test_batch_norms_of_locked_parts_keep_their_statistics():
    layers = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Dropout())
    for parameter in layers[0].parameters():
        parameter.requires_grad = False
    set_training_mode(layers)
    assert [layer.training for layer in layers] == [False, True, True]
    layers(3 + torch.randn(4, 2, 3, 3))
    assert float(layers[0].running_mean.abs().sum()) == 0  # pyright: ignore
    assert float(layers[1].running_mean.abs().sum()) > 0  # pyright: ignore
