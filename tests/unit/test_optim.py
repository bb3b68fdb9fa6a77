"""The optimiser's groups and the learning rate of a step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pretrain.checkpoint import load_optimizer_state, optimizer_state
from pretrain.muon import orthogonalise
from pretrain.optim import build_optimizer, learning_rate_factor, set_learning_rate
from pretrain.recipe import AdamW, Cosine, MuonConfig, PretrainRecipe
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


def test_muon_takes_weights_and_leaves_embeddings_and_gains(tiny_models):
    from pretrain.encoder import build_encoder

    content = {"run": "r", "data": {"train": "x"}, "steps": 1000, "optim": {"kind": "muon"}}
    recipe = PretrainRecipe.model_validate({**content, "model": tiny_models["resnet"]})
    network = DualEncoder(build_encoder(recipe.model, device="cpu"))
    optimizer = build_optimizer(network.named_parameters(), recipe.optim)
    by_muon = {name for group in optimizer.param_groups if "momentum" in group for name in group["names"]}
    assert {
        "model.visual.conv1.weight",
        "model.visual.attnpool.q_proj.weight",
        "model.text_projection",
    } <= by_muon
    assert {"model.token_embedding.weight", "model.positional_embedding"}.isdisjoint(by_muon)
    assert {"model.logit_scale", "model.visual.bn1.weight"}.isdisjoint(by_muon)


def test_a_step_of_muon_by_hand():
    """Nesterov momentum, an orthogonal update of AdamW's size, decoupled decay; AdamW for the rest."""
    torch.manual_seed(0)
    kernel, gain = nn.Parameter(torch.randn(6, 2, 2, 2)), nn.Parameter(torch.ones(6))
    beside = nn.Parameter(torch.ones(6))
    config = MuonConfig(lr=0.1, weight_decay=0.5, momentum=0.9)
    optimizer = build_optimizer([("kernel", kernel), ("gain", gain)], config)
    adamw = build_optimizer([("gain", beside)], AdamW(lr=0.1, weight_decay=0.5))
    expected, momentum = kernel.detach().double(), torch.zeros(6, 8, dtype=torch.float64)
    for _ in range(3):
        gradient = torch.randn(6, 2, 2, 2)
        kernel.grad, gain.grad, beside.grad = gradient, torch.ones(6), torch.ones(6)
        optimizer.step()
        adamw.step()
        flat = gradient.double().flatten(1)
        momentum = 0.9 * momentum + 0.1 * flat
        update = 0.1 * flat + 0.9 * momentum
        expected = expected * (1 - 0.1 * 0.5)
        expected = expected - 0.1 * 0.2 * 8**0.5 * orthogonalise(update).view(6, 2, 2, 2)
        torch.testing.assert_close(kernel.detach().double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gain, beside)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_orthogonalise_pulls_singular_values_to_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    before, after = torch.linalg.svd(matrix, full_matrices=False), orthogonalise(matrix)
    turned = before.U.T @ after @ before.Vh.T  # diagonal: the singular vectors stayed
    values = turned.diagonal()
    assert float((turned - values.diag()).abs().max()) < 1e-9
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.25
    assert not orthogonalise(torch.zeros(3, 4)).any()


def test_muon_goes_on_from_its_saved_state_bit_for_bit():
    def run(stops: set[int]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        named = [("weight", nn.Parameter(torch.randn(4, 8))), ("gain", nn.Parameter(torch.ones(8)))]
        optimizer = build_optimizer(named, MuonConfig(lr=0.1))
        for step in range(6):
            if step in stops:
                saved = optimizer_state(optimizer)
                optimizer = build_optimizer(named, MuonConfig(lr=0.1))
                assert load_optimizer_state(optimizer, saved) == 2
            for _, parameter in named:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return [parameter.detach() for _, parameter in named]

    for one, other in zip(run(set()), run({2, 5}), strict=True):
        assert torch.equal(one, other)
