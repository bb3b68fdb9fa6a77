"""Recorded attention: the same outputs, all layers, no traces left, and relevance by hand."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from explain.attention import record_attention
from explain.relevance import chefer_relevance, rollout
from pretrain.encoder import build_encoder
from pretrain.recipe_model import TowersModel
from pretrain.short_texts import text_features


@pytest.mark.parametrize(("kind", "layers"), [("vit", 3), ("vit_avg", 3), ("resnet", 1), ("timm_vit", 6)])
def test_a_recorded_tower_gives_what_it_gave_before(explained, pictures, kind, layers):
    encoder = explained[kind]
    pixels = encoder.pixels(pictures(encoder))
    fused = nn.functional.scaled_dot_product_attention
    plain = encoder.model.encode_image(pixels)
    with record_attention(encoder.model.visual) as weights:
        watched = encoder.model.encode_image(pixels)
    torch.testing.assert_close(watched, plain, atol=1e-5, rtol=1e-4)
    assert len(weights) == layers
    for each in weights:
        torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:-1]))
    assert nn.functional.scaled_dot_product_attention is fused
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_shortcut_of_torch_is_recorded_too(explained, pictures):
    encoder = explained["vit"]
    with torch.no_grad(), record_attention(encoder.model.visual) as weights:
        encoder.model.encode_image(encoder.pixels(pictures(encoder)))
    assert len(weights) == 3


def test_text_attention_is_causal_where_the_tower_is(explained):
    encoder = explained["vit"]
    tokens = encoder.tokenize(["a red heart", "two of them in a row"])
    with record_attention(encoder.model.transformer) as weights:
        row = text_features(encoder.model, tokens)
    torch.testing.assert_close(row, encoder.model.encode_text(tokens), atol=1e-5, rtol=1e-4)
    assert len(weights) == 2
    assert all(float(each.detach().triu(1).abs().max()) == 0 for each in weights)


def test_transformers_text_is_recorded_and_padding_is_not_looked_at(tiny_bert, explained):
    text = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    content = {"kind": "towers", "embed_dim": 16, "text_tower": text, "image_tower": {"kind": "vit"}}
    encoder = build_encoder(TowersModel.model_validate(content), device="cpu")
    encoder.model.eval()
    with record_attention(encoder.model.text) as weights:
        encoder.model.encode_text(encoder.tokenize(["a red thing"]))
    assert len(weights) == 2
    assert float(weights[0].detach()[..., 5:].abs().max()) == 0  # start, three words and an end


def test_only_the_watched_module_is_recorded_and_an_error_leaves_nothing_behind(explained, pictures):
    encoder = explained["vit"]
    fused = nn.functional.scaled_dot_product_attention

    def fail():
        with record_attention(encoder.model.visual) as weights:
            encoder.model.encode_text(encoder.tokenize(["a dog"]))
            assert weights == []
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert nn.functional.scaled_dot_product_attention is fused
    assert not encoder.model.visual._forward_pre_hooks


def test_other_threads_are_left_alone(explained, pictures):
    encoder = explained["vit"]
    pixels = encoder.pixels(pictures(encoder))
    rows = []
    with record_attention(encoder.model.visual) as weights:
        thread = threading.Thread(target=lambda: rows.append(encoder.model.encode_image(pixels).detach()))
        thread.start()
        thread.join()
        assert weights == []
        plain = encoder.model.encode_image(pixels)
        assert len(weights) == 3
    torch.testing.assert_close(rows[0], plain.detach(), atol=1e-5, rtol=1e-4)


def test_grouped_queries_and_masks_are_computed_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    mask = torch.rand(5, 5, generator=generator) > 0.4
    mask.fill_diagonal_(True)

    class Attend(nn.Module):
        def forward(self, **options):
            return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)

    for options in ({"attn_mask": mask}, {"is_causal": True}, {"attn_mask": mask.float(), "scale": 0.3}):
        plain = Attend()(**options)
        attend = Attend()
        with record_attention(attend) as weights:
            torch.testing.assert_close(attend(**options), plain, atol=1e-6, rtol=1e-5)
        assert weights[0].shape == (2, 4, 5, 5)


def test_relevance_is_the_read_out_row_of_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(2, 3, 5, 5, generator=generator).double().softmax(-1) for _ in range(4)]
    gradients = [torch.randn(2, 3, 5, 5, generator=generator).double() for _ in range(4)]
    start = torch.rand(2, 5, generator=generator).double()
    for image in range(2):
        relevance, rolled = torch.eye(5).double(), torch.eye(5).double()
        for attention, gradient in zip(weights, gradients, strict=True):
            step = torch.zeros(5, 5).double()
            for head in range(3):
                step += (attention[image, head] * gradient[image, head]).clamp(min=0) / 3
            relevance = relevance + step @ relevance
            rolled = (attention[image].mean(0) + torch.eye(5).double()) / 2 @ rolled
        found = chefer_relevance(weights, gradients, start)[image]
        torch.testing.assert_close(found, start[image] @ relevance)
        torch.testing.assert_close(rollout(weights, start)[image], start[image] @ rolled)


def test_attention_pooling_has_no_path_around_it():
    weights = [torch.full((1, 1, 2, 2), 0.5), torch.tensor([[[[0.25, 0.75]]]])]
    gradients = [torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 2)]
    torch.testing.assert_close(
        chefer_relevance(weights, gradients, torch.ones(1, 1)), torch.tensor([[0.25, 0.75]])
    )
