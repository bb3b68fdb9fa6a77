"""`pairstream explain verify`: the table that says whether heatmaps are true, and its gates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from explain import faithful
from explain.gradients import chefer, resize_map
from explain.layout import tower_layout
from explain.methods import check_method, default_method, heatmaps
from explain.randomise import cascade
from explain.targets import PairTarget, Target, mean_colour, score
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


class Asked(Protocol):
    """What is explained: trials, and the score that each is about.

    Attributes:
        encoder: Whose image tower sees.
        trials: Pictures with their masks; neighbours (2i, 2i + 1) are two questions about one picture.
        batch: Trials that one target can be about.
    """

    encoder: Encoder
    trials: Trials
    batch: int

    def target(self, encoder: Encoder, part: Tensor) -> Target:
        """The score of some trials (int64, at most `batch`), seen by another encoder."""
        ...


class PairsAsked:
    """Trials whose score is the cosine of picture and text."""

    batch = BATCH

    def __init__(self, encoder: Encoder, trials: Trials):
        self.encoder, self.trials = encoder, trials
        self.rows = encoder.encode_texts(trials.texts)

    def target(self, encoder: Encoder, part: Tensor) -> Target:
        return PairTarget(encoder, self.rows[part.to(self.rows.device)])


def random_map(images: Tensor, seed: int) -> Tensor:
    """Heatmaps of nothing: 8 x 8 random numbers each."""
    return torch.rand(len(images), 8, 8, generator=torch.Generator().manual_seed(seed))


def maps(asked: Asked, method: str, *, encoder: Encoder | None = None, flipped: bool = False) -> Tensor:
    """Maps of all trials, in the method's own resolution, `(n, rows, columns)`; by another encoder where given."""
    encoder = asked.encoder if encoder is None else encoder
    images = asked.trials.images.flip(-1) if flipped else asked.trials.images
    found = []
    for number, part in enumerate(torch.arange(len(images)).split(asked.batch)):
        if method == RANDOM:
            found.append(random_map(images[part], number + 1000 * flipped))
            continue
        target = asked.target(encoder, part)
        if method == LAST_LAYER:
            found.append(chefer(target, encoder.pixels(images[part]), layers=1).cpu())
        else:
            found.append(heatmaps(target, images[part], method))
    return torch.cat(found)


def measure(asked: Asked, method: str, randomised: Sequence[Encoder]) -> dict[str, Any]:
    """All numbers of one method.

    Args:
        asked: What to explain.
        method: Its name.
        randomised: The encoder with more and more random weights; see `explain.randomise.cascade`.

    Returns:
        `target_over_distractor`, `pointing`, `energy_in_box`, `insertion`, `deletion` and their difference
        `insertion_minus_deletion` (mean scores), `span` (the score of the picture less that of a blank one),
        `two_text_spearman`, `flip_spearman`, `cascade` (one number a stage), `random_weights_spearman` (its last),
        `empty` (share of constant maps).
    """
    encoder, trials = asked.encoder, asked.trials
    native = maps(asked, method)
    heat = resize_map(native, encoder.image_size)
    curves = []
    for part in torch.arange(len(heat)).split(asked.batch):
        pixels = encoder.pixels(trials.images[part])
        curves.append(
            torch.stack(faithful.insertion_deletion(asked.target(encoder, part), pixels, heat[part]))
        )
    inserted, deleted, span = torch.cat(curves, dim=1).mean(1).tolist()
    stages = [
        float(faithful.spearman(native, maps(asked, method, encoder=each)).mean()) for each in randomised
    ]
    flipped = maps(asked, method, flipped=True).flip(-1)
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


