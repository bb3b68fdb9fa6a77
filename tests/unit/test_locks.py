"""Which parameters train, by the number of layer groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.encoder import build_encoder
from pretrain.locks import (
    apply_lock,
    image_groups,
    learning_rate_scales,
    phases_begun,
    set_training_mode,
    text_groups,
)
from pretrain.recipe import Phase
from pretrain.recipe_model import TowersModel


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
        apply_lock(model, Phase(image_groups=wanted, text_groups=0))
        trained.append({name for name, value in model.named_parameters() if value.requires_grad})
    assert "logit_scale" in trained[0]
    sizes = [len(names) for names in trained[:-1]]
    assert sizes == sorted(set(sizes))
    assert set.union(*trained) == trained[-2] == trained[-1]
    apply_lock(model, Phase())
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm", "pooler"])
def test_rates_fall_from_the_projection_to_the_stem(models, kind):
    model = models[kind]
    scales = learning_rate_scales(model, tower_lr=0.5, layer_decay=0.8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {"logit_scale": 1.0}
    for groups, projection in (image_groups(model), text_groups(model)):
        for depth, group in enumerate(reversed([*groups, []])):
            for part in group:
                for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
                    expected[names[id(parameter)]] = 0.5 * 0.8**depth
        for part in projection:
            for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
                expected[names[id(parameter)]] = 1.0
    assert scales == pytest.approx(expected)
    assert len(set(scales.values())) > 3
    assert set(learning_rate_scales(model, tower_lr=0.5).values()) == {0.5, 1.0}


def test_a_named_depth_has_the_rate_that_its_place_says(models):
    """Written out once: two blocks, so the last is one step below the projection and the stem three."""
    scales = learning_rate_scales(models["vit"], layer_decay=0.5)
    assert scales["visual.proj"] == scales["text_projection"] == scales["logit_scale"] == 1
    assert (
        scales["visual.transformer.resblocks.1.attn.in_proj_weight"] == scales["visual.ln_post.bias"] == 0.5
    )
    assert scales["transformer.resblocks.0.mlp.c_fc.weight"] == 0.25
    assert scales["visual.conv1.weight"] == scales["token_embedding.weight"] == 0.125


def test_too_many_groups_are_refused(models):
    with pytest.raises(ValueError, match="phases: text_groups 7: expected 0 to 3 or 'all'"):
        apply_lock(models["vit"], Phase(text_groups=7))
    apply_lock(models["vit"], Phase())


def test_an_unknown_image_tower_can_only_train_as_a_whole():
    model = nn.Module()
    model.visual = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="cannot lock parts of an image tower Linear; use image_groups: all"):
        apply_lock(model, Phase(image_groups=1))


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
            apply_lock(model, Phase(text_groups=1))
        apply_lock(model, Phase(image_groups=0))
        assert all(parameter.requires_grad for parameter in tower.parameters())


def text_modes(model) -> list[bool]:
    return [layer.training for layer in model.text.transformer.modules()]


def image_modes(model) -> list[bool]:
    return [layer.training for layer in model.visual.trunk.modules()]


def test_a_locked_tower_runs_as_in_evaluation_and_its_projection_trains(models):
    """BERT's dropout would else make the features of a locked tower random."""
    model = models["timm"]
    lock = Phase(image_groups=0, text_groups=0)
    apply_lock(model, lock)
    set_training_mode(model, [lock])
    assert not any(text_modes(model) + image_modes(model))
    assert all(layer.training for part in (model.text.proj, model.visual.head) for layer in part.modules())
    tokens = torch.tensor([[2, 5, 6, 3], [2, 9, 6, 3]])
    pixels = torch.randn(2, 3, 64, 64)
    first, again = model.encode_text(tokens), model.encode_text(tokens)
    assert torch.equal(first, again)
    model.zero_grad(set_to_none=True)
    (first.square().sum() + model.encode_image(pixels).square().sum()).backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".head." in name or ".proj." in name}
    assert all(float(value.grad.abs().sum()) > 0 for value in model.parameters() if value.grad is not None)
    apply_lock(model, Phase())
    set_training_mode(model, [Phase()])
    assert all(text_modes(model) + image_modes(model))
    assert not torch.equal(model.encode_text(tokens), model.encode_text(tokens))


def test_loose_layers_of_a_locked_tower_rest_too(tiny_models):
    """Patch dropout and a projection matrix belong to no layer group of a ViT."""
    model = build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu").model
    model.visual.patch_dropout = nn.Dropout(0.5)
    for locks, training in (
        ([Phase(image_groups=0)], False),
        ([Phase(image_groups=0), Phase(step=1, image_groups=1)], False),
        ([Phase(image_groups=0), Phase(step=1, image_groups=1, keep_statistics=False)], True),
        ([Phase(text_groups=0)], True),
    ):
        apply_lock(model, locks[-1])
        set_training_mode(model, locks)
        assert model.visual.patch_dropout.training is training


@pytest.mark.parametrize("keep", [True, False])
def test_an_unlocked_tower_keeps_its_statistics_and_has_no_dropout(models, keep):
    model = models["timm"]
    locks = (Phase(image_groups=0, text_groups=0), Phase(step=5, text_groups=1, keep_statistics=keep))
    assert [len(phases_begun(locks, step)) for step in (0, 4, 5, 6)] == [1, 1, 2, 2]
    assert phases_begun((), 7) == [Phase()]
    apply_lock(model, locks[1])
    set_training_mode(model, phases_begun(locks, 5))
    last = model.text.transformer.encoder.layer[-1]
    assert last.output.dense.weight.requires_grad
    assert last.output.dropout.training is not keep
    assert not any(layer.training for layer in model.text.transformer.encoder.layer[0].modules())
    assert set(image_modes(model)) == {not keep}
    norms = [layer for layer in model.visual.trunk.modules() if hasattr(layer, "running_mean")]
    before = [layer.running_mean.clone() for layer in norms]
    model.encode_image(3 + torch.randn(2, 3, 64, 64)).sum().backward()
    moved = {not torch.equal(layer.running_mean, mean) for layer, mean in zip(norms, before, strict=True)}
    assert moved == {not keep}
    assert all(layer.weight.grad is not None for layer in norms)  # the gains train all the same
    model.zero_grad(set_to_none=True)
    apply_lock(model, Phase())


def test_a_tower_that_was_never_locked_has_its_dropout(models):
    """LiT: the image tower is locked for good, the text tower learns from scratch."""
    model = models["timm"]
    for lock in (Phase(image_groups=0), Phase(step=3, image_groups=1)):
        apply_lock(model, lock)
        set_training_mode(model, [Phase(image_groups=0), lock])
        assert not any(image_modes(model))
        assert all(text_modes(model))
    apply_lock(model, Phase())


def test_batch_norms_of_locked_parts_keep_their_statistics():
    layers = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Dropout())
    for parameter in layers[0].parameters():
        parameter.requires_grad = False
    set_training_mode(layers)
    assert [layer.training for layer in layers] == [False, True, True]
    layers(3 + torch.randn(4, 2, 3, 3))
    assert float(layers[0].running_mean.abs().sum()) == 0  # pyright: ignore
    assert float(layers[1].running_mean.abs().sum()) > 0  # pyright: ignore
