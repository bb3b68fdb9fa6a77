"""What the log says of a step's work: FLOPs and their share of the peak, and each tower's gradient norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from pretrain.encoder import Encoder
from pretrain.flops import count_flops, loss_flops, peak_flops, view_flops
from pretrain.network import DualEncoder
from pretrain.recipe import PretrainRecipe
from pretrain.recompute import recompute_activations
from pretrain.selfcheck import part_of
from pretrain.terms import Terms


class Meter:
    """Counts the FLOPs of a phase's steps, and takes gradient norms by part where a line is to be logged.

    MFU is as PaLM has it: FLOPs of the model and the loss, forward and backward, over the dense bf16 peak of all
    devices. Work that is done twice to save memory (GradCache's second forward pass, activations that are recomputed)
    and distillation's teachers are left out.

    Args:
        encoder: The model.
        terms: Those of the recipe.
        recipe: The run.
        accelerator: Of the run.

    Attributes:
        text_length: Tokens of a text in the step that is counted; the whole context until told otherwise.
    """

    def __init__(self, encoder: Encoder, terms: Terms, recipe: PretrainRecipe, accelerator: Accelerator):
        self.encoder, self.terms, self.recipe, self.accelerator = encoder, terms, recipe, accelerator
        self.peak = peak_flops(accelerator.device)
        self.text_length: int = encoder.tokenize(["a"]).shape[1]

    def begin(self, network: nn.Module) -> None:
        """Take up a phase, in which the same parameters train."""
        self.parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and "logit" not in name:
                self.parts.setdefault(part_of(name).replace(" ", "_"), []).append(parameter)
        self.norms: dict[str, Tensor] = {}
        self.per_pair: dict[int, float] = {}

    def take_norms(self, norm: Callable[[list[nn.Parameter]], Tensor | None]) -> None:
        """Take the gradient norm of each tower, before clipping; tensors, so that nothing waits for the device.

        Args:
            norm: Of some parameters' gradients; every rank must call it.
        """
        found = {part: norm(parameters) for part, parameters in self.parts.items()}
        self.norms = {part: value for part, value in found.items() if value is not None}

    def flops_per_pair(self) -> float:
        """FLOPs of a step for each pair, with texts of `text_length`."""
        if self.text_length not in self.per_pair:
            more, model = (self.recipe.data.captions_per_image, self.recipe.views), self.encoder.model
            network = DualEncoder(self.encoder, self.terms)  # that which trains may be compiled, or in shards
            if self.recipe.checkpoint_activations:
                recompute_activations(model, False)
            count = count_flops(network, self.encoder.image_size, self.text_length, *more)
            if self.recipe.checkpoint_activations:
                recompute_activations(model)
            loss = loss_flops(self.recipe.batch_size, self.encoder.embed_dim) + view_flops(self.recipe)
            self.per_pair[self.text_length] = count.step + loss
        return self.per_pair[self.text_length]

    def record(self, samples_per_s: float) -> dict[str, Any]:
        """The log line's part: `grad_norm_image_tower` and so on, `flops_per_pair`, `tflops_per_s`, and `mfu`.

        The last only on a GPU whose peak is known.
        """
        norms, self.norms = self.norms, {}  # a step that is left out has none
        found: dict[str, Any] = {f"grad_norm_{part}": float(norm) for part, norm in norms.items()}
        if self.accelerator.is_main_process:
            rate = samples_per_s * self.flops_per_pair()
            found |= {"flops_per_pair": self.flops_per_pair(), "tflops_per_s": rate / 1e12}
            if self.peak is not None:
                found["mfu"] = rate / (self.peak * self.accelerator.num_processes)
        return found
