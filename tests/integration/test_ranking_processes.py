"""Several processes that share the blocks of a ranking get, each of them, what one process gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrieval.metrics import retrieval_ranks

pytestmark = pytest.mark.dist


def test_three_processes_are_one(tmp_path, run_ranks):
    rng = np.random.default_rng(0)
    owner = np.arange(150).repeat(3)
    image = rng.standard_normal((150, 24)).astype(np.float32)
    text = (image[owner] + rng.standard_normal((450, 24))).astype(np.float32)
    text[::4] = text[0]  # ties must be shared, too
    np.savez(tmp_path / "rows.npz", image=image, text=text, owner=owner)
    run_ranks(Path(__file__).with_name("ranking_worker.py"), tmp_path, 3)
    expected = retrieval_ranks(image, text, owner, block=1000)
    assert int((expected[0].level > 0).sum()) > 0
    for rank in range(3):
        found = np.load(tmp_path / f"rank{rank}.npz")
        for number, ranking in enumerate(expected):
            for name in ("query", "above", "level", "right"):
                assert np.array_equal(found[f"{number}_{name}"], getattr(ranking, name).numpy()), name
