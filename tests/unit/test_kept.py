"""Tokens of a frozen tower that are kept in memory: each training picture's own, and none of a bad one."""

from __future__ import annotations

import pytest
import torch

from data.shards import Sample, ShardWriter
from finetune.recipe import FinetuneRecipe
from finetune.trainer import Finetuner
from pairstream.recipe import validate

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
BAD = (2, 5)


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_encoder, make_picture):
    """Eight pictures with captions, two of which cannot be decoded."""
    root = tmp_path_factory.mktemp("kept")
    with ShardWriter(root / "train") as writer:
        for number in range(8):
            content = b"no picture" if number in BAD else make_picture(number)
            writer.write(Sample(f"{number}", content, "jpg", [f"a picture of {number}"]))
    with ShardWriter(root / "val") as writer:
        for number in range(2):
            writer.write(Sample(f"{number}", make_picture(number), "jpg", [f"a picture of {number}"]))
    small_encoder(image_size=32, patch_size=16).save(root / "encoder")
    return root


def finetuner(world, run, **data) -> Finetuner:
    content = {
        "run": str(run),
        "model": {"name": str(world / "encoder")},
        "task": {"kind": "caption"},
        "data": {"train": str(world / "train"), "val": str(world / "val"), "max_faults": 0.5, **data},
        "language_model": {
            "kind": "config",
            "width": 16,
            "layers": 1,
            "heads": 2,
            "context": 48,
            "vocabulary": 300,
        },
        "batch_size": 4,
        "steps": 2,
        "schedule": {"warmup": 0},
        "decoding": {"max_new_tokens": 4},
    }
    return Finetuner(validate(FinetuneRecipe, content, "test"))


def test_a_picture_without_tokens_is_not_learnt_from(world, tmp_path, fresh_accelerate):
    trainer = finetuner(world, tmp_path / "kept", cache_image_tokens=True)
    assert trainer.kept is not None
    assert (trainer.kept.flatten(1).abs().amax(1) == 0).nonzero()[:, 0].tolist() == list(BAD)
    seen = [batch.indices for batch in trainer.stream.iterate(0, 4)]  # two epochs
    assert sorted(torch.cat(seen).tolist()) == sorted([n for n in range(8) if n not in BAD] * 2)
    assert trainer.stream.faults == {"undecodable_image": 4}
    metrics = trainer.train()
    fresh_accelerate()
    plain = finetuner(world, tmp_path / "pictures").train()
    assert metrics["samples_seen"] == plain["samples_seen"] == 6
