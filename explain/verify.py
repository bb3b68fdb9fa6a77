"""`pairstream explain verify`: the table that says whether heatmaps are true, and its gates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from explain import faithful
from explain.gradients import chefer, resize_map
from explain.layout import tower_layout
from explain.methods import check_method, default_method, heatmaps
from explain.randomise import cascade
from explain.targets import PairTarget, mean_colour, score
from explain.trials import Trials, make_trials, scene_samples, shard_samples
from pairstream.progress import ProgressBar
from pretrain.encoder import Encoder

BATCH = 32  # trials at a time
STAGES = 4
RANDOM, LAST_LAYER = "random", "chefer_last_layer"


class Gate(NamedTuple):
    """One condition on the default method's numbers."""

    number: str
    words: str
    holds: Callable[[float], bool]


GATES = (
    Gate("target_over_distractor", "at least 0.95", lambda value: value >= 0.95),
    Gate("two_text_spearman", "under 0.6", lambda value: value < 0.6),
    Gate("random_weights_spearman", "between -0.2 and 0.2", lambda value: abs(value) < 0.2),
    Gate("gain_over_random", "at least 0.3", lambda value: value >= 0.3),
)


def random_map(target: PairTarget, images: Tensor, *, seed: int = 0) -> Tensor:
    """Heatmaps of nothing: 8 x 8 random numbers each."""
    return torch.rand(len(images), 8, 8, generator=torch.Generator().manual_seed(seed))


def maps(encoder: Encoder, trials: Trials, method: str, *, flipped: bool = False) -> Tensor:
    """Maps of all trials, in the method's own resolution, `(n, rows, columns)`."""
    rows = encoder.encode_texts(trials.texts)
    images = trials.images.flip(-1) if flipped else trials.images
    found = []
    for number, part in enumerate(torch.arange(len(images)).split(BATCH)):
        target = PairTarget(encoder, rows[part.to(rows.device)])
        if method == RANDOM:
            found.append(random_map(target, images[part], seed=number + 1000 * flipped))
        elif method == LAST_LAYER:
            found.append(chefer(target, encoder.pixels(images[part]), layers=1).cpu())
        else:
            found.append(heatmaps(target, images[part], method))
    return torch.cat(found)


def measure(encoder: Encoder, trials: Trials, method: str, randomised: Sequence[Encoder]) -> dict[str, Any]:
    """All numbers of one method.

    Args:
        encoder: The model.
        trials: What to explain.
        method: Its name.
        randomised: The model with more and more random weights; see `explain.randomise.cascade`.

    Returns:
        `target_over_distractor`, `pointing`, `energy_in_box`, `insertion`, `deletion` and their difference
        `insertion_minus_deletion` (mean cosines), `span` (the cosine of the picture less that of a blank one),
        `two_text_spearman`, `flip_spearman`, `cascade` (one number a stage), `random_weights_spearman` (its last),
        `empty` (share of constant maps).
    """
    native = maps(encoder, trials, method)
    size = encoder.image_size
    heat = resize_map(native, size)
    rows = encoder.encode_texts(trials.texts)
    curves = []
    for part in torch.arange(len(heat)).split(BATCH):
        target = PairTarget(encoder, rows[part.to(rows.device)])
        pixels = encoder.pixels(trials.images[part])
        curves.append(torch.stack(faithful.insertion_deletion(target, pixels, heat[part])))
    inserted, deleted, span = torch.cat(curves, dim=1).mean(1).tolist()
    stages = [float(faithful.spearman(native, maps(each, trials, method)).mean()) for each in randomised]
    flipped = maps(encoder, trials, method, flipped=True).flip(-1)
    return {
        "target_over_distractor": mean(
            faithful.target_over_distractor(heat, trials.target, trials.distractor)
        ),
        "pointing": mean(faithful.pointing(heat, trials.boxes)),
        "energy_in_box": mean(faithful.energy_in_box(heat, trials.boxes)),
        "insertion": inserted,
        "deletion": deleted,
        "insertion_minus_deletion": inserted - deleted,
        "span": span,
        "two_text_spearman": mean(faithful.spearman(native[0::2], native[1::2])),
        "flip_spearman": mean(faithful.spearman(native, flipped)),
        "cascade": stages,
        "random_weights_spearman": stages[-1],
        "empty": mean((native.amax((1, 2)) == native.amin((1, 2))).double()),
    }


def mean(values: Tensor) -> float:
    return float(values.double().mean())


