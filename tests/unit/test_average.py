"""The average of the weights: its recurrence, its buffers, and where a run uses it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.average import WeightAverage
from pretrain.checkpoint import complete_checkpoints, read_trained_weights
from pretrain.encoder import load_encoder
from pretrain.recipe import EMA, PretrainRecipe
from pretrain.trainer import Trainer


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))


@pytest.mark.parametrize("ramp", [True, False])
def test_it_is_the_recurrence_written_out(ramp):
    model = layers().double()
    average = WeightAverage(model, EMA(decay=0.4, ramp=ramp))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(8):
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        model(torch.randn(5, 3, 4, 4, dtype=torch.float64))  # moves the running statistics
        average.update(step)
        decay = min(0.4, (1 + step) / (10 + step)) if ramp else 0.4
        for name, value in model.state_dict().items():
            past = decay * expected[name] + (1 - decay) * value
            expected[name] = past if value.is_floating_point() else value.clone()
    assert average.state["1.num_batches_tracked"] == 8
    assert not torch.equal(average.state["1.running_var"], model.state_dict()["1.running_var"])
    for name, value in expected.items():
        torch.testing.assert_close(average.state[name], value, rtol=1e-12, atol=1e-12)


def test_what_never_trains_is_equal_to_the_last_bit():
    model = layers().requires_grad_(False)
    average = WeightAverage(model, EMA(decay=0.9))
    for step in range(50):
        average.update(step)
    assert all(torch.equal(average.state[name], value) for name, value in model.state_dict().items())


def test_the_model_is_the_average_inside_and_itself_again_after_an_error():
    model = layers().to(memory_format=torch.channels_last)
    average = WeightAverage(model, EMA())
    mean = {name: value.clone() for name, value in average.state.items()}
    for parameter in model.parameters():
        parameter.data += 1
    raw = {name: value.clone() for name, value in model.state_dict().items()}

    def fail():
        with average.in_place() as trained:
            assert all(torch.equal(value, mean[name]) for name, value in model.state_dict().items())
            assert all(torch.equal(value, raw[name]) for name, value in trained.items())
            raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        fail()
    assert all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, mean[name]) for name, value in average.state.items())


def test_a_run_evaluates_and_saves_its_average(tiny_recipe, fresh_accelerate, tmp_path, monkeypatch):
    """Against a run without: the weights that train are the same, and their average is the recurrence of them."""
    seen: dict[str, list[torch.Tensor]] = {}
    run = ""

    class Spy:
        def run(self, encoder) -> dict[str, float]:
            seen.setdefault(run, []).append(encoder.model.visual.conv1.weight.detach().clone())
            return {"probe": 0.0}

    monkeypatch.setattr("pretrain.evaluator.load_evaluator", lambda config: Spy())
    trainers = {}
    for run, ema in (("plain", None), ("averaged", {"decay": 0.5})):
        keys = {"run": str(tmp_path / run), "ema": ema, "checkpoint": {"every": 4, "keep": 1}, "steps": 4}
        content = tiny_recipe(**keys, evaluate=[{"use": "a:B", "every": 1}])
        fresh_accelerate()
        trainers[run] = Trainer(PretrainRecipe.model_validate(content))
        trainers[run].train()
    expected = seen["plain"][0]
    for step, weight in enumerate(seen["plain"][1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(seen["averaged"][step + 1], expected, rtol=1e-5, atol=1e-6)
    (checkpoint,) = complete_checkpoints(tmp_path / "averaged/checkpoints")
    saved = load_encoder(checkpoint / "model")
    assert saved.fingerprint == trainers["averaged"].encoder.fingerprint
    assert torch.equal(saved.model.visual.conv1.weight, seen["averaged"][-1])
    trained = read_trained_weights(checkpoint)
    plain = trainers["plain"].model.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in trained.items())
    (checkpoint / "training/weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the weights behind the average cannot be read .* Remove step-0+4"):
        read_trained_weights(checkpoint)
