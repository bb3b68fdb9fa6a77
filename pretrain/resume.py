"""Where a run goes on: its own newest whole checkpoint, else a given one, else its initial weights, else scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from pretrain.checkpoint import complete_checkpoints, read_terms, read_trained_weights, read_training_state
from pretrain.collectives import gather_counts
from pretrain.copies import fetch_newest
from pretrain.recipe import PretrainRecipe
from pretrain.recipe_model import Model, OpenClipModel, TimmTower, TransformersText
from pretrain.resolution import as_size
from pretrain.towers import read_checkpoint

Say = Callable[[str], None]

# What a resumed run may change: where things lie, how fast they come, what is told of them.
FREE: Any = {
    **dict.fromkeys(
        ("run", "processes", "precision", "log_every", "checkpoint", "evaluate", "trackers"), True
    ),
    **dict.fromkeys(("on_divergence", "preempted_exit_code", "rank_timeout"), True),
    **dict.fromkeys(("compile", "checkpoint_activations"), True),
    "data": {"train", "workers", "max_faults", "cache_dir", "cache_gb"},
}


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
    """Of the model that was trained: the same, unless the run keeps an average or trains adapters."""
    terms: dict[str, Tensor]
    """State of the loss and its terms."""
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
    run = state["identity"]
    apart = run.get("ema") or run.get("lora") or run.get("optim", {}).get("kind") == "schedule_free"
    trained = read_trained_weights(folder) if apart else weights
    size = as_size(built.preprocess_cfg["size"])
    terms, loss = (run.get(key) or {} for key in ("terms", "loss"))
    beside = terms.get("alignment") or terms.get("self_supervision") or loss.get("kind") == "global_contrast"
    own = read_terms(folder) if beside else {}
    return Restored(folder, state, optimizer, weights, trained, own, size)


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
    checkpoints: Path, given: str | None, copies: str | None, accelerator: Accelerator, say: Say
) -> Restored | None:
    """Where to go on, in this order, telling which it is; every rank must call it.

    1. The newest whole checkpoint of the run's own folder; where that has none, the newest of its copies.
    2. The given one.
    3. and 4. None: the model as it was built, from its initial weights or from scratch.

    Args:
        checkpoints: The run's folder of checkpoints.
        given: A checkpoint (`.../step-N`) or run folder; looked at only when the run has no checkpoint.
        copies: The recipe's `checkpoint.copy_to`.
        accelerator: Of the run.
        say: Tells the user.

    Raises:
        ValueError: The given one is no checkpoint, or is damaged; all of the run's own are damaged; or the ranks
            see different checkpoints.
    """
    if copies and accelerator.is_main_process and not complete_checkpoints(checkpoints):
        fetched = fetch_newest(copies, checkpoints)
        say(f"brought {fetched.name} back from {copies}" if fetched else f"no checkpoint in {copies}")
    accelerator.wait_for_everyone()
    found = newest_whole(checkpoints, say)
    if found is not None:
        say(f"resuming at step {found.step} from {found.folder} (1: the run's own newest checkpoint)")
    elif given is not None:
        found = given_checkpoint(given, say)
        say(
            f"resuming at step {found.step} from {found.folder} (2: the given one; the run has no checkpoint)"
        )
    if accelerator.num_processes > 1:
        steps = gather_counts(found.step if found else 0, accelerator.device)
        if len(set(steps)) > 1:
            raise ValueError(
                f"the ranks found checkpoints of different steps, {steps}, in {checkpoints}: the run folder must lie "
                "where all of them see it"
            )
    return found


def given_checkpoint(given: str, say: Say) -> Restored:
    """The checkpoint that `--resume PLACE` names.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    place = Path(given).expanduser()
    found = newest_whole(place / "checkpoints", say)
    if found is not None:
        return found
    if not (place / "training").is_dir():
        raise ValueError(
            f"--resume {given}: no checkpoint to go on from: expected a folder `.../checkpoints/step-N` with "
            "`training/` in it, or a run folder. For its weights alone, begin a run with --model.name."
        )
    return read_whole(place)


def identity(recipe: PretrainRecipe, samples: int) -> dict[str, Any]:
    """What must not change when a run is resumed.

    Args:
        recipe: All of the run.
        samples: Of the training set.
    """
    return {**recipe.model_dump(mode="json", exclude=FREE), "samples": samples}


def require_same_run(found: Restored, identity: dict[str, Any]) -> None:
    """Refuse to go on with another run than the one that was begun.

    Raises:
        ValueError: A key differs; the message has which.
    """
    before = found.state["identity"]
    changed = [key for key, value in identity.items() if what_is_said(before.get(key)) != what_is_said(value)]
    if changed:
        raise ValueError(
            f"{found.folder}: cannot resume with another {', '.join(changed)}: the run would not be the one that "
            "was begun. Change it back, or start a new run with --run NAME."
        )


def what_is_said(value: Any) -> Any:
    """A part of a recipe without what is null or empty: a key that came later says nothing of an older run."""
    if isinstance(value, dict):
        parts = {key: what_is_said(part) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part not in (None, [], {})}
    return [what_is_said(part) for part in value] if isinstance(value, list | tuple) else value


def other_world(then: int, now: int) -> str:
    """What is exact, and what is not, on another number of processes."""
    return (
        f"the checkpoint is of {then} processes, here are {now}. Exact: weights, optimiser, the samples of each "
        "global batch, their order and augmentation. Not exact: sums over ranks, which differ by rounding, and "
        "dropout, which each rank draws for itself"
    )


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
