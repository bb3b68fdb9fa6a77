"""A task model on disk: one folder with the encoder, the weights on top of it, and task.json, which describes them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from finetune.tower_adapters import save_tower_adapters
from pairstream.atomic import new_folder, write_text
from pretrain.checkpoint import complete_checkpoints
from pretrain.encoder import Encoder

TASK = "task.json"
FORMAT = 1
BEST = "best"  # of a run folder: the model of the best evaluation


class TaskModel(nn.Module, ABC):
    """What all models over an encoder have in common: the folder they are saved as."""

    encoder: Encoder
    parts: Mapping[str, Any] = MappingProxyType({})
    """Where the parts come from and under which licence; see `finetune.parts`."""

    @abstractmethod
    def write_parts(self, folder: Path) -> dict[str, Any]:
        """Write everything but the encoder into a folder; returns what task.json says of it."""

    def save(self, folder: str | Path) -> Path:
        """Write the model as one folder that opens offline.

        Raises:
            OSError: The disk is full or not writable; what was there before is untouched.
        """
        folder = Path(folder)
        with new_folder(folder) as temporary:
            self.write_into(temporary, final=folder)
        return folder

    def write_into(self, folder: Path, *, final: Path) -> None:
        """Write all parts into an existing folder that will be known as `final`."""
        (folder / "encoder").mkdir()
        self.encoder.write_into(folder / "encoder", final=final / "encoder")
        save_tower_adapters(self.encoder, folder)
        content = {"format": FORMAT, **self.write_parts(folder), "parts": dict(self.parts)}
        write_text(folder / TASK, json.dumps(content, indent=2) + "\n")


def finite(numbers: Tensor) -> Tensor:
    """Numbers that a model has made, as they are.

    Raises:
        ValueError: Some are not finite: text and labels made of them would mean nothing.
    """
    if not bool(torch.isfinite(numbers).all()):
        raise ValueError(
            "the model makes NaN or infinite numbers of these pictures: its weights are broken (a run that diverged or "
            "a damaged file). Take an older checkpoint, or on a GPU --precision fp32"
        )
    return numbers


def task_folder(folder: str | Path) -> Path:
    """The task model that a folder means: itself, or the best or newest one of a run folder.

    Raises:
        FileNotFoundError: None is there.
    """
    folder = Path(folder).expanduser()
    checkpoints = complete_checkpoints(folder / "checkpoints") if folder.is_dir() else []
    for candidate in (folder, folder / BEST, *(checkpoint / "model" for checkpoint in checkpoints)):
        if (candidate / TASK).is_file():
            return candidate
    raise FileNotFoundError(
        f"no task model in {folder}: expected {TASK} there, or a run folder of `finetune`"
    )


@contextmanager
def opened(folder: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A task model's folder and what its task.json says, for a block that reads the other parts.

    Args:
        folder: What `TaskModel.save` wrote, or a run folder of `finetune`.

    Raises:
        FileNotFoundError: No task model is there.
        ValueError: What the block reads is missing, damaged or of another version.
    """
    folder = task_folder(folder)
    try:
        content = json.loads((folder / TASK).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        yield folder, content
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: a part of this task model is damaged or missing: {error}") from error
