"""`pairstream pretrain plan RECIPE`: what a run will take, before anything starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pairstream.errors import nearest
from pairstream.recipe import load_recipe, recipe_names
from pretrain.adapters import add_adapters, lock_all_but_adapters
from pretrain.encoder import Encoder, build_encoder
from pretrain.flops import Count, count_flops, loss_flops, view_flops
from pretrain.locks import apply_lock
from pretrain.network import DualEncoder
from pretrain.objectives import build_objective
from pretrain.recipe import Phase, PretrainRecipe
from pretrain.recipe_loss import DistillationConfig
from pretrain.recipe_model import OpenClipModel
from pretrain.resolution import as_size, set_patch_dropout
from pretrain.terms import Terms, build_terms

MFU = 0.2
"""Share of the peak that training reaches, where nobody has measured it: between the 0.11 of the 770 pairs a second
that open_clip reports of ViT-B/32 on an A100, and the 0.4 that large transformers reach. The log's `mfu` is better."""


MOMENTS = {"adamw": 8.0, "muon": 4.0, "lion": 4.0, "adafactor": 2.0, "schedule_free": 8.0}
"""Bytes of an optimiser's state for each trained parameter, nearly all of which are matrices."""


@dataclass(frozen=True)
class Kind:
    """A kind of device: its dense bf16 peak (1e12 FLOPs/s), memory (1e9 bytes), and US dollars for an hour."""

    peak: float
    memory: float
    hourly: float


# Peaks and memory by the makers' data sheets; prices are rough on-demand ones, which `NAME@PRICE` replaces.
KINDS = {
    "l4": Kind(121, 24, 0.7),
    "rtx4090": Kind(165.2, 24, 0.5),
    "a10": Kind(125, 24, 1.0),
    "a100-40gb": Kind(312, 40, 1.5),
    "a100-80gb": Kind(312, 80, 2.0),
    "h100": Kind(989.4, 80, 3.0),
    "h200": Kind(989.4, 141, 3.8),
    "b200": Kind(2250, 180, 6.0),
    "mi300x": Kind(1307.4, 192, 3.0),
}
DEVICES = ("8xa100-80gb", "8xh100", "64xh100")


@dataclass(frozen=True)
class Stretch:
    """Steps during which the same parameters train on pictures of one size."""

    steps: int
    trainable: int
    count: Count


@dataclass(frozen=True)
class Plan:
    """What a recipe takes, whatever it runs on.

    Attributes:
        parameters: Of all of the dual encoder, and of the loss's terms.
        towers: The same by part.
        phases: One, or one for each of the recipe's phases.
        teachers: FLOPs of the teachers' forward passes, per pair.
    """

    recipe: PretrainRecipe
    parameters: int
    towers: dict[str, int]
    embed_dim: int
    image_bytes: int
    phases: tuple[Stretch, ...]
    teachers: float

    @property
    def step_flops(self) -> float:
        """FLOPs per pair: forward and backward pass, the loss, teachers, and what is done twice to save memory.

        That is GradCache's second forward pass and the recomputed activations'. The mean over the phases.
        """
        again = bool(self.recipe.micro_batch) + self.recipe.checkpoint_activations
        steps = sum(phase.steps for phase in self.phases)
        networks = sum(
            phase.steps * (phase.count.step + again * phase.count.forward) for phase in self.phases
        )
        return networks / steps + self.loss_flops + self.teachers

    @property
    def loss_flops(self) -> float:
        """FLOPs per pair of the loss and its terms."""
        return loss_flops(self.recipe.batch_size, self.embed_dim) + view_flops(self.recipe)

    @property
    def pairs(self) -> int:
        """Pairs of the whole run, repeats counted."""
        return self.recipe.steps * self.recipe.batch_size

    def memory(self, devices: int) -> dict[str, float]:
        """Bytes on each device, by what they are for: an estimate.

        Weights take 4 bytes a parameter, in bf16 2 more for autocast's copies; gradients 4 and the optimiser's state
        as `MOMENTS` has it a trained parameter; DistributedDataParallel's buckets another 4. Activations are those
        that the counted forward pass saved, at half in bf16, for the rows that a device holds at a time; with
        `checkpoint_activations` they are less than that. To this the libraries add 1 to 2 GB and the allocator's gaps
        some 10 %.
        """
        recipe = self.recipe
        bf16 = recipe.precision != "fp32"
        trained = max(phase.trainable for phase in self.phases)
        share = math.ceil(recipe.batch_size / devices)
        rows = min(recipe.micro_batch or share, share)
        activations = max(phase.count.activations for phase in self.phases) * (0.5 if bf16 else 1)
        captions = recipe.data.captions_per_image
        return {
            "weights": self.parameters * (6.0 if bf16 else 4.0),
            "gradients": trained * (8.0 if devices > 1 else 4.0),
            "optimiser": trained * MOMENTS[recipe.optim.kind],
            "activations": activations * rows,
            # Images of this rank, and the features of all pairs with their gradients.
            "batch": share * self.image_bytes + recipe.batch_size * self.embed_dim * 4 * 2 * (1 + captions),
        }


