"""A check of the first step: what is meant to train has a gradient, and what is frozen has not moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

NAMED = 8


class FirstStep:
    """Compares a model before and after its first optimiser step.

    Args:
        model: The model, with `requires_grad` as it is meant.
        waiting: Names of parameters that begin to train later: they are frozen for now, and may have no gradient.
    """

    def __init__(self, model: nn.Module, waiting: Iterable[str] = ()):
        self.model, self.waiting = model, set(waiting)
        self.before = {
            name: fingerprint(parameter)
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad or name in self.waiting
        }

    def after_backward(self) -> None:
        """Refuse parameters that are said to train and that the loss does not depend on.

        Raises:
            ValueError: Their names.
        """
        dead = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and name not in self.waiting and parameter.grad is None
        ]
        if dead:
            raise ValueError(
                f"{some(dead)} should train and got no gradient in the first step: the loss does not depend on them. "
                "Freeze that part, or (LoRA) give targets whose forward is called: on open_clip's towers `attn`, "
                "`c_fc` and `c_proj`, not `out_proj`."
            )

    def after_step(self) -> None:
        """Refuse frozen parameters that have changed.

        Raises:
            ValueError: Their names.
        """
        parameters = dict(self.model.named_parameters())
        moved = [
            name
            for name, before in self.before.items()
            if not torch.equal(fingerprint(parameters[name]), before)
        ]
        if moved:
            raise ValueError(
                f"{some(moved)} should be frozen and changed in the first step: the optimiser moves them. This is a "
                "fault of the program, not of the recipe: please report it"
            )


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} tensors ({', '.join(names[:NAMED])}{more})"


def fingerprint(parameter: Tensor) -> Tensor:
    """The sum of a tensor's bits as whole numbers, int64: an optimiser that moves the tensor changes it.

    Not `torch.hash_tensor`, whose exclusive or is 0 for an even number of equal values, such as new norms and biases.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().contiguous().view(whole).sum(dtype=torch.int64)
