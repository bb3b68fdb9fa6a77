"""Attention that trains without torch's copies: the same numbers, from the same parameters."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from pretrain.attention import PackedAttention, use_packed_attention


def layer(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64, **options)


CAUSAL = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)


@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["open", "causal"])
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_torchs(mask, training):
    theirs, tokens = layer().train(training), torch.randn(4, 5, 12, dtype=torch.float64)
    ours = deepcopy(theirs)
    assert use_packed_attention(nn.ModuleList([ours])) == 1
    found = []
    for one in (theirs, ours):
        x = tokens.clone().requires_grad_()
        out, weights = one(x, x, x, need_weights=False, attn_mask=mask)
        assert weights is None
        out.square().sum().backward()
        found.append([out, x.grad, *(value.grad for value in one.parameters())])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {"need_weights": True}),
        ({"add_zero_attn": True}, {"need_weights": False}),
        ({"add_bias_kv": True}, {"need_weights": False}),
        ({}, {"need_weights": False, "key_padding_mask": torch.eye(4, 5) > 0}),
        ({}, {"need_weights": False, "attn_mask": torch.eye(5) > 0}),
        ({}, {"need_weights": False, "other": True}),
    ],
    ids=["weights", "zero", "bias", "padding", "boolean mask", "other keys"],
)
def test_what_open_clips_blocks_do_not_ask_for_is_left_to_torch(options, call, monkeypatch):
    theirs, tokens = layer(**options), torch.randn(4, 5, 12, dtype=torch.float64)
    ours = deepcopy(theirs)
    use_packed_attention(nn.ModuleList([ours]))
    call = dict(call)
    keys = torch.randn(4, 5, 12, dtype=torch.float64) if call.pop("other", False) else tokens
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.attention.F", None)
        ours_out = ours(tokens, keys, keys, **call)
    for expected, got in zip(theirs(tokens, keys, keys, **call), ours_out, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_every_layer_of_an_open_clip_model_is_one(tiny_models):
    from pretrain.encoder import build_encoder
    from pretrain.recipe_model import TowersModel

    model = build_encoder(TowersModel.model_validate(tiny_models["vit"])).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [one for one in model.modules() if isinstance(one, nn.MultiheadAttention)]
    assert use_packed_attention(model) == len(layers) > 2
    assert all(type(one) is PackedAttention for one in layers)
    assert model.state_dict().keys() == before.keys()
    assert use_packed_attention(model) == 0