def make_plan(recipe: PretrainRecipe) -> Plan:
    """Build the recipe's model and count what its steps take; reads no data.

    Raises:
        ValueError: The model cannot be built, or a phase does not fit it.
    """
    encoder = build_encoder(recipe.model, device="cpu")
    # SigLIP's bias comes with the objective; teachers are built below, once each.
    if not isinstance(recipe.loss, DistillationConfig):
        build_objective(recipe.loss, encoder)
    model = encoder.model
    terms = build_terms(recipe.terms, encoder)
    own = sum(parameter.numel() for parameter in terms.parameters())
    image = sum(parameter.numel() for parameter in model.visual.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    if recipe.lora:
        add_adapters(model, recipe.lora)
    stretches = []
    phases = [phase for phase in recipe.phases if phase.step < recipe.steps] or [Phase()]
    ends = [*(phase.step for phase in phases[1:]), recipe.steps]
    size, largest = encoder.image_size, 0
    for phase, end in zip(phases, ends, strict=True):
        apply_lock(model, phase)
        if recipe.lora:
            lock_all_but_adapters(model, recipe.lora)
        set_patch_dropout(model.visual, phase.patch_dropout)
        encoder.set_image_size(as_size(phase.image_size) if phase.image_size else size)
        largest = max(largest, 3 * math.prod(encoder.image_size) * (1 + recipe.views))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        stretches.append(Stretch(end - phase.step, trained + own, count_step(encoder, recipe, terms)))
    teachers = 0.0
    if isinstance(recipe.loss, DistillationConfig):
        for name in recipe.loss.teachers:
            teacher = build_encoder(OpenClipModel(name=name), device="cpu")
            teachers += count_step(teacher, recipe).forward
    decoder = sum(parameter.numel() for parameter in getattr(model, "text_decoder", nn.Module()).parameters())
    towers = {"image tower": image, "text tower": total - image - decoder, "decoder": decoder, "terms": own}
    return Plan(
        recipe,
        total + own,
        {name: count for name, count in towers.items() if count or "tower" in name},
        encoder.embed_dim,
        largest,
        tuple(stretches),
        teachers,
    )


def count_step(encoder: Encoder, recipe: PretrainRecipe, terms: Terms | None = None) -> Count:
    """`count_flops` of an encoder as the trainer wraps it; without the terms for a teacher."""
    context, captions = encoder.tokenize(["a"]).shape[1], recipe.data.captions_per_image
    views = 0 if terms is None else recipe.views
    return count_flops(DualEncoder(encoder, terms), encoder.image_size, context, captions, views)


@dataclass(frozen=True)
class Fleet:
    """So many devices of a kind."""

    name: str
    devices: int
    kind: Kind


def read_fleet(word: str) -> Fleet:
    """Read `8xh100` or, with a price of one's own for a device and hour, `8xh100@2.5`.

    Raises:
        ValueError: Another form, or no such kind.
    """
    body, _, price = word.partition("@")
    number, cross, name = body.partition("x")
    if not (cross and number.isdigit()):
        number, name = "1", body
    try:
        hourly = float(price) if price else None
    except ValueError:
        hourly = math.nan
    if name not in KINDS or int(number) < 1 or (hourly is not None and not hourly >= 0):
        raise ValueError(
            f"--devices {word!r}: expected COUNTxKIND or COUNTxKIND@PRICE, such as 8xh100 or 8xh100@2.5; "
            f"kinds: {', '.join(KINDS)}{nearest(name, KINDS)}"
        )
    kind = KINDS[name]
    return Fleet(word, int(number), kind if hourly is None else Kind(kind.peak, kind.memory, hourly))


def expect(plan: Plan, fleet: Fleet, mfu: float) -> dict[str, float]:
    """Hours, US dollars, pairs a second and bytes on each device of one fleet."""
    rate = fleet.devices * fleet.kind.peak * 1e12 * mfu / plan.step_flops
    hours = plan.pairs / rate / 3600
    return {
        "pairs_per_s": rate,
        "hours": hours,
        "dollars": hours * fleet.devices * fleet.kind.hourly,
        "memory": sum(plan.memory(fleet.devices).values()),
    }


def describe(plan: Plan, fleets: Sequence[Fleet], mfu: float) -> str:
    """The plan as text."""
    recipe = plan.recipe
    phase = plan.phases[-1]
    lines = [
        f"{recipe.run}: {recipe.steps:,} steps of {recipe.batch_size:,} pairs, {plan.pairs:,} pairs",
        f"parameters         {plan.parameters / 1e6:.1f} M ("
        + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in plan.towers.items())
        + ")",
        f"FLOPs per pair     {plan.step_flops / 1e9:.2f} G in a step (forward {phase.count.forward / 1e9:.2f} G"
        + f", loss {plan.loss_flops / 1e9:.3f} G"
        + (f", teachers {plan.teachers / 1e9:.2f} G" if plan.teachers else "")
        + "), counted",
        f"FLOPs of the run   {plan.step_flops * plan.pairs:.3g}",
        f"activations        {phase.count.activations / 1e6:.2f} MB per pair in fp32, counted"
        + (
            " without checkpoint_activations, so memory below is too high"
            if recipe.checkpoint_activations
            else ""
        ),
    ]
    if len(plan.phases) > 1:
        lines.append(
            "phases             "
            + "; ".join(f"{p.steps:,} steps with {p.trainable / 1e6:.1f} M trained" for p in plan.phases)
        )
    head = f"{'devices':<18}{'pairs/s':>10}{'hours':>10}{'US$':>10}{'GB/device':>11}"
    lines += ["", head]
    for fleet in fleets:
        numbers = expect(plan, fleet, mfu)
        gigabytes = numbers["memory"] / 1e9
        lines.append(
            f"{fleet.name:<18}{numbers['pairs_per_s']:>10,.0f}{numbers['hours']:>10,.1f}"
            f"{numbers['dollars']:>10,.0f}{gigabytes:>11.1f}" + advice(plan, fleet, gigabytes)
        )
    parts = plan.memory(fleets[0].devices)
    lines += [
        "",
        f"GB on each of {fleets[0].name}: "
        + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items()),
        f"time = pairs x FLOPs per pair / (devices x peak x MFU), at an MFU of {mfu:g} (--mfu): an estimate, which",
        "the log's own `mfu` replaces after some steps. Prices are rough; KIND@PRICE states yours.",
    ]
    return "\n".join(lines)


