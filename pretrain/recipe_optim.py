"""What a recipe says of the optimiser and of its rate over the steps; fine-tuning says the same."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from pairstream.recipe import Config


class OptimizerConfig(Config):
    """What every optimiser has. Gains, biases and logit_scale do not decay."""

    lr: float = Field(default=5e-4, gt=0)
    """At its peak."""
    weight_decay: float = Field(default=0.2, ge=0)
    """Decoupled: a step takes lr x this share of a weight away."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; None leaves gradients as they are."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each layer group of a tower as a multiple of that of the next one towards the output; 0.65
    to 0.9 suit pretrained towers."""


class AdamW(OptimizerConfig):
    """AdamW without decay on gains, biases and logit_scale."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)


class MuonConfig(AdamW):
    """Muon for the weights of linear and convolution layers, AdamW with the same `lr` for everything else.

    Learns more from each sample at more time a step; see `pretrain.muon`.
    """

    kind: Literal["muon"] = "muon"  # pyright: ignore[reportIncompatibleVariableOverride]
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Share of the earlier gradients in Muon's direction."""


class LionConfig(OptimizerConfig):
    """Lion: the sign of a momentum, of which it keeps one a weight where AdamW keeps two.

    Its steps are larger, so the rate is a third to a tenth of AdamW's and the decay as much larger.
    """

    kind: Literal["lion"] = "lion"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=1.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    """Share of the momentum in a step's direction, and of its past in the momentum."""


class AdafactorConfig(OptimizerConfig):
    """Adafactor as big_vision trains SigLIP with: second moments by row and column, the first in bfloat16.

    Takes a quarter of AdamW's memory at the same rate and decay.
    """

    kind: Literal["adafactor"] = "adafactor"
    momentum: float | None = Field(default=0.9, ge=0, lt=1)
    """Share of the past in a step's direction; None keeps none, and no memory for it."""
    decay_rate: float = Field(default=0.8, gt=0, lt=1)
    """Second moments forget as 1 - t ** -decay_rate, up to `beta2_cap`."""
    beta2_cap: float = Field(default=0.999, gt=0, lt=1)


class ScheduleFreeConfig(AdamW):
    """Schedule-free AdamW: the rate stays at its peak, and an average of the weights is evaluated and saved.

    Wants a constant schedule and a rate of one to ten times that of AdamW with a cosine; see `pretrain.schedule_free`.
    """

    kind: Literal["schedule_free"] = "schedule_free"  # pyright: ignore[reportIncompatibleVariableOverride]
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    """Share of the average in the point where gradients are taken, and of the past in the second moments."""

    @field_validator("betas")
    @classmethod
    def are_shares(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not (0 < betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"expected shares below 1, the first above 0, got {betas}")
        return betas


def kind_or(default: str) -> Discriminator:
    """Tells the alternatives of a union by `kind`; a configuration that names none is of the default one."""

    def kind_of(value: Any) -> str:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)

    return Discriminator(kind_of)


Scheduled = (
    Annotated[AdamW, Tag("adamw")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[LionConfig, Tag("lion")]
    | Annotated[AdafactorConfig, Tag("adafactor")]
)
Optimizer = Annotated[Scheduled, kind_or("adamw")]
PretrainOptimizer = Annotated[
    Scheduled | Annotated[ScheduleFreeConfig, Tag("schedule_free")], kind_or("adamw")
]


class Warmup(Config):
    """What every schedule begins with."""

    warmup: int = Field(default=500, ge=0)
    """Optimiser steps over which the rate rises linearly to its peak."""


class Cosine(Warmup):
    """Linear warm-up, then a cosine down to `final` times the peak."""

    kind: Literal["cosine"] = "cosine"
    final: float = Field(default=0.0, ge=0, le=1)


class WSD(Warmup):
    """Warm-up, a stable rate, and a decay at the end: a run can be made longer from any checkpoint before the decay."""

    kind: Literal["wsd"] = "wsd"
    decay: int = Field(default=500, ge=0)
    """The last steps, over which the rate falls to `final` times the peak; a tenth to a fifth of the run."""
    final: float = Field(default=0.0, ge=0, le=1)
    shape: Literal["sqrt", "linear"] = "sqrt"
    """Of the fall: 1 - sqrt of the part of it that is done, or straight."""


class Rsqrt(Warmup):
    """Warm-up, then peak / sqrt(1 + (step - warmup) / timescale): needs no end; the last steps fall to zero."""

    kind: Literal["rsqrt"] = "rsqrt"
    timescale: int = Field(default=10_000, ge=1)
    """Steps after the warm-up at which the rate is the peak / sqrt(2)."""
    cooldown: int = Field(default=0, ge=0)
    """The last steps, over which the rate goes down to zero on a straight line."""


Schedule = Annotated[
    Annotated[Cosine, Tag("cosine")] | Annotated[WSD, Tag("wsd")] | Annotated[Rsqrt, Tag("rsqrt")],
    kind_or("cosine"),
]


def check_schedule(schedule: Cosine | WSD | Rsqrt, steps: int) -> None:
    """Refuse a schedule that does not fit into a run.

    Raises:
        ValueError: Its parts are as long as the run or longer.
    """
    if schedule.warmup >= steps:
        raise ValueError(
            f"schedule.warmup ({schedule.warmup}) must be below steps ({steps}): "
            "the learning rate would never reach its peak"
        )
    name = {"wsd": "decay", "rsqrt": "cooldown"}.get(schedule.kind)
    length = getattr(schedule, name) if name else 0
    if schedule.warmup + length > steps:
        raise ValueError(
            f"schedule.warmup ({schedule.warmup}) and schedule.{name} ({length}) are longer than the run "
            f"({steps} steps)"
        )
