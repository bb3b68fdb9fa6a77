"""Phases of small and masked pictures."""

from __future__ import annotations

import json
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from torch import nn

from pretrain.checkpoint import complete_checkpoints
from pretrain.encoder import Encoder, build_encoder, load_encoder
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.resolution import require_image_size, resize_image_tower, set_patch_dropout
from pretrain.trainer import Trainer


def make(image_tower: dict, tiny_models: dict) -> Encoder:
    torch.manual_seed(0)
    content = {**tiny_models["vit"], "image_tower": image_tower}
    return build_encoder(TowersModel.model_validate(content), device="cpu")


@pytest.fixture
def towers(tiny_models) -> dict[str, dict]:
    vit = {**tiny_models["vit"]["image_tower"], "patch_size": 8}
    return {
        "vit": vit,
        "resnet": tiny_models["resnet"]["image_tower"],
        "convnext": {"kind": "timm", "name": "test_convnext", "image_size": 64},
        "efficientnet": {"kind": "timm", "name": "test_efficientnet", "image_size": 64},
    }


def test_a_vit_has_the_positions_that_open_clip_would_load(towers, tiny_models):
    """Both ways to another size give the same model."""
    small, large = make(towers["vit"], tiny_models), make({**towers["vit"], "image_size": 64}, tiny_models)
    state = {name: value.clone() for name, value in small.model.state_dict().items()}
    resize_pos_embed(state, large.model)
    small.set_image_size((64, 64))
    assert small.model.visual.positional_embedding.shape == (65, 16)
    torch.testing.assert_close(
        small.model.visual.positional_embedding.detach(), state["visual.positional_embedding"]
    )
    large.model.load_state_dict(state)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(small.encode_images(images), large.encode_images(images))


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext", "efficientnet"])
def test_a_resized_checkpoint_opens_in_stock_open_clip(towers, tiny_models, tmp_path, kind):
    encoder = make(towers[kind], tiny_models)
    encoder.set_image_size((96, 96))
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    ours = encoder.encode_images(images)
    encoder.save(tmp_path / "model")
    again = load_encoder(tmp_path / "model", device="cpu")
    assert again.image_size == again.transform.size == (96, 96)
    assert torch.equal(again.encode_images(images), ours)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    assert preprocess.transforms[0].size in (96, (96, 96))  # pyright: ignore
    with torch.no_grad():
        theirs: Any = model.eval().encode_image(encoder.pixels(images), normalize=True)  # pyright: ignore
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_back_at_the_first_size_smooth_positions_return(towers, tiny_models):
    encoder = make(towers["vit"], tiny_models)
    visual = encoder.model.visual
    slope = torch.linspace(-1, 1, 4).view(4, 1, 1).expand(4, 4, 16).reshape(16, 16)
    visual.positional_embedding.data[1:] = slope
    first = visual.positional_embedding.detach().clone()
    resize_image_tower(visual, (64, 64))
    resize_image_tower(visual, (32, 32))
    assert torch.equal(visual.positional_embedding[0], first[0])
    assert float((visual.positional_embedding - first).detach().abs().max()) < 0.12


def test_sizes_that_a_tower_cannot_take_are_refused(towers, tiny_models):
    vit = make(towers["vit"], tiny_models).model.visual
    with pytest.raises(ValueError, match=r"image_size \(30, 30\): this image tower takes multiples of 8 x 8"):
        require_image_size(vit, (30, 30))
    with pytest.raises(ValueError, match="takes multiples of 32 x 32"):
        resize_image_tower(make(towers["resnet"], tiny_models).model.visual, (48, 48))
    vit.positional_embedding = None
    with pytest.raises(ValueError, match="cannot change that of this kind of ViT"):
        require_image_size(vit, (40, 40))
    fixed: Any = nn.Module()
    fixed.image_size = 64
    require_image_size(fixed, (64, 64))
    with pytest.raises(
        ValueError, match=r"a Module takes pictures of \(64, 64\) pixels only; open_clip could not"
    ):
        require_image_size(fixed, (32, 32))