def advice(plan: Plan, fleet: Fleet, gigabytes: float) -> str:
    """What stands in the way of a fleet."""
    if plan.recipe.batch_size % fleet.devices:
        return f"  batch_size {plan.recipe.batch_size} cannot be split over {fleet.devices}"
    if gigabytes > 0.9 * fleet.kind.memory:
        return f"  more than {fleet.kind.memory:.0f} GB: set micro_batch, or take more devices"
    return ""


def main(argv: list[str]) -> int:
    """`pairstream pretrain plan RECIPE [--KEY VALUE ...] [--devices 8xh100 ...] [--mfu 0.2]`."""
    words, fleets, mfu = [], [], MFU
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--devices":
            while rest and not rest[0].startswith("-"):
                fleets += [read_fleet(part) for part in rest.pop(0).split(",")]
        elif word == "--mfu":
            mfu = read_share(rest.pop(0) if rest else "nothing")
        else:
            words.append(word)
    if not words or words[0].startswith("-"):
        usage = (
            "usage: pairstream pretrain plan RECIPE [--KEY VALUE ...] [--devices 8xh100 64xa100-80gb@1.8 ...] "
            f"[--mfu {MFU}]\n\nParameters, counted FLOPs, memory, time and cost of a recipe, before anything starts.\n"
            f"RECIPE is a YAML file or one of: {', '.join(recipe_names('pretrain'))}\nkinds of devices: "
            + ", ".join(
                f"{name} ({k.peak:g} TFLOP/s, {k.memory:g} GB, ${k.hourly:g}/h)" for name, k in KINDS.items()
            )
        )
        if not any(word in ("-h", "--help") for word in words):
            raise ValueError(f"which recipe?\n{usage}")
        print(usage)
        return 0
    recipe = load_recipe(PretrainRecipe, "pretrain", words[0], words[1:])
    print(describe(make_plan(recipe), fleets or [read_fleet(word) for word in DEVICES], mfu))
    return 0


def read_share(word: str) -> float:
    """A share of the peak.

    Raises:
        ValueError: Not between 0 and 1.
    """
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ValueError(f"--mfu: expected a share of the peak above 0 and up to 1, got {word}")
    return value
