"""Schedule-free AdamW: its three sequences, and what a run makes of them."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pretrain.checkpoint import complete_checkpoints, read_trained_weights
from pretrain.encoder import load_encoder
from pretrain.recipe import PretrainRecipe
from pretrain.schedule_free import ScheduleFreeAdamW, average_of
from pretrain.trainer import Trainer


def test_its_sequences_are_those_of_the_paper():
    """x, y and z written out, as the paper has them; the rate rises over a warm-up."""
    torch.manual_seed(0)
    beta, beta2, eps, decay = 0.8, 0.95, 1e-3, 0.1
    parameter = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    optimizer = ScheduleFreeAdamW([parameter], betas=(beta, beta2), eps=eps, weight_decay=decay)
    x, z, y = (parameter.detach().clone() for _ in range(3))
    second, rates = torch.zeros_like(z), 0.0
    for step in range(1, 8):
        lr = 0.1 * min(step / 3, 1)
        optimizer.param_groups[0]["lr"] = lr
        gradient = torch.randn_like(z)
        parameter.grad = gradient.clone()
        optimizer.step()
        second = beta2 * second + (1 - beta2) * gradient**2
        direction = gradient / ((second / (1 - beta2**step)).sqrt() + eps)
        z = z - lr * (direction + decay * y)
        rates += lr**2
        share = lr**2 / rates
        x = (1 - share) * x + share * z
        y = (1 - beta) * z + beta * x
        torch.testing.assert_close(parameter.detach(), y, rtol=1e-12, atol=1e-12)
        point = optimizer.state[parameter]["z"]
        torch.testing.assert_close(average_of(parameter.detach(), point, beta), x, rtol=1e-12, atol=1e-12)


@pytest.fixture
def train(tiny_recipe, fresh_accelerate):
    def run(folder, *, resume=False, **keys) -> Trainer:
        fresh_accelerate()
        optim = {"kind": "schedule_free", "lr": 3e-3, "weight_decay": 0.1}
        schedule = {"kind": "wsd", "warmup": 2, "decay": 0}
        content = tiny_recipe(run=str(folder), optim=optim, schedule=schedule, **keys)
        trainer = Trainer(PretrainRecipe.model_validate(content), resume=resume)
        trainer.train()
        return trainer

    return run


def test_a_run_saves_and_evaluates_the_average_and_trains_on_as_if_it_had_not(train, tmp_path, monkeypatch):
    seen: list[torch.Tensor] = []

    class Spy:
        def run(self, encoder) -> dict[str, float]:
            seen.append(encoder.model.visual.conv1.weight.detach().clone())
            return {"probe": 0.0}

    monkeypatch.setattr("pretrain.evaluator.load_evaluator", lambda config: Spy())
    often = train(
        tmp_path / "often", evaluate=[{"use": "a:B", "every": 1}], checkpoint={"every": 1, "keep": 9}
    )
    last = seen[-1]
    seldom = train(tmp_path / "seldom", checkpoint={"every": 6, "keep": 1})
    newest = complete_checkpoints(tmp_path / "often/checkpoints")[0]
    saved = load_encoder(newest / "model")
    assert torch.equal(saved.model.visual.conv1.weight, last)
    assert saved.fingerprint == often.encoder.fingerprint == seldom.encoder.fingerprint
    trained = read_trained_weights(newest)
    point = load_file(newest / "training/optimizer.safetensors")["model.visual.conv1.weight|z"]
    weight = trained["visual.conv1.weight"]
    torch.testing.assert_close(weight, 0.1 * point + 0.9 * last)
    assert not torch.allclose(weight, last, rtol=1e-3)


def test_it_goes_on_bit_for_bit(train, tmp_path):
    whole = train(tmp_path / "whole", checkpoint={"every": 2, "keep": 4})
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000006")
    resumed = train(tmp_path / "cut", resume=True, checkpoint={"every": 2, "keep": 4})
    for name in ("training/optimizer.safetensors", "training/weights.safetensors"):
        one, other = (load_file(run.model_folder.parent / name) for run in (whole, resumed))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert whole.encoder.fingerprint == resumed.encoder.fingerprint


def test_the_scale_of_the_logits_stays_below_its_bound_in_the_average_too(train, tmp_path):
    trainer = train(tmp_path / "run", max_logit_scale=1.05)
    assert float(trainer.model.logit_scale.detach().exp()) <= 1.05 + 1e-6
    z = trainer.optimizer.state[trainer.wrap.model.logit_scale]["z"]
    assert float(z.exp()) <= 1.05 + 1e-6


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"schedule": {"warmup": 2}}, "wants a rate that stays: .*decay: 0.*got cosine"),
        ({"schedule": {"kind": "wsd", "warmup": 1, "decay": 2}}, "got wsd with a decay"),
        ({"optim": {"kind": "schedule_free", "betas": [0.0, 0.9]}}, "the first above 0"),
        ({"ema": {}}, "leave out ema, lora and all phases but the first"),
        ({"lora": {}}, "leave out ema, lora and all phases but the first"),
        ({"phases": [{"step": 0}, {"step": 2}]}, "leave out ema, lora and all phases but the first"),
    ],
)
def test_what_it_does_not_go_with(tiny_recipe, keys, words):
    schedule = {"kind": "wsd", "warmup": 2, "decay": 0}
    content = tiny_recipe(**{"optim": {"kind": "schedule_free"}, "schedule": schedule, **keys})
    with pytest.raises(ValueError, match=words):
        PretrainRecipe.model_validate(content)
