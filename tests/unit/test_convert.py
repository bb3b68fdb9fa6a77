"""To transformers' CLIPModel and back: equal logits, or a refusal."""

from __future__ import annotations

import json

import pytest
import torch

from pairstream.cli import run_stage
from pretrain.cli import main
from pretrain.convert import from_transformers, require_expressible, save_transformers, to_transformers
from pretrain.encoder import Encoder, build_encoder, load_encoder
from pretrain.recipe_model import TowersModel
from pretrain.towers import instantiate

transformers = pytest.importorskip("transformers")
TEXTS = ["a red thing", "two of them, upside-down", ""]


def shaken(encoder: Encoder) -> Encoder:
    """Every tensor with values of its own, so that one in another's place shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return encoder


@pytest.fixture
def encoder(tiny_models) -> Encoder:
    return shaken(build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu"))


@pytest.fixture
def quick(encoder) -> Encoder:
    """With the activation of OpenAI's weights, and towers of different widths."""
    cfg = json.loads(json.dumps(encoder.model_cfg))
    cfg["quick_gelu"] = True
    cfg["vision_cfg"] |= {"width": 24, "mlp_ratio": 2.0}
    return shaken(Encoder(instantiate(cfg, {}), "quick", "cpu"))


def our_logits(encoder: Encoder, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features = [
            value / value.norm(dim=-1, keepdim=True)
            for value in (
                encoder.model.encode_image(encoder.pixels(images)),
                encoder.model.encode_text(tokens),
            )
        ]
        return encoder.model.logit_scale.exp() * features[0] @ features[1].T


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", ["encoder", "quick"])
def test_there_and_back(request, inputs, tmp_path, kind):
    encoder: Encoder = request.getfixturevalue(kind)
    tokens = encoder.tokenize(TEXTS)
    expected = our_logits(encoder, inputs, tokens)
    model = to_transformers(encoder)
    with torch.no_grad():
        theirs = model(input_ids=tokens, pixel_values=encoder.pixels(inputs)).logits_per_image
    assert torch.allclose(theirs, expected, atol=1e-5, rtol=1e-5)
    assert float(expected.std()) > 0.1
    back = from_transformers(model)
    assert torch.equal(our_logits(back, inputs, tokens), expected)
    assert load_encoder(back.save(tmp_path / "back")).fingerprint == back.fingerprint


def test_a_saved_folder_opens_in_transformers_with_its_processor(encoder, inputs, tmp_path):
    """Its own tokenizer and image processor, on the same strings and a picture of the input's size."""
    from PIL import Image

    folder = save_transformers(encoder, tmp_path / "hf")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = ["a red thing", "two of them, upside-down", "Hello   WORLD 123!", "naïve café", "long " * 40]
    theirs = tokenizer(words, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    ours = encoder.tokenize(words)
    ends = ours.argmax(dim=1)
    for row, end in enumerate(ends.tolist()):
        assert theirs["input_ids"][row, : end + 1].tolist() == ours[row, : end + 1].tolist(), words[row]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in inputs]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, encoder.pixels(inputs), atol=1e-5)
    with torch.no_grad():
        logits = model(**theirs, pixel_values=pixels).logits_per_image
    assert torch.allclose(logits, our_logits(encoder, inputs, ours), atol=1e-4)


def test_the_command_both_ways(encoder, inputs, tmp_path, capsys):
    encoder.save(tmp_path / "ours")
    assert run_stage(main, ["convert", str(tmp_path / "ours"), str(tmp_path / "hf")]) == 0
    words = ["convert", str(tmp_path / "hf"), str(tmp_path / "again"), "--to", "open_clip"]
    assert run_stage(main, words) == 0
    again = load_encoder(tmp_path / "again")
    tokens = encoder.tokenize(TEXTS)
    assert torch.equal(our_logits(again, inputs, tokens), our_logits(encoder, inputs, tokens))
    assert again.preprocess_cfg["mean"] == pytest.approx(encoder.preprocess_cfg["mean"])
    assert run_stage(main, ["convert", str(tmp_path / "ours"), str(tmp_path / "x"), "--to", "open_clip"]) == 2
    assert "a checkpoint in open_clip's format already" in capsys.readouterr().err


def test_what_clipmodel_cannot_be(tiny_models, tiny_bert):
    def refused(model: dict) -> None:
        require_expressible(build_encoder(TowersModel.model_validate(model), device="cpu"))

    with pytest.raises(ValueError, match=r"no such architecture: .*a ResNet image tower"):
        refused(tiny_models["resnet"])
    vit = tiny_models["vit"]
    with pytest.raises(ValueError, match=r"vision_cfg\.pool_type 'avg'"):
        refused({**vit, "image_tower": {**vit["image_tower"], "pool": "avg"}})
    bert = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    with pytest.raises(ValueError, match=r"text_cfg\.hf_model_name .* the tokenizer HFTokenizer"):
        refused({**vit, "text_tower": bert})
    timm = {"kind": "timm", "name": "test_efficientnet", "image_size": 64}
    with pytest.raises(ValueError, match=r"vision_cfg\.timm_model_name 'test_efficientnet'"):
        refused({**vit, "image_tower": timm})
    biased = build_encoder(TowersModel.model_validate(vit), device="cpu")
    biased.model.logit_bias = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match="a logit_bias"):
        require_expressible(biased)


def test_clipmodels_that_are_not_clip(encoder):
    model = to_transformers(encoder)
    model.config.text_config.hidden_act = "relu"
    with pytest.raises(
        ValueError, match=r"share one of gelu and quick_gelu, this CLIPModel has \['gelu', 'relu'\]"
    ):
        from_transformers(model)
    model.config.text_config.hidden_act = "gelu"
    model.config.text_config.layer_norm_eps = 1e-6
    with pytest.raises(ValueError, match="an eps of 1e-5"):
        from_transformers(model)
    model.config.text_config.vocab_size = 100
    with pytest.raises(ValueError, match="vocabulary of 49408 pieces, this CLIPModel has 100"):
        from_transformers(model)