def test_patch_dropout_hides_patches_in_training_only(towers, tiny_models):
    encoder = make(towers["vit"], tiny_models)
    seen: list[int] = []
    block = encoder.model.visual.transformer.resblocks[0]
    block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for share, training in ((0.0, True), (0.5, True), (0.99, True), (0.5, False), (0.0, True)):
        set_patch_dropout(encoder.model.visual, share)
        encoder.model.train(training)
        encoder.model.encode_image(encoder.pixels(images))
    assert seen == [17, 9, 2, 17, 17]


def test_a_vit_of_timms_and_a_tower_without_patches(towers, tiny_models):
    trunk = make({"kind": "timm", "name": "test_vit", "image_size": 64}, tiny_models).model.visual
    set_patch_dropout(trunk, 0.5)
    seen: list[int] = []
    trunk.trunk.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    trunk.train()(torch.zeros(1, 3, 64, 64))
    assert seen == [9]
    for kind in ("resnet", "convnext"):
        visual = make(towers[kind], tiny_models).model.visual
        set_patch_dropout(visual, 0.0)
        with pytest.raises(
            ValueError, match=r"patch_dropout 0.5: a .* has no patches to leave out; take a ViT"
        ):
            set_patch_dropout(visual, 0.5)


def test_a_run_grows_its_pictures(tiny_recipe, towers, tiny_models, fresh_accelerate, tmp_path, monkeypatch):
    """Steps, evaluations and checkpoints have the size of their phase; other moments go on."""
    evaluated, trained = [], []

    class Spy:
        def run(self, encoder) -> dict[str, float]:
            evaluated.append(encoder.transform.size)
            return {"probe": 0.0}

    class Watched(Trainer):
        def train_step(self, batch, *rest):
            trained.append(
                (batch["images"].shape[-1], float(getattr(self.model.visual.patch_dropout, "prob", 0)))
            )
            return super().train_step(batch, *rest)

    monkeypatch.setattr("pretrain.evaluator.load_evaluator", lambda config: Spy())
    content = tiny_recipe(
        model={**tiny_models["vit"], "image_tower": towers["vit"]},
        steps=4,
        ema={"decay": 0.5},
        schedule={"warmup": 0},
        checkpoint={"every": 2, "keep": 2},
        phases=[{"image_size": 16, "patch_dropout": 0.5}, {"step": 2}],
        evaluate=[{"use": "a:B", "every": 2}],
    )
    trainer = Watched(PretrainRecipe.model_validate(content))
    trainer.train()
    assert trained == [(16, 0.5), (16, 0.5), (32, 0.0), (32, 0.0)]
    assert evaluated == [(16, 16), (16, 16), (32, 32)]
    sizes = []
    for folder in complete_checkpoints(tmp_path / "run/checkpoints"):
        config = json.loads((folder / "model/open_clip_config.json").read_text())
        sizes.append(
            (config["model_cfg"]["vision_cfg"]["image_size"], load_encoder(folder / "model").image_size)
        )
    assert sizes == [(32, (32, 32)), (16, (16, 16))]
    steps = {
        name: float(trainer.optimizer.state[value]["step"])
        for group in trainer.optimizer.param_groups
        for name, value in zip(group["names"], group["params"], strict=True)
    }
    assert {name for name, step in steps.items() if step != 4} == {"model.visual.positional_embedding"}


def test_a_phase_that_the_tower_cannot_follow_is_refused_before_the_run(
    tiny_recipe, fresh_accelerate, tmp_path
):
    with pytest.raises(ValueError, match=r"image_size \(24, 24\): .* multiples of 16 x 16"):
        Trainer(PretrainRecipe.model_validate(tiny_recipe(phases=[{"image_size": 24}])))
    assert not (tmp_path / "run").exists()
