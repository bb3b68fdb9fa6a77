"""Every loss on 2, 3 and 4 processes is the loss of one: the parameters after one step of DDP are compared.

A loss value says little: with the wrong gradients of a gather it looks right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.dist
WORKER = Path(__file__).with_name("loss_worker.py")
WORLDS = (2, 3, 4)
OURS = [
    *(
        f"{loss} {way} {tile}"
        for loss in ("info_nce", "sigmoid")
        for way in ("gather", "ring")
        for tile in (None, 3)
    ),
    *("smoothing", "positives", "distillation", "hard", "global", "critic", "views", "captions"),
]
START = {"t": 2.0, "bias": -3.0}


@pytest.fixture(scope="module")
def left(tmp_path_factory) -> Path:
    """What the worker left: one import of torch for ten processes."""
    folder = tmp_path_factory.mktemp("loss_ranks")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(WORKER), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def steps(left) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    """World size to case to what it ended with."""
    found: dict[int, dict] = {}
    for world in (1, *WORLDS):
        cases = found.setdefault(world, {})
        for key, value in load_file(left / f"world-{world}.safetensors").items():
            case, name = key.split("|")
            cases.setdefault(case, {})[name] = value
    return found


@pytest.fixture(scope="module")
def start() -> dict[str, torch.Tensor]:
    """The parameters before the step, as the worker makes them."""
    torch.manual_seed(0)
    towers = [torch.nn.Linear(5, 6, bias=False, dtype=torch.float64).weight.detach() for _ in range(2)]
    numbers = {name: torch.tensor([value], dtype=torch.float64) for name, value in START.items()}
    return {"image.weight": towers[0].reshape(-1), "text.weight": towers[1].reshape(-1), **numbers}


def agree(came: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert came.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(came[name], expected[name], rtol=1e-10, atol=1e-12), (name, came, expected)


@pytest.mark.parametrize("split", ["even", "uneven"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", OURS)
def test_a_step_on_several_processes_is_the_step_of_one(steps, start, case, world, split):
    expected = steps[1][f"{case} {split}"]
    agree(steps[world][f"{case} {split}"], expected)
    moved = {name for name in start if float((expected[name] - start[name]).norm()) > 1e-4}
    assert moved == ({*start} if case.startswith("sigmoid") else {*start} - {"bias"})


@pytest.mark.parity
@pytest.mark.parametrize("world", [1, *WORLDS])
def test_open_clips_losses_with_exact_gradients_are_ours(steps, world):
    for theirs in ("gathered", "local gathered"):
        agree(steps[world][f"open_clip {theirs}"], steps[1]["info_nce ring 3 even"])
    for theirs in ("bidir", "shift", "reduce", "gather"):
        agree(steps[world][f"open_clip siglip {theirs}"], steps[1]["sigmoid ring 3 even"])


def gradients(steps, start, world: int, case: str) -> dict[str, torch.Tensor]:
    return {name: start[name] - steps[world][case][name] for name in start}


@pytest.mark.parity
@pytest.mark.parametrize("world", WORLDS)
def test_open_clips_default_shrinks_the_towers_gradient_by_the_world_size(steps, start, world):
    """What users of its default flags train with: towers 1 / W of the gradient, temperature all of it."""
    truth = gradients(steps, start, world, "info_nce gather None even")
    came = gradients(steps, start, world, "open_clip default")
    for name in ("image.weight", "text.weight"):
        torch.testing.assert_close(came[name], truth[name] / world, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(came["t"], truth["t"], rtol=1e-9, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("world", WORLDS)
def test_open_clips_local_loss_alone_has_another_direction(steps, start, world):
    truth = gradients(steps, start, world, "info_nce gather None even")
    came = gradients(steps, start, world, "open_clip local")
    for name in ("image.weight", "text.weight"):
        cosine = torch.cosine_similarity(came[name], truth[name], dim=0)
        assert float(cosine) < 0.99
        assert float(came[name].norm() / truth[name].norm()) < 0.9
    value = steps[world]["open_clip local"]["loss"]
    torch.testing.assert_close(value, steps[1]["info_nce gather None even"]["loss"])  # nobody notices


@pytest.mark.parametrize("world", WORLDS)
def test_a_ring_sees_each_block_once_and_its_memory_does_not_grow(left, world):
    told = json.loads((left / f"counts-{world}.json").read_text())
    for loss, tours in (("info_nce", 2), ("sigmoid", 1)):
        ring = told[f"{loss} ring"]
        assert ring["visits"] == [[0] + [None] * (world - 1)] * tours
        assert ring["different"] == [world] * tours  # no rank's texts twice
        # World - 1 exchanges of texts and world of what they gather, in each tour.
        assert len(ring["sent"]) == tours * (2 * world - 1)
        assert ring["largest"] == 4 * 8 * 4  # one rank's features
        assert told[f"{loss} gather"]["largest"] == world * 4 * 8 * 4
    assert "at least one pair on each rank, got [0, 1" in told["refused"]
