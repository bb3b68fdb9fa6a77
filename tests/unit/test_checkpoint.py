"""Checkpoints: what stays, and an optimiser's state by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from pretrain.checkpoint import (
    as_os_error,
    clear_leftovers,
    complete_checkpoints,
    load_optimizer_state,
    optimizer_state,
    read_training_state,
    save_checkpoint,
)
from pretrain.optim import build_optimizer
from pretrain.recipe_optim import AdamW


def made(seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    return network, build_optimizer(network.named_parameters(), AdamW())


def step(network: nn.Module, optimizer: torch.optim.AdamW) -> None:
    network(torch.ones(1, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: Path, number: int, optimizer: torch.optim.AdamW, keep: int = 2) -> Path:
    return save_checkpoint(
        folder,
        number,
        write_model=lambda where: (where / "weights").write_text("w"),  # pyright: ignore
        optimizer=optimizer,
        state={"seen": 3},
        keep=keep,
    )


def test_the_newest_stay_and_half_written_ones_are_never_found(tmp_path):
    _, optimizer = made()
    for number in (5, 10, 100):
        save(tmp_path, number, optimizer)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000100", "step-00000010"]
    (tmp_path / "step-00000200").mkdir()  # no state: not one of ours, or not whole
    (tmp_path / ".tmp-step-00000300-1").mkdir()
    assert len(complete_checkpoints(tmp_path)) == 2
    clear_leftovers(tmp_path)
    assert not (tmp_path / ".tmp-step-00000300-1").exists()
    assert complete_checkpoints(tmp_path / "absent") == []


def test_an_optimizer_goes_on_bit_for_bit(tmp_path):
    network, optimizer = made()
    step(network, optimizer)
    folder = save(tmp_path, 1, optimizer)
    state, tensors = read_training_state(folder)
    assert state == {"step": 1, "seen": 3}
    other, resumed = made(seed=1)
    other.load_state_dict(network.state_dict())
    assert load_optimizer_state(resumed, tensors) == 2
    for _ in range(3):
        step(network, optimizer)
        step(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    moment = resumed.state[next(other.parameters())]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)


def test_a_parameter_that_had_no_state_starts_afresh():
    network, optimizer = made()
    step(network, optimizer)
    tensors = {key: value for key, value in optimizer_state(optimizer).items() if key.startswith("bias|")}
    _, resumed = made()
    assert load_optimizer_state(resumed, tensors) == 1
    assert len(resumed.state) == 1


def test_a_damaged_state_says_what_to_do(tmp_path):
    _, optimizer = made()
    folder = save(tmp_path, 1, optimizer)
    (folder / "training" / "state.json").write_text(json.dumps({"step": 1})[:4])
    with pytest.raises(
        ValueError, match=r"training state is damaged .*Remove this folder to resume from the one"
    ):
        read_training_state(folder)


def test_the_systems_number_is_read_from_safetensors():
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert as_os_error(SafetensorError(said), Path("x")).errno == 28
    assert as_os_error(SafetensorError("something else"), Path("x")).errno == 0
