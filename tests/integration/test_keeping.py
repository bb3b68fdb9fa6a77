"""Keeping what pretraining gave: interpolation (WiSE-FT), a pull to the start (L2-SP), attacks on embeddings (FGM)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from data.shards import Sample, ShardWriter
from finetune.recipe import FinetuneRecipe
from finetune.regularize import perturbed, pull_back
from finetune.trainer import Finetuner
from finetune.wise import Interpolation, wise
from pairstream.recipe import validate
from pretrain.encoder import load_encoder

MOODS = {"bad": "red", "good": "green"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_encoder, coloured) -> Path:
    """Posts whose words and pictures tell the mood; in `other` the words say the contrary."""
    root = tmp_path_factory.mktemp("keeping")
    for split, count in (("train", 32), ("val", 16), ("other", 16)):
        with ShardWriter(root / split) as writer:
            for number in range(count):
                mood = list(MOODS)[number % 2]
                said = mood if split != "other" else list(MOODS)[(number + 1) % 2]
                record = {"text": f"so {said}", "label": mood}
                writer.write(Sample(f"{number:03d}", coloured(MOODS[mood], number), "png", ["x"], record))
    small_encoder(width=16, context=8).save(root / "encoder")
    return root


def recipe(world: Path, run: Path, **changes) -> FinetuneRecipe:
    content = {
        "run": str(run),
        "model": {"name": str(world / "encoder")},
        "task": {"kind": "classify", "fusion": {"kind": "concat", "width": 16}, **changes.pop("task", {})},
        "data": {"train": str(world / "train"), "val": str(world / "val")},
        "freeze_image_tower": False,
        "batch_size": 16,
        "steps": 6,
        "tower_lr": 1.0,
        "optim": {"lr": 1e-2},
        "schedule": {"warmup": 1},
        "checkpoint": {"every": 3, "keep": 3},
        **changes,
    }
    return validate(FinetuneRecipe, content, "test")


def encoder_of(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08d}/model/encoder/open_clip_model.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name].double() - b[name].double()).pow(2).sum()) for name in a) ** 0.5


def test_the_curve_between_the_towers(world, tmp_path):
    Finetuner(recipe(world, tmp_path / "run", steps=20)).train()
    shifted = (str(world / "other"),)
    wise(
        model=tmp_path / "run",
        out=tmp_path / "out",
        alphas=(0, 0.5, 1),
        shifted=shifted,
        save=0.5,
        device="cpu",
    )
    found = json.loads((tmp_path / "out/wise.json").read_text())
    assert (found["metric"], [point["alpha"] for point in found["points"]]) == ("accuracy", [0, 0.5, 1])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["points"][-1]["target"] == metrics["accuracy"]
    assert found["points"][-1]["shifted"] < found["points"][-1]["target"]
    first, last = load_file(world / "encoder/open_clip_model.safetensors"), encoder_of(tmp_path / "run", 20)
    middle = load_file(tmp_path / "out/model/encoder/open_clip_model.safetensors")
    for name, value in middle.items():
        torch.testing.assert_close(value, (first[name] + last[name]) / 2, atol=1e-6, rtol=1e-5)
    assert "share of the fine-tuned weights" in (tmp_path / "out/report.html").read_text()
    with pytest.raises(ValueError, match=r"alpha 2\.0: expected a share"):
        wise(model=tmp_path / "run", out=tmp_path / "x", alphas=(2.0,))
    with pytest.raises(FileNotFoundError, match="expected the run folder"):
        wise(model=tmp_path, out=tmp_path / "x")


def test_ends_of_the_interpolation_are_exact_and_others_are_refused(world, small_encoder):
    ours, theirs = small_encoder(width=16, context=8), small_encoder(width=16, context=8)
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    towers = Interpolation(ours, theirs, "start")
    for alpha, wanted in ((0, theirs.model.state_dict()), (1, before)):
        towers.set(alpha)
        assert all(torch.equal(value, wanted[name]) for name, value in ours.model.state_dict().items())
    with pytest.raises(ValueError, match="start is another encoder"):
        Interpolation(ours, small_encoder(width=24, context=8), "start")
    with pytest.raises(ValueError, match="none of them was fine-tuned"):
        Interpolation(small_encoder(width=16, context=8), small_encoder(width=16, context=8), "start")


def test_the_pull_is_its_formula_and_resumes_exactly(world, tmp_path, dies_of_saving):
    weight, other = nn.Parameter(torch.tensor([3.0, -1.0])), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [weight, other], "names": ["w", "o"], "lr": 0.1}])
    weight.grad = torch.zeros(2)
    pull_back(optimizer, {"w": torch.tensor([1.0, 0.0]), "o": torch.zeros(2)}, 2.0)
    assert weight.tolist() == pytest.approx([2.6, -0.8])
    assert other.tolist() == [1.0, 1.0]  # no gradient: it was passed over
    start = load_file(world / "encoder/open_clip_model.safetensors")
    far = {}
    for name, strength in (("free", 0.0), ("held", 20.0)):
        Finetuner(recipe(world, tmp_path / name, l2_sp=strength)).train()
        far[name] = distance(encoder_of(tmp_path / name), start)
    assert 0 < far["held"] < 0.9 * far["free"]
    killed = recipe(world, tmp_path / "killed", l2_sp=20.0)
    with dies_of_saving():
        Finetuner(killed).train()
    Finetuner(killed, resume=True).train()
    straight, resumed = encoder_of(tmp_path / "held"), encoder_of(tmp_path / "killed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert load_encoder(tmp_path / "killed", device="cpu").embed_dim == 16


def test_attacks_go_along_the_gradient_and_come_back(world, tmp_path):
    table = nn.Parameter(torch.randn(5, 3))
    kept = table.detach().clone()
    (table.sin().sum() * 3).backward()
    assert table.grad is not None
    with perturbed(table, 0.7):
        moved = table.detach() - kept
        torch.testing.assert_close(moved, 0.7 * table.grad / table.grad.norm())
    assert torch.equal(table.detach(), kept)
    with pytest.raises(ValueError, match="they do not train"), perturbed(nn.Parameter(torch.ones(2, 2)), 1.0):
        pass
    seen = {}
    for name, size in (("plain", 0.0), ("attacked", 0.5)):
        metrics = Finetuner(recipe(world, tmp_path / name, adversarial=size)).train()
        seen[name] = (encoder_of(tmp_path / name), metrics["accuracy"])
    assert distance(seen["plain"][0], seen["attacked"][0]) > 0
    assert seen["attacked"][1] >= 0.5
    frozen = recipe(world, tmp_path / "frozen", adversarial=0.5, task={"freeze_text_tower": True})
    with pytest.raises(ValueError, match="they do not train"):
        Finetuner(frozen).train()


def test_towers_that_were_never_trained_together(world, tmp_path):
    """The classic baseline's encoder is made from the recipe, the same for the same seed."""
    tower = {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"kind": "transformer", "context_length": 8, "width": 16, "heads": 2, "layers": 1}
    towers = {"kind": "towers", "embed_dim": 16, "image_tower": tower, "text_tower": text}
    for name in ("a", "b"):
        Finetuner(
            recipe(world, tmp_path / name, model=towers, task={"freeze_text_tower": True}, steps=2)
        ).train()
    a, b = encoder_of(tmp_path / "a", 2), encoder_of(tmp_path / "b", 2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "vit + transformer" in (tmp_path / "a/report.html").read_text()
    with pytest.raises(ValueError, match=r"goes on from the task model that model\.name names"):
        recipe(world, tmp_path / "c", model=towers, language_model={"kind": "continued"})


def test_shifted_sets_are_measured_beside_the_target(world, tmp_path):
    """The words of `other` say the contrary, which a model that has learnt to read them falls for."""
    data = {"train": str(world / "train"), "val": str(world / "val"), "shifted": [str(world / "other")]}
    metrics = Finetuner(recipe(world, tmp_path / "run", data=data)).train()
    [(name, found)] = metrics["shifted"].items()
    assert (name, found["images"], metrics["images"]) == (str(world / "other"), 16, 16)
    assert found["text_only"] < metrics["text_only"]
    assert "shifted ones beside it" in (tmp_path / "run/report.html").read_text()
    missing = data | {"shifted": [str(world / "none")]}
    with pytest.raises(ValueError, match="none"):
        Finetuner(recipe(world, tmp_path / "other", data=missing))
