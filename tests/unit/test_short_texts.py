"""Text features without the padding are those with it; towers that see the padding are left alone."""

from __future__ import annotations

import open_clip
import pytest
import torch

from pretrain.encoder import build_encoder
from pretrain.recipe_model import TowersModel
from pretrain.short_texts import reads_at_the_end, text_features, text_tokens

TEXTS = ["a dog", "", "a much longer text about two dogs, a boat and the hills behind the old town " * 5]


def towers(**text):
    cfg = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **text}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    return vision, cfg


def build(custom: bool, **text):
    vision, cfg = towers(**text)
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return kind(embed_dim=16, vision_cfg=vision, text_cfg=cfg).eval()


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("pool", [{}, {"pool_type": "eos", "eos_id": 49407}, {"proj_type": "none"}])
def test_equal_to_the_padded_features(custom, pool):
    model = build(custom, **pool)
    assert reads_at_the_end(model.text if custom else model)
    tokens = open_clip.SimpleTokenizer(context_length=40)(TEXTS)
    assert int((tokens[2] != 0).sum()) == 40  # cut: a text of full length is in the batch
    lengths = []
    hook = model.text.transformer if custom else model.transformer
    hook.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(text_features(model, tokens), model.encode_text(tokens))
        short, whole = text_features(model, tokens[:2]), model.encode_text(tokens)[:2]
        torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-6)
    assert lengths == [40, 40, 4, 40]
    assert text_features(model, tokens[:0]).shape == model.encode_text(tokens[:0]).shape


def padded_tokens(model, tokens):
    return model.forward_intermediates(
        text=tokens, text_indices=1, normalize_intermediates=True, intermediates_only=True
    )["text_intermediates"][-1]


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("pool", [{}, {"pool_type": "eos", "eos_id": 49407}])
def test_tokens_are_the_padded_ones_without_those_behind_the_end(custom, pool):
    model = build(custom, **pool)
    tokens = open_clip.SimpleTokenizer(context_length=40)(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(text_tokens(model, tokens), padded_tokens(model, tokens))
        short, whole = text_tokens(model, tokens[:2]), padded_tokens(model, tokens[:2])
    assert short.shape == (2, 4, 32)
    torch.testing.assert_close(short, whole[:, :4], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "text", [{"no_causal_mask": True, "pool_type": "last"}, {"embed_cls": True}, {"pool_type": "last"}]
)
def test_towers_that_see_the_padding_get_it(text):
    model = build(True, **text)
    assert not reads_at_the_end(model.text)
    tokens = open_clip.SimpleTokenizer(context_length=40)(TEXTS)
    with torch.no_grad():
        assert torch.equal(text_features(model, tokens), model.encode_text(tokens))
        assert torch.equal(text_tokens(model, tokens), padded_tokens(model, tokens))


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler"])
def test_towers_of_transformers_mask_padding_out(tiny_models, tiny_bert, pooler):
    tower = {"kind": "transformers", "name": str(tiny_bert), "context_length": 12, "pooler": pooler}
    content = {**tiny_models["vit"], "text_tower": tower}
    encoder = build_encoder(TowersModel.model_validate(content), device="cpu")
    tokens = encoder.tokenize(["a thing", "a picture of a red thing"])
    assert tokens.shape == (2, 12)
    lengths = []
    hook = encoder.model.text.transformer.register_forward_pre_hook(
        lambda _, args, words: lengths.append(words["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        short, whole = text_features(encoder.model, tokens), encoder.model.encode_text(tokens)
        text_features(encoder.model, tokens[:1])
        blank = torch.full_like(tokens[:1], 0)
        assert text_features(encoder.model, blank).shape == (1, encoder.embed_dim)
    hook.remove()
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-6)
    assert lengths == [8, 12, 4, 1]


def test_the_encoder_uses_it(small_encoder):
    encoder = small_encoder()
    lengths = []
    encoder.model.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    encoder.encode_texts(["a dog", "two dogs"])
    assert lengths == [4]
