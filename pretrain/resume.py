"""Where a run goes on: its own newest whole checkpoint, else a given one, else its initial weights, else scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint import complete_checkpoints, read_trained_weights, read_training_state
from pretrain.recipe import Model, OpenClipModel, TimmTower, TransformersText
from pretrain.resolution import as_size
from pretrain.towers import read_checkpoint

Say = Callable[[str], None]


@dataclass(frozen=True)
class Restored:
    """A checkpoint that could be read as a whole."""

    folder: Path
    state: dict[str, Any]
    """The JSON of its training state."""
    optimizer: dict[str, Tensor]
    """The optimiser's tensors by `NAME|KEY`."""
    weights: dict[str, Tensor]
    """Of the model that was saved."""
    trained: dict[str, Tensor]
    """Of the model that was trained: the same, unless the run keeps an average."""
    image_size: tuple[int, int]
    """Of its pictures, which a run may change on its way."""

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.state["step"]


def read_whole(folder: Path) -> Restored:
    """Read all of a checkpoint.

    Raises:
        ValueError: A file of it is missing, cut short, or does not fit the others.
    """
    state, optimizer = read_training_state(folder)
    built = read_checkpoint(folder / "model")
    weights = built.model.state_dict()
    trained = read_trained_weights(folder) if state["identity"].get("ema") else weights
    return Restored(folder, state, optimizer, weights, trained, as_size(built.preprocess_cfg["size"]))


def newest_whole(checkpoints: Path, say: Say, *, until: int | None = None) -> Restored | None:
    """The newest checkpoint that can be read as a whole; damaged ones are told and passed over.

    Args:
        checkpoints: A run's folder of checkpoints.
        say: Tells the user.
        until: Only checkpoints of at most this step.

    Returns:
        It, or None where there is no checkpoint.

    Raises:
        ValueError: There are checkpoints and all of them are damaged: to begin anew without a word would give
            up what they may still hold.
    """
    found = [
        folder
        for folder in complete_checkpoints(checkpoints)
        if until is None or int(folder.name.removeprefix("step-")) <= until
    ]
    damages = []
    for folder in found:
        try:
            return read_whole(folder)
        except ValueError as error:
            damages.append(str(error))
            if folder is not found[-1]:
                say(f"damaged, so the one before is taken: {error}")
    if damages:
        raise ValueError(
            f"{checkpoints}: none of its {len(found)} checkpoints can be read; the newest: {damages[0]} "
            "Bring one back from a copy, or begin anew with --overwrite."
        )
    return None


def find_checkpoint(
    checkpoints: Path, given: str | None, say: Say, *, copies: str | None = None
) -> Restored | None:
    """Where to go on, in this order, telling which it is.

    1. The newest whole checkpoint of the run's own folder.
    2. The given one.
    3. and 4. None: the model as it was built, from its initial weights or from scratch.

    Args:
        checkpoints: The run's folder of checkpoints.
        given: A checkpoint (`.../step-N`) or run folder; looked at only when the run has no checkpoint.
        say: Tells the user.

    Raises:
        ValueError: The given one is no checkpoint, or is damaged; or all of the run's own are damaged.
    """
    own = newest_whole(checkpoints, say)
    if own is not None:
        say(f"resuming at step {own.step} from {own.folder} (1: the run's own newest checkpoint)")
        return own
    if given is None:
        return None
    place = Path(given).expanduser()
    if complete_checkpoints(place / "checkpoints"):
        found = newest_whole(place / "checkpoints", say)
        assert found is not None, "there is a checkpoint, and damaged ones are errors"
    elif (place / "training").is_dir():
        found = read_whole(place)
    else:
        raise ValueError(
            f"--resume {given}: no checkpoint to go on from: expected a folder `.../checkpoints/step-N` with "
            "`training/` in it, or a run folder. For its weights alone, begin a run with --model.name."
        )
    say(f"resuming at step {found.step} from {found.folder} (2: the given one; the run has no checkpoint)")
    return found


def beginning(model: Model) -> str:
    """Where a new run begins, in words: its initial weights, or scratch."""
    weights = initial_weights(model)
    return f"(3: initial weights, {weights})" if weights else "(4: from scratch, random weights)"


def initial_weights(model: Model) -> str | None:
    """What a recipe's model takes its first weights from; None for random ones."""
    if isinstance(model, OpenClipModel):
        if model.pretrained:
            return f"{model.name} {model.pretrained}"
        named = "/" in model.name or ":" in model.name or Path(model.name).is_dir()
        return model.name if named else None
    towers = [
        tower.weights if isinstance(tower, TimmTower) else tower.name
        for tower in (model.image_tower, model.text_tower)
        if isinstance(tower, TimmTower | TransformersText)
    ]
    return ", ".join(name for name in towers if name) or None
