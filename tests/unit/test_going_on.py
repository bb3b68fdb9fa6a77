"""Models that go on from a task model: what is new of them follows from the seed."""

from __future__ import annotations

import pytest
import torch

from finetune.recipe import FinetuneRecipe
from finetune.recipe_model import Mlp
from finetune.recipe_task import CaptionTask
from finetune.trainer import Finetuner
from pairstream.recipe import validate

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_new_adapters_follow_from_the_seed(make_writer, tiny_shards, tmp_path, fresh_accelerate):
    make_writer(Mlp(), CaptionTask()).save(tmp_path / "before")
    found = []
    for number, seed in enumerate((0, 0, 1)):
        fresh_accelerate()
        content = {
            "run": str(tmp_path / f"run-{number}"),
            "model": {"name": str(tmp_path / "before")},
            "task": {"kind": "caption"},
            "data": {"train": str(tiny_shards), "val": str(tiny_shards)},
            "language_model": {"kind": "continued"},
            "lora": {"rank": 2},
            "tower_lora": {"rank": 2},
            "freeze_image_tower": False,
            "batch_size": 8,
            "steps": 2,
            "schedule": {"warmup": 0},
            "seed": seed,
        }
        torch.manual_seed(100 + number)  # whatever was drawn before
        model = Finetuner(validate(FinetuneRecipe, content, "test")).model
        found.append({name: value for name, value in model.named_parameters() if value.requires_grad})
    drawn = [name for name in found[0] if name.endswith(("lora_A.default.weight", ".down"))]
    assert any("image_tower" in name for name in drawn)
    assert any("language_model" in name for name in drawn)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(torch.equal(found[0][name], found[2][name]) for name in drawn)
