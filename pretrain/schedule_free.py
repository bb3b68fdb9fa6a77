"""AdamW whose rate never needs to fall, since what is evaluated and saved is an average of its points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pretrain.recipe_optim import ScheduleFreeConfig


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-free AdamW: gradients are taken between where AdamW is and the average of where it was.

    Of three sequences, `z` is where AdamW stands, `x` the average of all `z`, each weighted by the square of its rate,
    and `y = (1 - beta) z + beta x` where gradients are taken. Parameters are `y`, the state has `z`; `x` follows from
    both (`average_of`) and is the model. No more memory than AdamW: `z` takes the place of the first moment.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Share of the average in `y`, and of the past in the second moments.
        eps: Added to the root of the second moments.
        weight_decay: Decoupled, of `y`.

    Reference:
        Defazio et al. 2024, The Road Less Scheduled (arXiv 2405.15682), with bias-corrected second moments.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters that have a gradient."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if parameter not in self.state:
                    self.state[parameter] = {
                        "z": parameter.clone(),
                        "exp_avg_sq": torch.zeros_like(parameter),
                        "step": torch.zeros((), dtype=torch.float64),
                        "rates": torch.zeros((), dtype=torch.float64),  # sum of their squares
                    }
            if parameters:
                self.step_group(group, parameters)
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimiser, but the sums of rates stay on the CPU in float64, as steps do."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, state in state_dict["state"].items():
            self.state[parameters[number]]["rates"] = state["rates"]

    def step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        (beta, beta2), lr = group["betas"], group["lr"]
        for state in states:
            state["step"] += 1
            state["rates"] += lr**2
        shares = [lr**2 / state["rates"].item() if lr else 0.0 for state in states]  # of the new z in x
        corrections = [(1 - beta2 ** state["step"].item()) ** 0.5 for state in states]
        points, seconds = [state["z"] for state in states], [state["exp_avg_sq"] for state in states]
        gradients: Any = [parameter.grad for parameter in parameters]
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        scales: Any = torch._foreach_sqrt(seconds)
        torch._foreach_div_(scales, corrections)
        torch._foreach_add_(scales, group["eps"])
        directions: Any = torch._foreach_div(gradients, scales)
        if group["weight_decay"]:
            torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
        # y' = (1 - beta) z' + beta ((1 - share) x + share z'), with x written by y and z, and z' = z - lr direction
        moves: Any = torch._foreach_sub(points, parameters)
        torch._foreach_mul_(moves, shares)
        torch._foreach_add_(parameters, moves)
        torch._foreach_mul_(directions, lr)
        torch._foreach_sub_(points, directions)
        torch._foreach_mul_(directions, [1 - beta + beta * share for share in shares])
        torch._foreach_sub_(parameters, directions)


def average_of(parameter: Tensor, point: Tensor, beta: float) -> Tensor:
    """`x` by `y` and `z`."""
    return parameter.lerp(point, 1 - 1 / beta)


class ScheduleFreeAverage:
    """The average that schedule-free training saves and evaluates, as `WeightAverage` is for other optimisers.

    It is made when it is asked for and keeps nothing. Buffers, batch norms' statistics among them, are those of the
    model that trains.

    Args:
        model: That trains.
        config: Of its optimiser.
        saved: The optimiser's tensors by `model.NAME|KEY`, until one is followed.
    """

    def __init__(self, model: Any, config: ScheduleFreeConfig, saved: Mapping[str, Tensor]):
        self.beta, self.saved = config.betas[0], saved
        self.trained: dict[str, Tensor] | None = None
        self.follow(model)

    def follow(self, model: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Average this model from now on, by the state of the optimiser that trains it."""
        self.model, self.optimizer = model, optimizer

    def resize_image_tower(self, size: tuple[int, int]) -> None:
        """A run of this kind has one size, which it begins with."""

    def update(self, step: int) -> None:
        """Nothing to do: the optimiser has done it."""

    def points(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, parameter and `z` of each that has been trained."""
        for name, parameter in self.model.named_parameters():
            live = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
            point = live.get("z", self.saved.get(f"model.{name}|z") if self.optimizer is None else None)
            if point is not None:
                yield name, parameter, point.to(parameter.device)

    @property
    def state(self) -> dict[str, Tensor]:
        """All of the model's state, with the average in place of the weights."""
        with torch.no_grad():
            averaged = {name: average_of(value, point, self.beta) for name, value, point in self.points()}
        return {**self.model.state_dict(), **averaged}

    @torch.no_grad()
    def exchange(self) -> None:
        """Let the model hold the average; once more to undo it, to the last bit."""
        kept, self.trained = self.trained, None
        if kept is None:
            self.trained = {name: value.clone() for name, value, _ in self.points()}
            kept = {name: average_of(value, point, self.beta) for name, value, point in self.points()}
        parameters = dict(self.model.named_parameters())
        for name, value in kept.items():
            parameters[name].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the average inside."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
