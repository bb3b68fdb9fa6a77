"""LoRA and DoRA in a task model's image tower: only they train, they come back from disk, and runs go on exactly."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from finetune.fusion.saved import load_classifier
from finetune.model import load_task_model
from finetune.recipe import FinetuneRecipe
from finetune.recipe_model import TowerLora
from finetune.tower_adapters import FILE, adapt_image_tower
from finetune.trainer import Finetuner
from pairstream.recipe import validate
from pretrain.encoder import load_encoder

SMALL = {"kind": "config", "width": 32, "layers": 1, "heads": 2, "context": 64, "vocabulary": 300}
TASKS = {
    "caption": {"kind": "caption"},
    "match": {"kind": "match", "fusion": {"kind": "concat", "width": 16}, "freeze_text_tower": True},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, small_encoder) -> Path:
    return small_encoder(image_size=32, patch_size=16, context=16).save(
        tmp_path_factory.mktemp("adapted") / "encoder"
    )


def recipe(encoder: Path, shards: Path, run: Path, **changes) -> FinetuneRecipe:
    content = {
        "run": str(run),
        "model": {"name": str(encoder)},
        "task": TASKS["caption"],
        "data": {"train": str(shards), "val": str(shards)},
        "language_model": SMALL,
        "freeze_image_tower": False,
        "tower_lora": {"rank": 2, "alpha": 8},
        "tower_lr": 1.0,
        "batch_size": 8,
        "steps": 20,
        "optim": {"lr": 1e-2},
        "schedule": {"warmup": 2},
        "decoding": {"max_new_tokens": 8},
        "evaluate": {"pictures": 8},
        "checkpoint": {"every": 10, "keep": 2},
        **changes,
    }
    return validate(FinetuneRecipe, content, "test")


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints/step-00000020"
    return {
        f"{file.relative_to(folder)}|{name}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_twenty_steps_are_ten_and_ten_and_the_model_comes_back(
    encoder, tiny_shards, tmp_path, dies_of_saving, task, dora
):
    changes = {"task": TASKS[task], "tower_lora": {"rank": 2, "alpha": 8, "dora": dora}}
    straight = recipe(encoder, tiny_shards, tmp_path / "straight", **changes)
    trainer = Finetuner(straight)
    prefix = trainer.family.towers
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    inside = {name for name in trained if name.startswith(prefix)}
    assert inside
    assert all(".parametrizations." in name and ".0." in name for name in inside)
    assert len(inside) == 4 * (3 if dora else 2)  # attention in and out, and two of the feed-forward layer
    trainer.train()

    halves = straight.model_copy(update={"run": str(tmp_path / "halves")})
    with dies_of_saving():
        Finetuner(halves).train()
    Finetuner(halves, resume=True).train()
    once, twice = tensors(tmp_path / "straight"), tensors(tmp_path / "halves")
    assert set(once) == set(twice)
    assert all(torch.equal(value, twice[name]) for name, value in once.items())

    model = tmp_path / "straight/checkpoints/step-00000020/model"
    before, after = (load_file(path / "open_clip_model.safetensors") for path in (encoder, model / "encoder"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("visual.") and is_matrix(name)}
    moved = model.rename(tmp_path / "moved")  # the folder alone is enough, with stock open_clip too
    stock = open_clip.create_model(f"local-dir:{moved / 'encoder'}")
    ours = load_encoder(moved / "encoder", device="cpu").model
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in stock.state_dict().items())
    if task == "caption":
        opened = load_task_model(moved, device="cpu")
        picture = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(
                opened.image_tokens(picture), trainer.model.image_tokens(picture), atol=1e-5, rtol=1e-4
            )
    else:
        assert load_classifier(moved, device="cpu").encoder.fingerprint == trainer.model.encoder.fingerprint


def is_matrix(name: str) -> bool:
    return name.endswith(("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight"))


def test_adapters_that_do_not_fit_are_refused(encoder, tiny_shards, tmp_path):
    with pytest.raises(ValueError, match=r"tower_lora\.rank trains adapters .* freeze_image_tower: false"):
        recipe(encoder, tiny_shards, tmp_path, freeze_image_tower=True)
    Finetuner(recipe(encoder, tiny_shards, tmp_path / "run", steps=3, schedule={"warmup": 1})).train()
    folder = tmp_path / "run/checkpoints/step-00000003/model"
    assert (folder / FILE).is_file()
    with pytest.raises(ValueError, match=r"other adapters than tower_lora .*'rank': 3.* keeps its own"):
        adapt_image_tower(load_encoder(folder / "encoder", device="cpu"), TowerLora(rank=3), folder)


def test_a_dora_weight_is_its_formula(small_encoder):
    encoder = small_encoder()
    adapt_image_tower(encoder, TowerLora(rank=2, alpha=6.0, dora=True))
    layer = encoder.model.visual.transformer.resblocks[0].mlp.c_fc
    before = layer.parametrizations.weight.original
    torch.testing.assert_close(layer.weight, before)  # nothing is changed at first
    adapter = layer.parametrizations.weight[0]
    with torch.no_grad():
        adapter.up.normal_()
        adapter.length.mul_(2.0)
    direction = before + 3.0 * adapter.up @ adapter.down
    expected = 2 * before.norm(dim=1, keepdim=True) * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight, expected)
