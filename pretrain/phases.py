"""A recipe's phases on its model: what trains from which step on, and on pictures of which size."""

from __future__ import annotations

from pretrain.adapters import lock_all_but_adapters
from pretrain.average import Average
from pretrain.encoder import Encoder
from pretrain.gradcache import require_row_by_row
from pretrain.locks import apply_lock, phases_begun, set_training_mode
from pretrain.recipe import Phase, PretrainRecipe
from pretrain.recompute import recompute_activations, require_no_statistics
from pretrain.resolution import as_size, require_image_size, set_patch_dropout


class Phases:
    """Brings an encoder to the phase of a step.

    Args:
        encoder: Of the run, at the size that its recipe says.
        recipe: All of the run.

    Raises:
        ValueError: The model cannot be in one of the phases, or not with the recipe's `micro_batch` or
            `checkpoint_activations`.
    """

    def __init__(self, encoder: Encoder, recipe: PretrainRecipe):
        self.encoder, self.recipe = encoder, recipe
        self.own_size = encoder.image_size
        for phase in recipe.phases or (Phase(),):
            self.require(phase)

    def require(self, phase: Phase) -> None:
        """Refuse a phase that the model cannot be in, before anything is trained."""
        model, recipe = self.encoder.model, self.recipe
        self.lock(phase)
        set_patch_dropout(model.visual, phase.patch_dropout)
        if phase.image_size:
            require_image_size(model.visual, as_size(phase.image_size))
        if recipe.micro_batch or recipe.checkpoint_activations:
            set_training_mode(model, self.begun(phase.step))
        if recipe.micro_batch:
            require_row_by_row(model)
        if recipe.checkpoint_activations:
            recompute_activations(model)
            require_no_statistics(model)

    def begun(self, step: int) -> list[Phase]:
        """Those that have begun at a step."""
        return phases_begun(self.recipe.phases, step)

    def at(self, step: int) -> Phase:
        """The one that holds at a step."""
        return self.begun(step)[-1]

    def bounds(self) -> list[int]:
        """Steps at which a phase ends, the run's last step among them."""
        steps = self.recipe.steps
        return [*(phase.step for phase in self.recipe.phases if phase.step < steps), steps]

    def lock(self, phase: Phase) -> None:
        """Set which parameters train."""
        apply_lock(self.encoder.model, phase)
        if self.recipe.lora:
            lock_all_but_adapters(self.encoder.model, self.recipe.lora)

    def enter(self, step: int, average: Average | None) -> tuple[Phase, set[str]]:
        """Make the model what the phase of a step wants.

        Args:
            step: Optimiser steps taken.
            average: Of the weights, if the recipe has one; it goes along.

        Returns:
            The phase, and the names (`model.NAME`) of parameters that have another shape than before.
        """
        phase, model = self.at(step), self.encoder.model
        self.lock(phase)
        set_patch_dropout(model.visual, phase.patch_dropout)
        size = as_size(phase.image_size) if phase.image_size else self.own_size
        if size == self.encoder.image_size:
            return phase, set()
        before = {name: value.shape for name, value in model.named_parameters()}
        if average:
            average.resize_image_tower(size)
        self.encoder.set_image_size(size)
        if average:
            average.follow(model)
        resized = {f"model.{name}" for name, value in model.named_parameters() if value.shape != before[name]}
        return phase, resized