def completeness(encoder: Encoder, trials: Trials, *, count: int = 64) -> dict[str, float]:
    """Whether integrated gradients add up to the difference of the scores.

    Returns:
        `error`: mean absolute error as a share of the mean absolute difference; `trials`.
    """
    rows = encoder.encode_texts(trials.texts[:count])
    wrong, whole = [], []
    for part in torch.arange(min(count, len(trials.texts))).split(BATCH):
        target = PairTarget(encoder, rows[part.to(rows.device)])
        pixels = encoder.pixels(trials.images[part])
        with torch.no_grad():
            blank = mean_colour(pixels).expand_as(pixels)
            difference = (score(target, pixels) - score(target, blank)).double().cpu()
        total = heatmaps(target, trials.images[part], "integrated_gradients").double().sum((1, 2))
        wrong.append((total - difference).abs())
        whole.append(difference.abs())
    return {
        "error": float(torch.cat(wrong).mean() / torch.cat(whole).mean()),
        "trials": float(min(count, len(trials.texts))),
    }


def judge(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """Each gate with the value it saw and whether it holds."""
    return [
        {
            "gate": gate.number,
            "limit": gate.words,
            "value": numbers[gate.number],
            "holds": gate.holds(numbers[gate.number]),
        }
        for gate in GATES
    ]


def verify_encoder(
    encoder: Encoder,
    *,
    data: str | Sequence[str] | None = None,
    pictures: int = 100,
    method: str = "auto",
    methods: Sequence[str] = (),
    seed: int = 0,
    show: bool = False,
) -> dict[str, Any]:
    """Hold the heatmaps of a model against the truth.

    Args:
        encoder: The model.
        data: Shards whose JSON has `objects` with masks; fresh scenes when None.
        pictures: So many, with two texts each.
        method: The one that the gates are for; `auto` is the model's default.
        methods: Others to be measured beside it; a selection when empty.
        seed: Of fresh scenes and random weights.
        show: Print progress.

    Returns:
        `model`, `method`, `trials`, `tried`, `unknown`, `box_area` (what energy-in-box is by chance), `methods` (the
        numbers of each), `completeness`, `gates`, `passed`; `rollout_fails` where rollout was measured: a set of trials
        on which a map that ignores the text passes proves nothing, so then `passed` is false.

    Raises:
        ValueError: No such method, or no picture that the model knows.
    """
    if pictures < 2:
        raise ValueError(f"pictures {pictures}: expected at least 2")
    vit = tower_layout(encoder).kind == "vit"
    method = default_method(encoder) if method == "auto" else method
    for name in (method, *methods):
        if name not in (RANDOM, LAST_LAYER):
            check_method(name)
    chosen = list(methods) or ([LAST_LAYER, "rollout", "gradcam"] if vit else []) + ["occlusion"]
    names = list(dict.fromkeys([RANDOM, method, *chosen]))
    samples = (
        scene_samples(20 * pictures, max(encoder.image_size), seed) if data is None else shard_samples(data)
    )
    trials = make_trials(encoder, samples, pictures)
    randomised = []
    for _, changed in cascade(encoder, STAGES, seed):
        randomised.append(freeze_copy(changed))
    found: dict[str, Any] = {}
    with ProgressBar("verify", len(names), show=show) as bar:
        for name in names:
            found[name] = measure(encoder, trials, name, randomised)
            bar.advance(note=name)
    for numbers in found.values():
        gain = numbers["insertion_minus_deletion"] - found[RANDOM]["insertion_minus_deletion"]
        numbers["gain_over_random"] = gain
        # Beside it, since cosines of some models go from 0.1 to 0.3 at all. No gate: where a blank picture is almost
        # as like the text as the picture is, any gain is many times that difference.
        numbers["gain_of_span"] = gain / numbers["span"] if numbers["span"] > 0 else 0.0
        numbers["passed"] = all(each["holds"] for each in judge(numbers))
    gates = judge(found[method])
    result: dict[str, Any] = {
        "model": encoder.name,
        "method": method,
        "data": "scenes (val)" if data is None else data,
        "trials": len(trials.texts),
        "tried": trials.tried,
        "unknown": trials.unknown,
        "box_area": mean(trials.boxes.double()),
        "methods": found,
        "completeness": completeness(encoder, trials),
        "gates": gates,
        "passed": all(each["holds"] for each in gates),
    }
    if "rollout" in found and method != "rollout":
        result["rollout_fails"] = not found["rollout"]["passed"]
        result["passed"] = result["passed"] and result["rollout_fails"]
    return result


def freeze_copy(encoder: Encoder) -> Encoder:
    """A copy that later stages of the cascade do not change."""
    kept = copy.copy(encoder)
    kept.model = copy.deepcopy(encoder.model)
    return kept
