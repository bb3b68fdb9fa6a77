"""Text features without the padding are those with it; towers that see the padding are left alone."""

from __future__ import annotations

import itertools

import open_clip
import pytest
import torch

from pretrain.encoder import build_encoder
from pretrain.losses import info_nce
from pretrain.network import DualEncoder
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.short_texts import (
    cut_length,
    groups_of_like_length,
    reads_at_the_end,
    text_features,
    text_tokens,
    used_length,
)
from pretrain.trainer import Trainer

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


@pytest.mark.parametrize("count", [1, 31, 70, 300])
def test_groups_have_texts_of_like_length_and_each_once(count):
    torch.manual_seed(0)
    lengths = torch.randint(1, 20, (count,))
    groups = groups_of_like_length(torch.arange(20) < lengths[:, None])
    assert len(groups) == {1: 1, 31: 1, 70: 2, 300: 4}[count]
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(count))
    assert [length for _, length in groups] == [int(lengths[rows].max()) for rows, _ in groups]
    for (rows, length), (later, _) in itertools.pairwise(groups):
        assert length <= int(lengths[later].min()), rows


def test_tokens_in_groups_are_those_of_each_text_alone():
    model = build(False)
    texts = [" ".join(["cat"] * (1 + number % 7)) for number in range(80)]
    tokens = open_clip.SimpleTokenizer(context_length=40)(texts)
    with torch.no_grad():
        found = text_tokens(model, tokens)
        assert found.shape == (80, 9, 32)  # seven words, start and end
        for number, text in enumerate(texts):
            end = 3 + number % 7
            alone = text_tokens(model, tokens[number : number + 1])[0]
            torch.testing.assert_close(found[number, :end], alone, rtol=1e-4, atol=1e-5, msg=text)


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


SHORT = ["a red thing", "a small thing of red", "thing", "a picture of a small red thing"]


@pytest.fixture(params=["transformer", "bert"])
def recipe(request, tiny_recipe, tiny_models, tiny_bert):
    """`recipe(**keys) -> PretrainRecipe` with a text tower of context 32, causal or masked."""

    def make(**keys) -> PretrainRecipe:
        text = tiny_models["vit"]["text_tower"] | {"context_length": 32}
        if request.param == "bert":
            text = {"kind": "transformers", "name": str(tiny_bert), "context_length": 32}
        return PretrainRecipe.model_validate(
            tiny_recipe(model=tiny_models["vit"] | {"text_tower": text}, **keys)
        )

    return make


def test_training_on_cut_texts_has_the_gradients_of_whole_ones(recipe):
    encoder = build_encoder(recipe().model, device="cpu")
    encoder.model.eval()
    network = DualEncoder(encoder).double()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    tokens = encoder.tokenize(SHORT)
    length = cut_length(encoder.model, tokens)
    assert length == 16
    assert used_length(encoder.model, tokens) in (9, 10)

    def gradients(texts):
        network.zero_grad()
        info_nce(*network(images, texts)).backward()
        return {
            name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None
        }

    whole, cut = gradients(tokens), gradients(tokens[:, :length])
    assert whole.keys() == cut.keys()
    assert any("text" in name or "transformer" in name for name in whole)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "keys", [{}, {"micro_batch": 3}, {"captions": True}], ids=["", "gradcache", "several"]
)
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_gives_its_tower_short_texts_and_ends_the_same(recipe, monkeypatch, keys, tmp_path):
    """Texts of the tiny set have 6 to 10 words. Dropout is off: it would draw for other shapes."""
    if keys.pop("captions", False):
        base = recipe().data.model_dump(exclude_unset=True)
        keys = {"data": base | {"captions_per_image": 2}, "loss": {"kind": "multi_positive"}}

    def run(name):
        trainer = Trainer(recipe(run=str(tmp_path / name), steps=3, **keys))
        for layer in trainer.model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        lengths: list[int] = []
        handle = trainer.model.get_submodule(
            "text.transformer" if hasattr(trainer.model, "text") else "transformer"
        )
        handle.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append((args[0] if args else kwargs["input_ids"]).shape[1]),
            with_kwargs=True,
        )
        trainer.train()
        return trainer.model.state_dict(), lengths

    short, lengths = run("short")
    monkeypatch.setattr("pretrain.wrapping.cut_length", lambda model, tokens: tokens.shape[-1])
    whole, full = run("whole")
    assert lengths
    assert max(lengths) < min(full)
    for name, value in whole.items():
        torch.testing.assert_close(short[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_tower_that_reads_the_padding_trains_on_whole_texts():
    model = build(True, no_causal_mask=True, pool_type="last")
    tokens = open_clip.SimpleTokenizer(context_length=40)(TEXTS[:2])
    assert used_length(model, tokens) == cut_length(model, tokens) == 40
