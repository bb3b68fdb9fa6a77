"""Which wrapping a launcher gets, and what does not go with FSDP2."""

from __future__ import annotations

import types
from typing import Any

import pytest
from accelerate import FullyShardedDataParallelPlugin

from pretrain.encoder import build_encoder
from pretrain.recipe import PretrainRecipe
from pretrain.terms import build_terms
from pretrain.wrapping import Replicas, Shards, make_wrapping


@pytest.fixture
def wrap(tiny_recipe, monkeypatch):
    """`wrap(**recipe_keys, processes=2, kind="FSDP", precision="no", plugin=None)`, as a launch with FSDP2 would."""

    def make(processes=2, kind="FSDP", precision="no", plugin=None, **keys) -> Replicas:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        recipe = PretrainRecipe.model_validate(tiny_recipe(**keys))
        encoder = build_encoder(recipe.model, device="cpu")
        accelerator: Any = types.SimpleNamespace(
            num_processes=processes,
            distributed_type=types.SimpleNamespace(value=kind),
            mixed_precision=precision,
            state=types.SimpleNamespace(fsdp_plugin=plugin),
        )
        return make_wrapping(encoder, build_terms(recipe.terms, encoder), recipe, accelerator)

    return make


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"compile": True}, "FSDP2 here does not go with compile: they need whole weights at each step"),
        ({"lora": {"rank": 2}}, "does not go with lora: they need whole"),
        ({"ema": {"decay": 0.9}}, "does not go with ema: they need whole"),
        ({"optim": {"kind": "muon", "lr": 1e-3}}, "does not go with optim.kind: muon: they need whole"),
        ({"precision": "fp16"}, "does not go with precision: fp16: they need whole"),
        ({"precision": "fp8"}, "does not go with precision: fp8: they need whole"),
        (
            {"compile": True, "lora": {"rank": 2}},
            r"does not go with lora, compile: .* train replicas \(launch without --use_fsdp\)",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["FSDP", "MULTI_CPU"])
def test_recipes_that_shards_do_not_go_with(wrap, keys, told, kind):
    """On GPUs, where Accelerate says FSDP, and on CPUs, where it says nothing of it."""
    with pytest.raises(ValueError, match=told):
        wrap(kind=kind, **{"precision": "no", **keys})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"cpu_offload": True},
            r"does not take --fsdp_offload_params \(shards stay on their devices\): leave",
        ),
        (
            {"activation_checkpointing": True},
            r"does not take --fsdp_activation_checkpointing \(the recipe has it: checkpoint_activations: true\)",
        ),
        (
            {"cpu_ram_efficient_loading": True},
            r"does not take --fsdp_cpu_ram_efficient_loading \(every rank makes or reads the first weights\)",
        ),
        (
            {"cpu_offload": True, "activation_checkpointing": True},
            "does not take --fsdp_offload_params .*, --fsdp_activation_checkpointing ",
        ),
        ({"fsdp_version": 1}, r"launch with --fsdp_version 2 \(FSDP_VERSION=2\)"),
    ],
)
def test_settings_of_a_launcher_that_are_refused(wrap, options, told):
    options = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, **options}
    with pytest.raises(ValueError, match=told):
        wrap(plugin=FullyShardedDataParallelPlugin(**options))


def test_what_goes_gets_shards_and_one_process_on_a_cpu_gets_the_whole(wrap):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    assert isinstance(wrap(plugin=plugin), Shards)
    assert isinstance(wrap(kind="MULTI_CPU"), Shards)
    assert not isinstance(wrap(kind="NO", processes=1), Shards)