def completeness(asked: Asked, *, count: int = 64) -> dict[str, float]:
    """Whether integrated gradients add up to the difference of the scores.

    Returns:
        `error`: mean absolute error as a share of the mean absolute difference; `trials`.
    """
    encoder, images = asked.encoder, asked.trials.images[:count]
    wrong, whole = [], []
    for part in torch.arange(len(images)).split(asked.batch):
        target = asked.target(encoder, part)
        pixels = encoder.pixels(images[part])
        with torch.no_grad():
            blank = mean_colour(pixels).expand_as(pixels)
            difference = (score(target, pixels) - score(target, blank)).double().cpu()
        total = heatmaps(target, images[part], "integrated_gradients").double().sum((1, 2))
        wrong.append((total - difference).abs())
        whole.append(difference.abs())
    return {
        "error": float(torch.cat(wrong).mean() / torch.cat(whole).mean()),
        "trials": float(len(images)),
    }


def judge(numbers: dict[str, Any], gates: Sequence[Gate] = GATES) -> list[dict[str, Any]]:
    """Each gate with the value it saw and whether it holds."""
    return [
        {
            "gate": gate.number,
            "limit": gate.words,
            "value": numbers[gate.number],
            "holds": gate.holds(numbers[gate.number]),
        }
        for gate in gates
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
    check_wishes(pictures, method, methods)
    samples = (
        scene_samples(20 * pictures, max(encoder.image_size), seed) if data is None else shard_samples(data)
    )
    asked = PairsAsked(encoder, make_trials(encoder, samples, pictures))
    result = hold(asked, GATES, method=method, methods=methods, seed=seed, show=show)
    return {"model": encoder.name, "data": "scenes (val)" if data is None else data, **result}


def check_wishes(pictures: int, method: str, methods: Sequence[str]) -> None:
    """Refuse what cannot be measured before anything is.

    Raises:
        ValueError: Too few pictures, or no such method.
    """
    if pictures < 2:
        raise ValueError(f"pictures {pictures}: expected at least 2")
    for name in (method, *methods):
        if name not in ("auto", RANDOM, LAST_LAYER):
            check_method(name)


def hold(
    asked: Asked,
    gates: Sequence[Gate],
    *,
    method: str = "auto",
    methods: Sequence[str] = (),
    slow: Sequence[str] = ("occlusion",),
    seed: int = 0,
    show: bool = False,
    complete: int = 64,
) -> dict[str, Any]:
    """Measure methods on trials and judge one of them.

    Args:
        asked: What to explain.
        gates: What the method is held to.
        method: The one that the gates are for; `auto` is the tower's default.
        methods: Others beside it; when empty, on a ViT Chefer's last layer, rollout and Grad-CAM, and `slow`.
        slow: See there.
        seed: Of random weights.
        show: Print progress.
        complete: Trials on which integrated gradients are added up.

    Returns:
        What `verify_encoder` says, without `model` and `data`.
    """
    encoder, trials = asked.encoder, asked.trials
    vit = tower_layout(encoder).kind == "vit"
    method = default_method(encoder) if method == "auto" else method
    chosen = methods or (*((LAST_LAYER, "rollout", "gradcam") if vit else ()), *slow)
    names = list(dict.fromkeys([RANDOM, method, *chosen]))
    randomised = [freeze_copy(changed) for _, changed in cascade(encoder, STAGES, seed)]
    found: dict[str, Any] = {}
    with ProgressBar("verify", len(names), show=show) as bar:
        for name in names:
            found[name] = measure(asked, name, randomised)
            bar.advance(note=name)
    for numbers in found.values():
        gain = numbers["insertion_minus_deletion"] - found[RANDOM]["insertion_minus_deletion"]
        numbers["gain_over_random"] = gain
        # Beside it, since cosines of some models go from 0.1 to 0.3 at all. No gate: where a blank picture is almost
        # as like the text as the picture is, any gain is many times that difference.
        numbers["gain_of_span"] = gain / numbers["span"] if numbers["span"] > 0 else 0.0
        numbers["passed"] = all(each["holds"] for each in judge(numbers, gates))
    judged = judge(found[method], gates)
    result: dict[str, Any] = {
        "method": method,
        "trials": len(trials.texts),
        "tried": trials.tried,
        "unknown": trials.unknown,
        "box_area": mean(trials.boxes.double()),
        "methods": found,
        "completeness": completeness(asked, count=complete),
        "gates": judged,
        "passed": all(each["holds"] for each in judged),
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
