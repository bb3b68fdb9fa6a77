"""Checkpoints of a run: `checkpoints/step-00001000/model` for everybody, `.../training` for `--resume`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pairstream.atomic import TEMPORARY, aside, new_folder, write_text

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
TRAINED = "weights.safetensors"
TERMS = "terms.safetensors"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of an optimiser step lies."""
    return checkpoints / f"step-{step:08d}"


def save_checkpoint(
    checkpoints: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    optimizer: torch.optim.Optimizer | dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int,
    trained: Mapping[str, torch.Tensor] | None = None,
    terms: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write one checkpoint, whole or not at all, and drop the oldest ones past `keep`.

    The model and what resuming needs appear together in one rename, so that they always belong together.

    Args:
        checkpoints: The run's folder of checkpoints.
        step: Optimiser steps taken.
        write_model: Writes the model's files into the folder it is given.
        optimizer: Its state is written by parameter name (groups carry `names`); or that state, already taken.
        state: JSON that resuming needs.
        keep: Newest checkpoints that stay.
        trained: The weights that train, where the model written is their average.
        terms: State of the loss's terms.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: The disk is full or not writable; earlier checkpoints are untouched.
    """
    folder = step_folder(checkpoints, step)
    with new_folder(folder) as temporary:
        (temporary / "model").mkdir()
        write_model(temporary / "model")
        (temporary / "training").mkdir()
        moments = optimizer if isinstance(optimizer, dict) else optimizer_state(optimizer)
        save_tensors(moments, temporary / "training" / OPTIMIZER)
        if trained is not None:
            save_tensors(on_cpu(trained), temporary / "training" / TRAINED)
        if terms:
            save_tensors(on_cpu(terms), temporary / "training" / TERMS)
        write_text(temporary / "training" / STATE, json.dumps({"step": step, **state}, indent=2) + "\n")
    for old in complete_checkpoints(checkpoints)[keep:]:
        gone = aside(old)
        old.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return folder


def on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """`safetensors.torch.save_file` whose failures to write are OSErrors.

    Raises:
        OSError: The disk is full or not writable.
    """
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise as_os_error(error, path) from error


def as_os_error(error: Exception, path: Path) -> OSError:
    """The OSError behind safetensors' own exception, so that a full disk is known as one."""
    text = str(error)
    number = int(text.split("os error ")[1].split(")")[0]) if "os error " in text else 0
    return OSError(number, text, str(path))


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoints that are whole, newest first; half-written ones never have this name."""
    found = [path for path in checkpoints.glob("step-*") if (path / "training" / STATE).is_file()]
    return sorted(found, reverse=True)


def clear_leftovers(checkpoints: Path) -> None:
    """Remove what a killed run had not finished writing."""
    for path in checkpoints.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def read_training_state(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `--resume` needs of a checkpoint.

    Returns:
        The JSON state, and the optimiser's tensors by `NAME|KEY`.

    Raises:
        ValueError: A file is missing or cut short.
    """
    try:
        state = json.loads((folder / "training" / STATE).read_text(encoding="utf-8"))
        tensors = load_file(folder / "training" / OPTIMIZER)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: the training state is damaged ({error}). Remove this folder to resume from the one before."
        ) from error
    return state, tensors


def read_terms(folder: Path) -> dict[str, torch.Tensor]:
    """State of the loss's terms, of a run whose terms have one.

    Raises:
        ValueError: The file is missing or cut short.
    """
    path = folder / "training" / TERMS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: the state of the loss's terms cannot be read ({error}). Remove {folder.name} to resume from the "
            "checkpoint before."
        ) from error


def read_trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that train, of a checkpoint whose model is their average.

    Raises:
        ValueError: The file is missing or cut short.
    """
    try:
        return load_file(folder / "training" / TRAINED)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder / 'training' / TRAINED}: the weights behind the average cannot be read ({error}). Remove "
            f"{folder.name} to resume from the checkpoint before."
        ) from error


def optimizer_state(optimizer: torch.optim.Optimizer, *, copy: bool = False) -> dict[str, torch.Tensor]:
    """An optimiser's state as tensors in main memory by `NAME|KEY`; its groups carry the names of their parameters.

    On a CPU they are the optimiser's own, which its next step changes, unless `copy` asks for others.
    """
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{key}"] = torch.as_tensor(value).detach().to("cpu", copy=copy).contiguous()
    return tensors


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> int:
    """Give parameters the state that was saved under their names; others start afresh.

    Returns:
        How many parameters found theirs.
    """
    found = 0
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            own = {
                key.removeprefix(f"{name}|"): value
                for key, value in tensors.items()
                if key.startswith(f"{name}|")
            }
            if own:
                found += 1
                # The fused kernel counts steps beside the parameter, Adafactor on the CPU.
                fused = isinstance(optimizer, torch.optim.AdamW)
                optimizer.state[parameter] = {
                    key: as_parameter_lies(parameter, value) if value.ndim or fused else value
                    for key, value in own.items()
                }
    return found


def as_parameter_lies(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A moment on its parameter's device; the fused kernel walks memory, so one of its shape must lie as it does."""
    if value.ndim and value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)
