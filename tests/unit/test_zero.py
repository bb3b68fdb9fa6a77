"""What is taken of a DeepSpeed configuration, what is refused, and how parameters lie in groups."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import torch

import pretrain.zero
from pretrain.encoder import build_encoder
from pretrain.recipe import PretrainRecipe
from pretrain.terms import build_terms
from pretrain.wrapping import Replicas, make_wrapping
from pretrain.zero import BUCKET, Zero, split_by_step


@pytest.fixture
def wrap(tiny_recipe, tmp_path, monkeypatch):
    """`wrap(config=None, variables=None, processes=2, precision="no", **recipe_keys)`, as a launch with DeepSpeed."""

    def make(config=None, variables=None, processes=2, precision="no", **keys) -> Replicas:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        for name, value in (variables or {}).items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        if config is not None:
            (tmp_path / "deepspeed.json").write_text(json.dumps(config))
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
        monkeypatch.setattr(pretrain.zero, "find_spec", lambda name: True)
        monkeypatch.setattr(pretrain.zero, "compare_versions", lambda *_: False)
        recipe = PretrainRecipe.model_validate(tiny_recipe(**keys))
        encoder = build_encoder(recipe.model, device="cpu")
        accelerator: Any = types.SimpleNamespace(num_processes=processes, mixed_precision=precision)
        return make_wrapping(encoder, build_terms(recipe.terms, encoder), recipe, accelerator)

    return make


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"compile": True}, "does not go with compile"),
        ({"optim": {"kind": "muon", "lr": 1e-3}}, "does not go with optim.kind: muon"),
        ({"precision": "fp16"}, "does not go with precision: fp16"),
        (
            {"precision": "fp8", "optim": {"kind": "lion", "lr": 1e-3}},
            r"with precision: fp8, optim.kind: lion. .* train replicas \(launch without --use_deepspeed\)",
        ),
    ],
)
def test_recipes_that_deepspeed_does_not_go_with(wrap, keys, told):
    with pytest.raises(ValueError, match=told):
        wrap(**keys)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (
            {"DEEPSPEED_ZERO_STAGE": "0"},
            r"zero_optimization.stage: 0 \(1 or 2; that is replicas: launch without",
        ),
        (
            {"DEEPSPEED_ZERO_STAGE": "3"},
            r"zero_optimization.stage: 3 \(1 or 2; FSDP2 shards the same tensors",
        ),
        (
            {"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            r"zero_optimization.offload_optimizer \(shares stay on their devices, in float32\): leave it out",
        ),
        (
            {"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "GRADIENT_CLIPPING": "2"},
            r"offload_optimizer .*, gradient_clipping: 2.0 \(the recipe makes it 1.0\): leave",
        ),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, r"gradient_accumulation_steps: 4 \(the recipe makes it 1\)"),
    ],
)
def test_variables_of_a_launcher_that_are_refused(wrap, variables, told):
    with pytest.raises(ValueError, match=told):
        wrap(variables=variables)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"optimizer": {"type": "Adam"}}, r"optimizer \(the recipe says what trains and how\)"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler \(the recipe says"),
        ({"bf16": {"enabled": True}}, r"bf16 \(the recipe has it: precision\)"),
        (
            {"fp16": {"enabled": True}, "gradient_clipping": 0.5},
            r"fp16 \(.*, gradient_clipping: 0.5 \(the recipe",
        ),
        ({"train_batch_size": 64}, r"train_batch_size: 64 \(the recipe makes it 8\)"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            r"train_micro_batch_size_per_gpu: 8 \(the recipe makes it 4\)",
        ),
        ({"prescale_gradients": True}, r"prescale_gradients \(the recipe says"),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "zero_optimization.round_robin_gradients",
        ),
        ({"zero_optimization": {"stage": 1, "zero_quantized_gradients": True}}, "zero_quantized_gradients"),
    ],
)
def test_parts_of_a_configuration_file_that_are_refused(wrap, part, told):
    with pytest.raises(ValueError, match=told):
        wrap({"zero_optimization": {"stage": 2}, **part})


def test_what_says_the_same_as_the_recipe_is_taken_and_only_stage_and_buckets_are_passed_on(wrap):
    zero = {
        "stage": 1,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "offload_param": {"device": "none"},
    }
    same = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}
    found = wrap(
        {"zero_optimization": zero, **same, "bf16": {"enabled": "auto"}, "wall_clock_breakdown": True}
    )
    assert isinstance(found, Zero)
    assert found.config == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": BUCKET,
            "overlap_comm": True,
            "compute_grad_norm": False,
        },
    }


def test_what_a_plain_launch_says_is_taken_and_one_process_has_nothing_to_share(wrap):
    assert wrap().config["zero_optimization"]["stage"] == 2  # Accelerate's default
    assert type(wrap(processes=1)) is Replicas


def test_a_missing_deepspeed_is_named_with_its_install_line(wrap, monkeypatch):
    found = wrap()
    monkeypatch.setattr(pretrain.zero, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"0\.19\.8 or later. Install it with: pip install 'pairstream\[deepspeed\]'"
    ):
        make_wrapping(found.encoder, found.terms, found.recipe, found.accelerator)


def test_parameters_of_other_steps_lie_in_another_group():
    values = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    groups = [
        {"names": ["a", "b", "c"], "params": values[:3], "weight_decay": 0.1},
        {"names": ["d"], "params": values[3:], "weight_decay": 0.0},
    ]
    saved = {
        "a|step": torch.tensor(3.0),
        "b|exp_avg": torch.zeros(2),
        "c|step": torch.tensor(3.0),
        "d|step": torch.tensor(3.0),
    }
    found = split_by_step(groups, saved)
    assert [group["names"] for group in found] == [["a", "c"], ["b"], ["d"]]
    assert [group["weight_decay"] for group in found] == [0.1, 0.1, 0.0]
    assert found[0]["params"] == [values[0], values[2]]
    assert groups[0]["names"] == ["a", "b", "c"]
