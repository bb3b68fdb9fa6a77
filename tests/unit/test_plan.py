"""What a run will take: counted FLOPs and activations, and what follows from them."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from pairstream.cli import run_stage
from pretrain.cli import main
from pretrain.encoder import build_encoder
from pretrain.flops import count_flops, loss_flops
from pretrain.plan import KINDS, describe, expect, make_plan, read_fleet
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import TowersModel
from pretrain.trainer import DualEncoder, Trainer


def network_of(model: dict) -> DualEncoder:
    return DualEncoder(build_encoder(TowersModel.model_validate(model), device="cpu"))


def transformer_flops(tokens: int, width: int, layers: int) -> int:
    """Two for each multiply-add: query, key, value and output, scores and their sum, and an MLP four times as wide."""
    return layers * (2 * tokens * 4 * width**2 + 2 * 2 * tokens**2 * width + 2 * tokens * 8 * width**2)


def test_the_forward_pass_of_a_vit_by_hand(tiny_models):
    """4 patches of 16 px and a class token; 8 text tokens; width 16, 2 layers, 16 dimensions."""
    count = count_flops(network_of(tiny_models["vit"]), (32, 32), 8)
    image = 2 * 4 * (3 * 16 * 16) * 16 + transformer_flops(5, 16, 2) + 2 * 16 * 16
    text = transformer_flops(8, 16, 2) + 2 * 16 * 16
    assert count.forward == image + text


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_counting_by_shapes_is_counting_for_real(tiny_models, kind):
    """And leaves the network as it was: weights, statistics, modes, gradients."""
    network = network_of(tiny_models[kind]).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count = count_flops(network, (32, 32), 8)
    assert count == count_flops(network, (32, 32), 8, by_shapes=False)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(layer.training for layer in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        features = network(torch.zeros(6, 3, 32, 32, dtype=torch.uint8), torch.ones(6, 8, dtype=torch.int64))
        torch.stack([feature.sum() for feature in features]).sum().backward()
    assert count.step == counter.get_total_flops() / 6


def test_activations_are_what_memory_keeps(tiny_models):
    """Six more pairs keep six times the counted bytes more."""
    network = network_of(tiny_models["vit"])
    count = count_flops(network, (32, 32), 8)
    assert count.activations > 0
    kept = []
    for rows in (2, 8):
        sizes = {}

        def keep(value, sizes=sizes):
            sizes[value.untyped_storage()._cdata] = value
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            out = network(
                torch.zeros(rows, 3, 32, 32, dtype=torch.uint8), torch.ones(rows, 8, dtype=torch.int64)
            )
        kept.append(sum(value.untyped_storage().nbytes() for value in sizes.values()))
        del out
    assert (kept[1] - kept[0]) / 6 == pytest.approx(count.activations)


def test_texts_of_bert_and_several_captions(tiny_models, tiny_bert):
    bert = {"kind": "transformers", "name": str(tiny_bert), "context_length": 8}
    network = network_of({**tiny_models["vit"], "text_tower": bert})
    one, three = (count_flops(network, (32, 32), 8, captions) for captions in (1, 3))
    image = 2 * 4 * (3 * 16 * 16) * 16 + transformer_flops(5, 16, 2) + 2 * 16 * 16
    assert three.forward - image == pytest.approx(3 * (one.forward - image))


def test_a_locked_tower_costs_less_to_train(tiny_recipe):
    free = make_plan(PretrainRecipe.model_validate(tiny_recipe()))
    phases = [{"image_groups": 0, "text_groups": 0}, {"step": 3}]
    locked = make_plan(PretrainRecipe.model_validate(tiny_recipe(phases=phases)))
    first, second = locked.phases
    assert (first.steps, second.steps) == (3, 3)
    assert first.trainable == 2 * 16 * 16 + 1
    assert first.count.step < 0.5 * second.count.step
    assert second == free.phases[0].__class__(3, free.phases[0].trainable, free.phases[0].count)
    assert locked.step_flops == pytest.approx((first.count.step + second.count.step) / 2 + loss_flops(8, 16))


def test_time_cost_and_memory_follow_from_the_counts(tiny_recipe):
    plan = make_plan(PretrainRecipe.model_validate(tiny_recipe(precision="fp32", micro_batch=2)))
    (phase,) = plan.phases
    assert plan.step_flops == phase.count.step + phase.count.forward + loss_flops(8, 16)
    numbers = expect(plan, read_fleet("2xa100-80gb@1.5"), mfu=0.5)
    seconds = 6 * 8 * plan.step_flops / (2 * 312e12 * 0.5)
    assert numbers["hours"] == pytest.approx(seconds / 3600)
    assert numbers["dollars"] == pytest.approx(seconds / 3600 * 2 * 1.5)
    assert plan.memory(2) == {
        "weights": 4 * plan.parameters,
        "gradients": 8 * plan.parameters,
        "optimiser": 8 * plan.parameters,
        "activations": 2 * phase.count.activations,
        "batch": 4 * 3 * 32 * 32 + 8 * 16 * 4 * 2 * 2,
    }
    assert plan.memory(1)["gradients"] == 4 * plan.parameters


def test_what_stands_in_the_way_is_told(tiny_recipe):
    plan = make_plan(PretrainRecipe.model_validate(tiny_recipe()))
    said = describe(plan, [read_fleet("3xl4"), read_fleet("2xl4")], 0.3)
    assert said.count("batch_size 8 cannot be split over 3") == 1
    big = PretrainRecipe.model_validate(tiny_recipe(batch_size=80_000_000))
    assert "more than 24 GB: set micro_batch, or take more devices" in describe(
        make_plan(big), [read_fleet("2xl4")], 0.3
    )


def test_fleets():
    assert read_fleet("h100").devices == 1
    assert read_fleet("8xmi300x").kind == KINDS["mi300x"]
    assert read_fleet("8xh100@2").kind.hourly == 2
    for word in ("8xh10", "0xh100", "h100@cheap", "h100@-1"):
        with pytest.raises(ValueError, match=r"--devices .*: expected COUNTxKIND or COUNTxKIND@PRICE"):
            read_fleet(word)
    with pytest.raises(ValueError, match="did you mean 'h100'"):
        read_fleet("8xh10")


def test_the_command(tiny_recipe, tmp_path, capsys):
    """It reads no data and leaves no run folder."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_recipe(data={"train": "nowhere/at/all"})))
    words = [
        "plan",
        str(tmp_path / "mine.yaml"),
        "--steps",
        "10",
        "--devices",
        "8xh100",
        "64xl4@0.5",
        "--mfu",
        "0.4",
    ]
    assert run_stage(main, words) == 0
    said = capsys.readouterr().out
    assert "10 steps of 8 pairs, 80 pairs" in said
    assert "8xh100 " in said
    assert "64xl4@0.5 " in said
    assert not (tmp_path / "run").exists()
    assert run_stage(main, ["plan", "--help"]) == 0
    assert "kinds of devices: l4 (121 TFLOP/s" in capsys.readouterr().out
    for wrong, told in (
        (["plan"], "which recipe?"),
        (["plan", "absent"], "no recipe 'absent'"),
        (["plan", str(tmp_path / "mine.yaml"), "--mfu", "35"], "--mfu: expected a share of the peak"),
        (["plan", str(tmp_path / "mine.yaml"), "--mfu", "much"], "--mfu: expected a share of the peak"),
    ):
        assert run_stage(main, wrong) == 2
        assert told in capsys.readouterr().err


def test_the_log_has_flops_and_each_towers_gradient_norm(
    tiny_recipe, tmp_path, fresh_accelerate, monkeypatch
):
    """A tower of which nothing trains has no norm; the norms make up the whole one, but for logit_scale's part."""
    monkeypatch.setattr("pretrain.meter.peak_flops", lambda device: 1e12)
    recipe = PretrainRecipe.model_validate(tiny_recipe(steps=3))
    trainer = Trainer(recipe)
    trainer.train()
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    plan = make_plan(recipe)
    for line in log:
        towers = line["grad_norm_image_tower"] ** 2 + line["grad_norm_text_tower"] ** 2
        assert 0.5 * line["grad_norm"] ** 2 < towers <= line["grad_norm"] ** 2 * 1.00001
        assert line["flops_per_pair"] == plan.step_flops
        assert line["tflops_per_s"] == pytest.approx(line["samples_per_s"] * plan.step_flops / 1e12)
        assert line["mfu"] == pytest.approx(line["tflops_per_s"])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["parameters"], metrics["pairs"]) == (plan.parameters, 40)
