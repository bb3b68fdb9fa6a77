"""Activation checkpointing: the same gradients, with blocks that are run again."""

from __future__ import annotations

import pytest
import torch

from pretrain.encoder import build_encoder
from pretrain.losses import info_nce
from pretrain.network import DualEncoder
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.recompute import recompute_activations
from pretrain.resolution import set_patch_dropout
from pretrain.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def towers(tiny_models, tiny_bert) -> dict[str, dict]:
    """A `model` for each kind of tower that can recompute."""
    vit = tiny_models["vit"]
    timm = {"kind": "timm", "name": "test_vit", "image_size": 64}
    bert = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    return {"open_clip": vit, "timm and transformers": {**vit, "image_tower": timm, "text_tower": bert}}


def gradients(network: DualEncoder, batch) -> dict[str, torch.Tensor]:
    network.zero_grad()
    torch.manual_seed(5)
    info_nce(*network(*batch)).backward()
    return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("kind", ["open_clip", "timm and transformers"])
def test_gradients_are_the_same_with_dropout(towers, kind):
    torch.manual_seed(0)
    encoder = build_encoder(TowersModel.model_validate(towers[kind]), device="cpu")
    network, model = DualEncoder(encoder), encoder.model
    model.train()
    if kind == "open_clip":
        set_patch_dropout(model.visual, 0.5)
        blocks = [block.ln_1 for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks)]
    else:
        blocks = [block.norm1 for block in model.visual.trunk.blocks]
        blocks += [layer.attention for layer in model.text.transformer.encoder.layer]
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(None))
    batch = (
        torch.randint(0, 256, (4, 3, *encoder.image_size), dtype=torch.uint8),
        encoder.tokenize(["a red thing", "a small picture", "a thing", "picture of a thing"]),
    )
    expected = gradients(network, batch)
    kept, calls[:] = len(calls), []
    recompute_activations(model)
    came = gradients(network, batch)
    assert len(calls) == 2 * kept == 2 * len(blocks)  # the first layer of each ran again
    assert came.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(came[name], value, rtol=1e-6, atol=1e-9, msg=name)
    recompute_activations(model, False)
    calls.clear()
    gradients(network, batch)
    assert len(calls) == kept


@pytest.mark.parametrize(
    ("micro_batch", "model", "terms"),
    [
        (None, "vit", None),
        (3, "vit", None),
        (None, "coca", {"alignment": {}, "self_supervision": {"hidden": 24}, "captioning": {}}),
    ],
)
def test_a_run_has_the_same_weights_and_counts_the_same_flops(
    tiny_recipe, tiny_models, tmp_path, fresh_accelerate, micro_batch, model, terms, same, weights_of
):
    found = {}
    for on in (False, True):
        fresh_accelerate()
        content = tiny_recipe(
            run=str(tmp_path / str(on)),
            steps=3,
            model=tiny_models[model],
            terms=terms,
            micro_batch=micro_batch,
            checkpoint_activations=on,
            phases=[{"patch_dropout": 0.5}],
        )
        trainer = Trainer(PretrainRecipe.model_validate(content))
        trainer.train()
        found[on] = weights_of(trainer), trainer.meter.flops_per_pair()
        assert trainer.model.visual.transformer.grad_checkpointing is on
        assert model == "vit" or trainer.model.text_decoder.grad_checkpointing is on
    assert same(found[False][0], found[True][0])
    assert found[False][1] == found[True][1]


def test_towers_that_cannot_and_batch_statistics_are_refused(tiny_recipe, tiny_models, fresh_accelerate):
    timm = {
        **tiny_models["vit"],
        "image_tower": {"kind": "timm", "name": "vgg11", "image_size": 32, "projection": "classifier"},
    }
    norm = {
        **tiny_models["vit"],
        "image_tower": {"kind": "timm", "name": "test_efficientnet", "image_size": 64},
    }
    for model, said in (
        (tiny_models["resnet"], "checkpoint_activations: an image tower ModifiedResNet cannot recompute"),
        (timm, "checkpoint_activations: timm's VGG cannot recompute"),
        (
            norm,
            r"checkpoint_activations: visual\.trunk.* is a BatchNorm\w*, .* running statistics twice a step",
        ),
    ):
        fresh_accelerate()
        with pytest.raises(ValueError, match=said):
            Trainer(PretrainRecipe.model_validate(tiny_recipe(model=model, checkpoint_activations=True)))
    with pytest.raises(ValueError, match="leave compile or checkpoint_activations out"):
        PretrainRecipe.model_validate(tiny_recipe(compile=True, checkpoint_activations=True))
