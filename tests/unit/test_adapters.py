"""LoRA towers."""

from __future__ import annotations

import shutil

import open_clip
import pytest
import torch

from pretrain.adapters import add_adapters, merge_adapters, plain_state
from pretrain.checkpoint import complete_checkpoints
from pretrain.encoder import build_encoder
from pretrain.recipe import LoRA, PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.trainer import Trainer


@pytest.fixture
def models(tiny_models, tiny_bert) -> dict[str, dict]:
    bert = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    timm = {"kind": "timm", "name": "test_vit", "image_size": 64}
    return {**tiny_models, "timm": {**tiny_models["vit"], "image_tower": timm, "text_tower": bert}}


def inputs(encoder) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randint(0, 256, (3, 3, *encoder.image_size), dtype=torch.uint8), encoder.tokenize(
        ["a", "red thing", "b"]
    )


def test_the_weight_is_the_sum_written_out(models):
    encoder = build_encoder(TowersModel.model_validate(models["vit"]), device="cpu")
    images, tokens = inputs(encoder)
    before = encoder.encode_images(images), encoder.encode_texts(tokens)
    names = set(encoder.model.state_dict())
    assert add_adapters(encoder.model, LoRA(rank=2, alpha=3.0)) == 2 * 2 * 4  # towers, blocks, matrices
    # Other kernels run on weights that are computed, so equal up to rounding.
    torch.testing.assert_close(encoder.encode_images(images), before[0])
    torch.testing.assert_close(encoder.encode_texts(tokens), before[1])
    attention = encoder.model.visual.transformer.resblocks[0].attn
    adapter = attention.parametrizations.in_proj_weight
    adapter[0].up.data.normal_()
    expected = adapter.original.double() + 1.5 * adapter[0].up.double() @ adapter[0].down.double()
    torch.testing.assert_close(attention.in_proj_weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert set(plain_state(encoder.model)) == names
    changed = encoder.encode_images(images)
    assert float((changed - before[0]).abs().max()) > 0.01
    fingerprint = encoder.fingerprint
    merge_adapters(encoder.model)
    assert set(encoder.model.state_dict()) == names
    assert encoder.fingerprint == fingerprint
    torch.testing.assert_close(encoder.encode_images(images), changed)


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_adapters_train_weights_stay_and_stock_open_clip_opens_it(
    models, tiny_recipe, fresh_accelerate, kind
):
    """Every adapter moves, those of out_proj too, and everything else in the towers stays to the last bit."""
    content = tiny_recipe(model=models[kind], steps=3, schedule={"warmup": 0}, lora={"rank": 2})
    trainer = Trainer(PretrainRecipe.model_validate(content))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moved: set[str] = set()
    save = trainer.save

    def look() -> None:
        after = trainer.model.state_dict()
        moved.update(name for name in after if not torch.equal(after[name], before[name]))
        save()

    trainer.save = look  # pyright: ignore
    trainer.train()
    adapters = {name for name in before if name.endswith((".up", ".down"))}
    rest = moved - adapters
    assert adapters <= moved
    assert any("out_proj" in name for name in adapters) or kind == "timm"
    assert rest == {name for name in before if name in ("logit_scale", "visual.proj", "text_projection")} | {
        name for name in before if ".head." in name or name.startswith("text.proj")
    }
    images, tokens = inputs(trainer.encoder)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{trainer.model_folder}")
    model.eval()
    with torch.no_grad():
        theirs = model.encode_image(trainer.encoder.pixels(images), normalize=True)  # pyright: ignore
        said = model.encode_text(tokens, normalize=True)  # pyright: ignore
    torch.testing.assert_close(theirs, trainer.encoder.encode_images(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said, trainer.encoder.encode_texts(tokens), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tiny_recipe, fresh_accelerate, tmp_path):
    content = tiny_recipe(
        steps=4, lora={"towers": ["image"]}, phases=[{"image_groups": 0}, {"step": 3, "image_groups": 1}]
    )
    ends = []
    for resume in (False, True):
        fresh_accelerate()
        trainer = Trainer(PretrainRecipe.model_validate(content), resume=resume)
        trainer.train()
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        shutil.rmtree(complete_checkpoints(tmp_path / "run/checkpoints")[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_what_cannot_be_adapted_is_refused(tiny_models, tiny_recipe):
    resnet = build_encoder(TowersModel.model_validate(tiny_models["resnet"]), device="cpu").model
    with pytest.raises(
        ValueError, match=r"lora.towers: the image tower has no linear layers .* take a transformer"
    ):
        add_adapters(resnet, LoRA())
    with pytest.raises(ValueError, match="ema averages weights and lora locks them"):
        PretrainRecipe.model_validate(tiny_recipe(lora={}, ema={}))
