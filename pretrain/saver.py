"""Checkpoints beside the training: tensors are copied at once, files are written in a thread."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pairstream.errors import message
from pretrain.adapters import plain_state
from pretrain.checkpoint import optimizer_state, save_checkpoint, step_folder
from pretrain.copies import copy_checkpoint, open_place
from pretrain.encoder import Encoder
from pretrain.recipe import PretrainCheckpoints


class Saver:
    """Writes a run's checkpoints, one at a time, while training goes on.

    The step that saves waits until model and optimiser are copied to main memory (three times the model's size with
    AdamW, four with an average of the weights; held until the files are written), and for the save before if that is
    still under way; a copy to `copy_to` belongs to its save. A failed write is raised by the next step, a failed copy
    by the end of the run: the checkpoint itself is there, and the next copy may succeed.

    Args:
        checkpoints: The run's folder of checkpoints.
        config: The recipe's `checkpoint`.

    Raises:
        ValueError: `copy_to` is no place that can be written to.

    Example:
        >>> with Saver(folder, recipe.checkpoint) as saver:                       # doctest: +SKIP
        ...     saver.save(step, encoder, optimizer, card="", state={})
    """

    def __init__(self, checkpoints: Path, config: PretrainCheckpoints):
        self.checkpoints, self.config = checkpoints, config
        if config.copy_to:
            open_place(config.copy_to)
        self.thread = ThreadPoolExecutor(1, "save") if config.background else None
        self.under_way: Future[None] | None = None
        self.copy_failure: Exception | None = None

    def save(
        self,
        step: int,
        encoder: Encoder,
        optimizer: torch.optim.Optimizer | dict[str, Tensor],
        *,
        card: str,
        state: dict[str, Any],
        average: Mapping[str, Tensor] | None = None,
        terms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begin to write one checkpoint; it appears under its name when it is whole.

        Args:
            step: Optimiser steps taken.
            encoder: The model.
            optimizer: Its state is written by parameter name; or that state, already taken, which nobody changes.
            card: The model card.
            state: JSON that resuming needs.
            average: The weights that are written as the model, instead of its own. Whenever those that train are
                not those written, for an average or for adapters that are added, they go to what resuming needs.
            terms: State of the loss's terms, which is no part of the model.

        Raises:
            OSError: This or an earlier save failed; earlier checkpoints are untouched.
        """
        self.wait()
        state_dict = encoder.model.state_dict()
        weights = plain_state(encoder.model) if average is None else average
        trained = None if weights.keys() == state_dict.keys() and average is None else state_dict
        taken = isinstance(optimizer, dict)
        moments = optimizer if taken else optimizer_state(optimizer, copy=self.thread is not None)
        if self.thread is None:
            self.write(step, encoder, weights, trained, terms or {}, moments, card, state)
            return
        copies = snapshot(weights), None if trained is None else snapshot(trained), snapshot(terms or {})
        state = copy.deepcopy(state)
        self.under_way = self.thread.submit(self.write, step, encoder, *copies, moments, card, state)

    def write(
        self,
        step: int,
        encoder: Encoder,
        weights: Mapping[str, Tensor],
        trained: Mapping[str, Tensor] | None,
        terms: Mapping[str, Tensor],
        moments: dict[str, Tensor],
        card: str,
        state: dict[str, Any],
    ) -> None:
        """Write the files, drop old checkpoints, copy."""
        final = step_folder(self.checkpoints, step) / "model"
        folder = save_checkpoint(
            self.checkpoints,
            step,
            write_model=lambda place: encoder.write_into(place, final=final, card=card, weights=weights),
            optimizer=moments,
            state=state,
            keep=self.config.keep,
            trained=trained,
            terms=terms,
        )
        if not self.config.copy_to:
            return
        try:
            copy_checkpoint(folder, self.config.copy_to, keep=self.config.copy_keep)
            self.copy_failure = None
        except Exception as error:  # whatever a remote file system raises
            self.copy_failure = error
            print(f"could not copy {folder} to {self.config.copy_to}: {error}", file=sys.stderr, flush=True)

    def poll(self) -> None:
        """Raise what a save that has ended failed with; does not wait."""
        if self.under_way is not None and self.under_way.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way.

        Raises:
            OSError: It failed.
        """
        ended, self.under_way = self.under_way, None
        if ended is not None:
            ended.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            print(f"the last checkpoint could not be written: {message(failed)}", file=sys.stderr, flush=True)
        finally:
            if self.thread is not None:
                self.thread.shutdown()
        if self.copy_failure is not None and (error is None or isinstance(error, SystemExit)):
            raise OSError(
                f"the newest checkpoint is in {self.checkpoints} but could not be copied to "
                f"{self.config.copy_to}: {self.copy_failure}"
            ) from self.copy_failure


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory that training does not change."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
