"""Probes of frozen features: linear by the CLIP paper's protocol, k nearest neighbours, few-shot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer

from pretrain.encoder import Encoder
from retrieval.classification import checked_labels

COARSE = tuple(10.0**power for power in range(-6, 7, 2))  # where the search for the L2 weight starts
STEPS = 8  # steps a decade at its end: 96 over twelve decades, as in the paper
VALIDATION = 0.2  # share of the training pictures that choose the L2 weight where no split is given


@dataclass(frozen=True)
class Probe:
    """A linear classifier of features.

    Attributes:
        weight: float32 `(classes, dim)`.
        bias: float32 `(classes,)`.
        l2: Weight of the L2 term that it was fitted with.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    l2: float

    def accuracy(self, rows: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of right predictions."""
        return float((F.linear(rows, self.weight, self.bias).argmax(1) == labels).double().mean())


def fit_probe(
    rows: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    l2: float,
    *,
    start: Probe | None = None,
    iterations: int = 1000,
) -> Probe:
    """Logistic regression by L-BFGS: summed cross-entropy + l2 / 2 * |weight|², the bias left free.

    That is scikit-learn's LogisticRegression with C = 1 / l2. It runs wherever the rows are.

    Args:
        rows: float32 `(n, dim)`.
        labels: int64 `(n,)`.
        classes: Number of classes.
        l2: Weight of the L2 term.
        start: A probe to start from, such as that of the weight before.
        iterations: At most so many steps.

    Returns:
        The probe.
    """
    x = rows.float()
    if start is None:
        weight, bias = x.new_zeros((classes, x.shape[1])), x.new_zeros(classes)
    else:
        weight, bias = start.weight.clone(), start.bias.clone()
    weight.requires_grad_()
    bias.requires_grad_()
    # The mean, not the sum, keeps the gradient's size apart from the number of rows.
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + l2 / (2 * len(x)) * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    return Probe(weight.detach(), bias.detach(), l2)


def linear_probe(
    train_rows: Any,
    train_labels: Any,
    test_rows: Any,
    test_labels: Any,
    classes: int,
    *,
    val_rows: Any = None,
    val_labels: Any = None,
    iterations: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Linear probe by the CLIP paper's protocol: choose the L2 weight on a validation split, refit on all.

    The weight is searched from 1e-6 to 1e6: first every second decade, then with half the step around the best,
    down to eight steps a decade.

    Args:
        train_rows: `(n, dim)` features, as they are: the paper takes those before the projection.
        train_labels: `(n,)` class numbers.
        test_rows: `(m, dim)`.
        test_labels: `(m,)`.
        classes: Number of classes.
        val_rows: The set's own validation split; a fifth of the training rows when None.
        val_labels: Its labels.
        iterations: L-BFGS steps of a fit at most; the paper's is 1,000.
        seed: Of the drawn validation split.

    Returns:
        `accuracy` and `mean_per_class_recall` on the test rows, `l2`, `val_accuracy`, `at_edge` (whether the
        best weight lies at an end of the range), `searched` (accuracy by weight).

    Raises:
        ValueError: Labels outside the classes, lengths or widths that differ, NaN or infinity, fewer than two
            training rows.

    Reference:
        Radford et al. 2021, appendix A.3.
    """
    x, y = checked(train_rows, train_labels, classes, "train")
    test, target = checked(test_rows, test_labels, classes, "test", width=x.shape[1])
    if len(x) < 2:
        raise ValueError(f"expected two or more training rows, got {len(x)}")
    if (val_rows is None) != (val_labels is None):
        raise ValueError("give val_rows and val_labels together, or neither")
    if val_rows is None:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        cut = max(1, int(len(x) * VALIDATION))
        (vx, vy), (fx, fy) = (x[order[:cut]], y[order[:cut]]), (x[order[cut:]], y[order[cut:]])
        everything, labels = x, y
    else:
        vx, vy = checked(val_rows, val_labels, classes, "val", width=x.shape[1])
        fx, fy, everything, labels = x, y, torch.cat([x, vx]), torch.cat([y, vy])
    probe: Probe | None = None

    def score(l2: float) -> float:
        nonlocal probe
        probe = fit_probe(fx, fy, classes, l2, start=probe, iterations=iterations)
        return probe.accuracy(vx, vy)

    l2, searched = search_weight(score)
    final = fit_probe(everything, labels, classes, l2, iterations=iterations)
    right = F.linear(test, final.weight, final.bias).argmax(1) == target
    counts = torch.bincount(target, minlength=classes)
    hits = torch.bincount(target, right.double(), classes)
    return {
        "accuracy": float(right.double().mean()),
        "mean_per_class_recall": float((hits[counts > 0] / counts[counts > 0]).mean()),
        "l2": l2,
        "val_accuracy": searched[l2],
        "at_edge": l2 in (min(COARSE), max(COARSE)),
        "searched": {f"{weight:.3g}": value for weight, value in sorted(searched.items())},
    }


def search_weight(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The weight of the best score, the larger one of equals, from coarse to fine steps.

    Args:
        score: Accuracy of a weight.

    Returns:
        The weight, and all scores that were looked at.
    """
    found = {weight: score(weight) for weight in reversed(COARSE)}
    step = 2.0  # decades
    while step > 1 / STEPS:
        step /= 2
        best = max(found, key=lambda weight: (found[weight], weight))
        for weight in (best * 10**step, best / 10**step):
            known = any(abs(np.log10(weight / other)) < 1e-6 for other in found)
            if not known and COARSE[0] * 0.999 <= weight <= COARSE[-1] * 1.001:
                found[weight] = score(weight)
    best = max(found, key=lambda weight: (found[weight], weight))
    return best, found


def knn_probe(
    train_rows: Any,
    train_labels: Any,
    test_rows: Any,
    test_labels: Any,
    classes: int,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    block: int = 1024,
) -> dict[str, float]:
    """Accuracy of k nearest neighbours by cosine.

    Args:
        train_rows: `(n, dim)`; normalised here.
        train_labels: `(n,)`.
        test_rows: `(m, dim)`.
        test_labels: `(m,)`.
        classes: Number of classes.
        k: Neighbours.
        temperature: Neighbours vote with exp(cosine / temperature); None gives each one vote.
        block: Test rows at a time.

    Returns:
        `accuracy`; classes with equal votes share the prediction.

    Raises:
        ValueError: k below 1 or above the training rows, and as `linear_probe`.

    Reference:
        Wu et al. 2018 (weighted votes, temperature 0.07), as DINO evaluates.
    """
    x, y = checked(train_rows, train_labels, classes, "train")
    test, target = checked(test_rows, test_labels, classes, "test", width=x.shape[1])
    if not 1 <= k <= len(x):
        raise ValueError(f"k must lie between 1 and the {len(x)} training rows, got {k}")
    x, hits = F.normalize(x, dim=1), 0.0
    for start in range(0, len(test), block):
        scores, near = (F.normalize(test[start : start + block], dim=1) @ x.T).topk(k, dim=1)
        weight = torch.ones_like(scores) if temperature is None else torch.exp(scores / temperature)
        votes = torch.zeros((len(near), classes), dtype=torch.float64, device=x.device)
        votes.scatter_add_(1, y[near], weight.double())
        first = votes == votes.amax(1, keepdim=True)
        mine = target[start : start + block]
        hits += float((first[torch.arange(len(mine)), mine] / first.sum(1)).sum())
    return {"accuracy": hits / len(test), "k": k}


def few_shot_probe(
    train_rows: Any,
    train_labels: Any,
    test_rows: Any,
    test_labels: Any,
    classes: int,
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    draws: int = 5,
    l2: float = 1.0,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Linear probes on a few pictures of each class, over several draws.

    Args:
        train_rows: `(n, dim)`.
        train_labels: `(n,)`.
        test_rows: `(m, dim)`.
        test_labels: `(m,)`.
        classes: Number of classes.
        shots: Pictures of each class.
        draws: Draws of them.
        l2: Weight of the L2 term; a few pictures leave none to choose it on.
        seed: Of the draws.

    Returns:
        `{shots: {accuracy, std, draws}}`; std is over the draws.

    Raises:
        ValueError: A class with fewer pictures than asked for, and as `linear_probe`.
    """
    x, y = checked(train_rows, train_labels, classes, "train")
    test, target = checked(test_rows, test_labels, classes, "test", width=x.shape[1])
    counts = torch.bincount(y, minlength=classes)
    if int(counts.min()) < max(shots):
        raise ValueError(
            f"class {int(counts.argmin())} has {int(counts.min())} training rows, {max(shots)} shots need more"
        )
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for count in shots:
        found = []
        for _ in range(draws):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            chosen = torch.cat([order[y[order] == label][:count] for label in range(classes)])
            found.append(fit_probe(x[chosen], y[chosen], classes, l2).accuracy(test, target))
        result[str(count)] = {
            "accuracy": float(np.mean(found)),
            "std": float(np.std(found, ddof=1)) if draws > 1 else 0.0,
            "draws": draws,
        }
    return result


@torch.no_grad()
def image_features(encoder: Encoder, images: torch.Tensor) -> torch.Tensor:
    """Features of pictures before the projection where the tower has one apart, else its embeddings.

    The paper's linear probe takes the pooled output of a ViT before `proj`. A ResNet's projection is part of its
    attention pooling, and a timm tower's is its head: a timm tower gives its trunk's pooled output.

    Args:
        encoder: The model.
        images: uint8 `(b, 3, h, w)`.

    Returns:
        float32 `(b, width)`, not normalised, on the encoder's device.
    """
    visual: Any = encoder.model.visual
    encoder.model.eval()
    pixels = encoder.pixels(images)
    if isinstance(encoder.model.visual, VisionTransformer) and visual.proj is not None:
        projection = visual.proj
        visual.proj = None
        try:
            return visual(pixels).float()
        finally:
            visual.proj = projection
    if hasattr(visual, "trunk"):
        return visual.trunk(pixels).float()
    return encoder.model.encode_image(pixels).float()


def checked(
    rows: Any, labels: Any, classes: int, name: str, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels that fit each other, and other features of a width.

    Raises:
        ValueError: They do not, or values are not finite.
    """
    x = rows if isinstance(rows, torch.Tensor) else torch.from_numpy(np.array(rows, dtype=np.float32))
    if x.ndim != 2 or not len(x):
        raise ValueError(
            f"{name} rows: expected (rows, dimensions) with at least one row, got {tuple(x.shape)}"
        )
    if width not in (None, x.shape[1]):
        raise ValueError(f"{name} rows have {x.shape[1]} dimensions, the training rows {width}")
    if not torch.isfinite(x).all():
        raise ValueError(
            f"{name} rows: row {int((~torch.isfinite(x).all(1)).nonzero()[0])} has NaN or infinity"
        )
    return x.float(), checked_labels(labels, classes, len(x)).to(x.device)
