"""The Encoder: shapes, unit norms, tokens, places it loads from."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from data.faults import Fault
from pretrain.encoder import Encoder, Normalize, build_encoder, checkpoint_folder, load_encoder
from pretrain.recipe_model import TowersModel


@pytest.fixture(scope="module")
def encoders(tiny_models) -> dict[str, Encoder]:
    contents = dict(tiny_models)
    for kind, options in {
        "timm": {"name": "test_efficientnet"},
        "channels_last": {"name": "test_mambaout", "projection": "classifier"},
    }.items():
        contents[kind] = {**tiny_models["vit"], "image_tower": {"kind": "timm", "image_size": 64, **options}}
    return {
        name: build_encoder(TowersModel.model_validate(content), device="cpu")
        for name, content in contents.items()
    }


KINDS = pytest.mark.parametrize("kind", ["vit", "resnet", "timm", "channels_last"])


@KINDS
def test_rows_are_unit_norm_and_the_same_for_every_form_of_a_picture(encoders, make_picture, kind):
    encoder = encoders[kind]
    data = make_picture(1, (80, 56), "PNG")
    picture = Image.open(io.BytesIO(data))
    rows = encoder.encode_images([data, picture])
    assert rows.shape == (2, encoder.embed_dim)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2))
    assert torch.equal(encoder.preprocess(data), encoder.preprocess(picture))
    torch.testing.assert_close(rows[1], rows[0])
    torch.testing.assert_close(encoder.encode_images(encoder.preprocess(picture)[None])[0], rows[0])
    assert encoder.preprocess(data).shape == (3, *encoder.image_size)
    texts = encoder.encode_texts(["a cat", "a dog"])
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))
    assert torch.equal(encoder.encode_texts(encoder.tokenize(["a cat", "a dog"])), texts)


@KINDS
def test_encoding_leaves_batch_statistics_alone(encoders, make_picture, kind):
    encoder = encoders[kind]
    before = encoder.fingerprint
    encoder.model.train()
    encoder.encode_images([make_picture(1)])
    assert encoder.fingerprint == before


@KINDS
def test_image_tokens_lie_row_by_row_and_carry_gradients(encoders, kind):
    encoder = encoders[kind]
    images = torch.randint(0, 256, (2, 3, *encoder.image_size), dtype=torch.uint8)
    tokens = encoder.image_tokens(images)
    assert tokens.shape[0] == 2
    assert tokens.shape[2] == encoder.token_dim
    assert tokens.shape[1] == {"vit": 4, "resnet": 1, "timm": 4, "channels_last": 4}[kind]
    encoder.model.zero_grad()
    tokens.square().sum().backward()
    assert any(value.grad is not None for value in encoder.model.visual.parameters())


@pytest.mark.parametrize(
    ("kind", "stage"), [("resnet", "layer3"), ("timm", "blocks.3"), ("channels_last", "stages.2")]
)
def test_finer_tokens_are_what_the_last_stage_is_given(encoders, kind, stage):
    encoder = encoders[kind]
    pixels = encoder.pixels(torch.randint(0, 256, (2, 3, *encoder.image_size), dtype=torch.uint8))
    trunk, seen = getattr(encoder.model.visual, "trunk", encoder.model.visual), []
    handle = trunk.get_submodule(stage).register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    with torch.no_grad():
        encoder.model.encode_image(pixels)
        handle.remove()
        found, last = encoder.tokens_of(pixels, finer=True), encoder.tokens_of(pixels)
    map_ = seen[0].permute(0, 3, 1, 2) if kind == "channels_last" else seen[0]  # (b, d, rows, columns)
    torch.testing.assert_close(found, map_.flatten(2).transpose(1, 2))
    assert found.shape[1] == 4 * last.shape[1]


def test_a_tower_of_one_grid_has_no_finer_tokens(encoders):
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.raises(
        ValueError, match=r"a VisionTransformer has one grid throughout: take its last tokens"
    ):
        encoders["vit"].tokens_of(pixels, finer=True)


def test_vit_tokens_are_those_that_open_clip_pools(encoders):
    encoder = encoders["vit"]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    visual, seen = encoder.model.visual, []
    handle = visual.ln_post.register_forward_hook(lambda module, inputs, output: seen.append(output))
    encoder.model.encode_image(encoder.pixels(images))
    handle.remove()
    assert seen[0].shape == (2, 5, 16)  # the class token and a grid of 2 x 2
    torch.testing.assert_close(encoder.image_tokens(images), seen[0][:, 1:])


def test_pixels_are_normalised_as_torchvision_does(encoders):
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(Normalize(mean, std)(images), expected, rtol=0, atol=2e-6)


def test_wrong_pixels_and_no_picture_are_refused(encoders):
    with pytest.raises(
        ValueError, match=r"expected uint8 images \(b, 3, h, w\), got torch.float32 \(1, 3, 32, 32\)"
    ):
        encoders["vit"].encode_images(torch.zeros(1, 3, 32, 32))
    with pytest.raises(Fault, match="undecodable_image"):
        encoders["vit"].preprocess(b"a text")


def test_the_fingerprint_is_that_of_weights_and_configuration(encoders, tmp_path):
    encoder = encoders["vit"]
    saved = encoder.save(tmp_path / "a")
    again = load_encoder(saved)
    assert again.fingerprint == encoder.fingerprint
    with torch.no_grad():
        again.model.logit_scale += 1e-6
    assert again.fingerprint != encoder.fingerprint
    assert encoder.fingerprint != encoders["resnet"].fingerprint


def test_places_that_an_encoder_is_loaded_from(encoders, tmp_path):
    saved = encoders["vit"].save(tmp_path / "run/checkpoints/step-00000004/model")
    encoders["vit"].save(tmp_path / "run/checkpoints/step-00000002/model")
    for name in (saved, saved.parent, tmp_path / "run", f"local-dir:{saved}"):
        assert checkpoint_folder(str(name)) == saved
    assert checkpoint_folder("ViT-B-32") is None
    assert checkpoint_folder("hf-hub:some/repository") is None
    for absent in (f"local-dir:{tmp_path}/absent", f"{tmp_path}/absent"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*absent: expected a checkpoint"):
            checkpoint_folder(absent)
    with pytest.raises(ValueError, match="no checkpoint there: expected open_clip_config"):
        checkpoint_folder(str(tmp_path))
