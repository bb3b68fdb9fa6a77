"""Shards of any sizes over ranks: no collective waits for ever, and an epoch has every key once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.shards import Sample, ShardWriter

pytestmark = pytest.mark.dist
SIZES = (1, 17, 3, 29, 2, 11)  # 63 samples: no multiple of any global batch below


@pytest.mark.parametrize(
    ("world", "batch_size", "workers"),
    [
        (2, 32, 2),
        (3, 7, 0),
        pytest.param(2, 5, 0, marks=pytest.mark.slow),
        pytest.param(3, 4, 2, marks=pytest.mark.slow),
    ],
)
def test_every_rank_has_as_many_batches_and_every_key_comes_once(
    tmp_path, make_picture, run_ranks, world, batch_size, workers
):
    (tmp_path / "shards").mkdir()
    keys = []
    for shard, size in enumerate(SIZES):
        with ShardWriter(tmp_path / "made") as writer:
            for number in range(size):
                keys.append(f"{shard}_{number:02d}")
                writer.write(Sample(keys[-1], make_picture(number), "jpg", ["a text"]))
        (tmp_path / "made/00000.tar").rename(tmp_path / "shards" / f"{shard:05d}.tar")
        for left in (tmp_path / "made").iterdir():
            left.unlink()
        (tmp_path / "made").rmdir()
    (tmp_path / "job.json").write_text(json.dumps({"batch_size": batch_size, "workers": workers}))
    run_ranks(Path(__file__).with_name("uneven_shards_worker.py"), tmp_path, world)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(world)]
    for epoch in range(2):
        batches = [rank[epoch] for rank in ranks]
        assert {len(own) for own in batches} == {-(-len(keys) // (batch_size * world))}
        assert sorted(key for own in batches for batch in own for key in batch["keys"]) == sorted(keys)
        for together in zip(*batches, strict=True):
            assert len({batch["step"] for batch in together}) == 1
            assert {batch["global"] for batch in together} == {sum(len(batch["keys"]) for batch in together)}
