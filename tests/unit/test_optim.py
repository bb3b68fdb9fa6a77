"""The optimiser's groups and the learning rate of a step."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pretrain.checkpoint import load_optimizer_state, optimizer_state, save_tensors
from pretrain.muon import orthogonalise
from pretrain.optim import build_optimizer, learning_rate_factor, set_learning_rate
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_optim import WSD, AdafactorConfig, AdamW, Cosine, LionConfig, MuonConfig, Rsqrt
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


@pytest.mark.parametrize("shape", ["sqrt", "linear"])
def test_wsd_is_stable_and_falls_at_the_end(shape):
    config = WSD(warmup=10, decay=20, final=0.1, shape=shape)
    factors = [learning_rate_factor(step, 100, config) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert factors[10:81] == [1.0] * 71
    assert factors[85] == pytest.approx(0.1 + 0.9 * (1 - (0.5 if shape == "sqrt" else 0.25)))
    assert factors[100] == pytest.approx(0.1)
    assert factors[80:] == sorted(factors[80:], reverse=True)
    longer = [learning_rate_factor(step, 150, config) for step in range(80)]
    assert longer == factors[:80]  # a longer run begins in the same way


def test_rsqrt_falls_by_its_timescale_and_cools_down():
    config = Rsqrt(warmup=10, timescale=100, cooldown=50)
    factors = [learning_rate_factor(step, 400, config) for step in range(401)]
    assert factors[9] == factors[10] == 1.0
    assert factors[110] == pytest.approx(2**-0.5)
    assert factors[310] == pytest.approx(0.5)
    assert factors[375] == pytest.approx(0.5 * (1 + 365 / 100) ** -0.5)
    assert factors[400] == 0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    endless = Rsqrt(warmup=10, timescale=100)
    assert learning_rate_factor(310, 311, endless) == pytest.approx(0.5)


def test_no_decay_at_all_stays_at_the_peak():
    assert [learning_rate_factor(step, 4, WSD(warmup=0, decay=0)) for step in range(4)] == [1.0] * 4


def test_a_schedule_longer_than_its_run_is_refused():
    content = {"run": "r", "data": {"train": "x"}, "steps": 100}
    for schedule, said in (
        ({"kind": "wsd", "warmup": 50, "decay": 51}, r"warmup \(50\) and schedule.decay \(51\) are longer"),
        (
            {"kind": "rsqrt", "warmup": 50, "cooldown": 60},
            r"schedule.cooldown \(60\) are longer .* \(100 steps\)",
        ),
        ({"kind": "wsd", "warmup": 100}, "would never reach its peak"),
        ({"kind": "wsd", "cooldown": 3}, "cooldown"),
    ):
        with pytest.raises(ValueError, match=said):
            PretrainRecipe.model_validate({**content, "schedule": schedule})
    recipe = PretrainRecipe.model_validate({**content, "schedule": {"warmup": 3}})
    assert isinstance(recipe.schedule, Cosine)  # as before there were others


def test_a_step_of_lion_by_hand():
    torch.manual_seed(0)
    weight, gain = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.ones(4))
    config = LionConfig(lr=0.01, weight_decay=0.5, betas=(0.9, 0.99))
    optimizer = build_optimizer([("weight", weight), ("gain", gain)], config)
    expected = [weight.detach().double(), gain.detach().double()]
    momenta = [torch.zeros_like(value) for value in expected]
    for _ in range(3):
        for number, (parameter, decay) in enumerate(((weight, 0.5), (gain, 0.0))):
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad.double()
            direction = torch.sign(0.9 * momenta[number] + 0.1 * gradient)
            expected[number] = expected[number] * (1 - 0.01 * decay) - 0.01 * direction
            momenta[number] = 0.99 * momenta[number] + 0.01 * gradient
        optimizer.step()
    for parameter, value in zip((weight, gain), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-6, atol=1e-6)


def test_a_step_of_adafactor_by_hand():
    """Without momentum: rank-one second moments of a matrix, whole ones of a vector; decay only for the matrix."""
    torch.manual_seed(0)
    weight, gain = nn.Parameter(torch.randn(20, 16)), nn.Parameter(torch.ones(4))
    config = AdafactorConfig(lr=0.01, weight_decay=0.5, momentum=None)
    optimizer = build_optimizer([("weight", weight), ("gain", gain)], config)
    expected, row, column = weight.detach().double(), 0.0, 0.0
    vector, second = gain.detach().double(), 0.0
    for step in range(1, 4):
        weight.grad, gain.grad = torch.randn_like(weight), torch.randn_like(gain)
        beta = min(0.999, 1 - step**-0.8)
        square = weight.grad.double() ** 2
        row = beta * row + (1 - beta) * square.mean(1, keepdim=True)
        column = beta * column + (1 - beta) * square.mean(0, keepdim=True)
        estimate = row * column / row.mean()
        expected = expected * (1 - 0.01 * 0.5) - 0.01 * weight.grad.double() / estimate.sqrt()
        second = beta * second + (1 - beta) * gain.grad.double() ** 2
        vector = vector - 0.01 * gain.grad.double() / second**0.5
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gain.detach().double(), vector, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize(
    "config",
    [MuonConfig(lr=0.1), LionConfig(lr=0.1), AdafactorConfig(lr=0.1), AdafactorConfig(lr=0.1, momentum=None)],
    ids=["muon", "lion", "adafactor", "adafactor without momentum"],
)
def test_an_optimiser_goes_on_from_its_saved_state_bit_for_bit(config, tmp_path):
    def run(stops: set[int]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        named = [("weight", nn.Parameter(torch.randn(20, 16, 2, 2))), ("gain", nn.Parameter(torch.ones(8)))]
        optimizer = build_optimizer(named, config)
        for step in range(6):
            if step in stops:
                save_tensors(optimizer_state(optimizer), tmp_path / "state.safetensors")
                optimizer = build_optimizer(named, config)
                assert load_optimizer_state(optimizer, load_file(tmp_path / "state.safetensors")) == 2
            for _, parameter in named:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return [parameter.detach() for _, parameter in named]

    for one, other in zip(run(set()), run({2, 5}), strict=True):
        assert torch.equal(one, other)
