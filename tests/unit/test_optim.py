"""The optimiser's groups and the learning rate of a step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pretrain.optim import build_optimizer, learning_rate_factor, set_learning_rate
from pretrain.recipe import AdamW, Cosine, PretrainRecipe
from pretrain.trainer import DualEncoder


def test_gains_biases_and_logit_scale_do_not_decay(tiny_models):
    from pretrain.encoder import build_encoder

    recipe = PretrainRecipe.model_validate(
        {"run": "r", "data": {"train": "x"}, "steps": 1000, "model": tiny_models["resnet"]}
    )
    network = DualEncoder(build_encoder(recipe.model, device="cpu"))
    optimizer = build_optimizer(network.named_parameters(), AdamW(weight_decay=0.3))
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    assert decay.keys() == {name for name, _ in network.named_parameters()}
    assert decay["model.logit_scale"] == 0
    assert decay["model.visual.bn1.weight"] == decay["model.visual.layer1.0.bn1.bias"] == 0
    assert decay["model.ln_final.weight"] == decay["model.transformer.resblocks.0.attn.in_proj_bias"] == 0
    assert decay["model.visual.conv1.weight"] == decay["model.token_embedding.weight"] == 0.3
    assert decay["model.text_projection"] == decay["model.visual.attnpool.q_proj.weight"] == 0.3
    for name, parameter in network.named_parameters():
        assert (decay[name] > 0) == (parameter.ndim >= 2), name


def test_one_step_is_adamw_by_hand():
    """Decoupled decay, bias correction; the fused kernel is held to the formula."""
    weight, gain = nn.Parameter(torch.tensor([[2.0]])), nn.Parameter(torch.tensor([2.0]))
    config = AdamW(lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer([("weight", weight), ("gain", gain)], config)
    for parameter in (weight, gain):
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    for parameter, decay in ((weight, 0.2), (gain, 0.0)):
        expected = 2.0 * (1 - 0.1 * decay) - 0.1 * 0.5 / (math.sqrt(0.25) + 1e-6)
        assert float(parameter.detach()) == pytest.approx(expected, rel=1e-6)


def test_the_longest_prefix_sets_the_rate():
    parameters = [(name, nn.Parameter(torch.zeros(2, 2))) for name in ("a.b", "a.head.w", "c")]
    optimizer = build_optimizer(parameters, AdamW(), lr_scale={"a.": 0.1, "a.head": 1.0})
    set_learning_rate(optimizer, 0.5)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates == {"a.b": pytest.approx(0.05), "a.head.w": 0.5, "c": 0.5}


def test_locked_parameters_are_left_out_and_all_locked_is_an_error():
    free, locked = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)
    optimizer = build_optimizer([("free", free), ("locked", locked)], AdamW())
    assert [group["names"] for group in optimizer.param_groups] == [["free"]]
    with pytest.raises(ValueError, match="no parameter trains: every part is locked"):
        build_optimizer([("locked", locked)], AdamW())


def test_warmup_then_cosine():
    factors = [learning_rate_factor(step, 110, Cosine(warmup=10, final=0.1)) for step in range(111)]
    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)  # half way down
    assert factors[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factors[110] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_without_warmup_it_starts_at_the_peak():
    assert learning_rate_factor(0, 10, Cosine(warmup=0)) == 1.0
    assert learning_rate_factor(10, 10, Cosine(warmup=0)) == pytest.approx(0.0)
