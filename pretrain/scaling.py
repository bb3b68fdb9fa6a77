"""`pairstream pretrain scaling RUN RUN ...`: a power law through several runs, and how far it can be trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
import yaml

from pairstream.atomic import write_text
from pairstream.run import RunFolder

Axis = Literal["samples", "flops", "parameters", "pairs"]
LABELS: dict[Axis, str] = {
    "samples": "pairs seen",
    "flops": "FLOPs",
    "parameters": "parameters",
    "pairs": "distinct pairs",
}
TAIL = 0.1
"""Share of a run's last log lines whose mean is its loss: one line alone is of few batches."""


@dataclass(frozen=True)
class PowerLaw:
    """`y = floor + scale * x ** -exponent`.

    Attributes:
        floor: What no x goes below; 0 where fewer than four points could not tell.
        spread: Least and greatest exponent when each point in turn is left out; None for fewer than four points.
    """

    floor: float
    scale: float
    exponent: float
    spread: tuple[float, float] | None = None

    def __call__(self, x: Any) -> Any:
        """The law's y at x."""
        return self.floor + self.scale * np.asarray(x, dtype=float) ** -self.exponent


def fit_power_law(x: Sequence[float], y: Sequence[float], *, floor: bool | None = None) -> PowerLaw:
    """Fit a power law, with a floor where there are points enough.

    Least squares of log(y - floor) against log x, the floor by search: for each floor the rest is a straight line.
    Residuals are weighed by (y - floor) / y, which makes them relative errors of y, so that no floor close to the
    lowest point wins by stretching its logarithm. Three unknowns want many points over a wide range: look at
    `spread` before drawing the line on.

    Args:
        x: Positive, at least two different values.
        y: Positive.
        floor: Whether to fit one; None does from four points on.

    Returns:
        The law.

    Raises:
        ValueError: Too few points, or values that have no logarithm.

    Reference:
        The form is Hoffmann et al. 2022 (arXiv:2203.15556), one variable at a time; for CLIP, Cherti et al. 2023
        (arXiv:2212.07143) fit it without a floor.
    """
    across, upward = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(across) != len(upward) or len(np.unique(across)) < 2:
        raise ValueError(f"a power law needs at least two different x, got x {list(x)} and y {list(y)}")
    if not (np.all(across > 0) and np.all(upward > 0) and np.all(np.isfinite(across * upward))):
        raise ValueError(f"a power law needs positive finite numbers, got x {list(x)} and y {list(y)}")
    if floor is None:
        floor = len(across) >= 4
    law = fit_with_floor(across, upward) if floor else fit_line(across, upward, 0.0)[0]
    if len(across) < 4:
        return law
    exponents = []
    for left_out in range(len(across)):
        rest = np.arange(len(across)) != left_out
        if len(np.unique(across[rest])) > 1:
            fitted = fit_with_floor if floor else lambda a, b: fit_line(a, b, 0.0)[0]
            exponents.append(fitted(across[rest], upward[rest]).exponent)
    return PowerLaw(law.floor, law.scale, law.exponent, (min(exponents), max(exponents)))


def fit_line(x: np.ndarray, y: np.ndarray, floor: float) -> tuple[PowerLaw, float]:
    """The law of a given floor, and its squared error."""
    weights = (y - floor) / y
    design = np.stack([np.ones_like(x), -np.log(x)], axis=1) * weights[:, None]
    (logarithm, exponent), *_ = np.linalg.lstsq(design, np.log(y - floor) * weights, rcond=None)
    law = PowerLaw(floor, float(np.exp(logarithm)), float(exponent))
    return law, float(np.sum(((law(x) - y) / y) ** 2))


def fit_with_floor(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    """The law of the best floor from 0 up to the lowest point: a grid, then finer ones around its best."""
    low, high = 0.0, float(y.min()) * (1 - 1e-6)
    best: tuple[PowerLaw, float] | None = None
    for _ in range(6):
        floors = np.linspace(low, high, 41)
        fits = [fit_line(x, y, float(floor)) for floor in floors]
        number = int(np.argmin([error for _, error in fits]))
        if best is None or fits[number][1] <= best[1]:
            best = fits[number]
        low, high = float(floors[max(number - 1, 0)]), float(floors[min(number + 1, 40)])
    assert best is not None, "there are floors"
    return best[0]


@dataclass(frozen=True)
class Point:
    """One run's part in a fit."""

    run: str
    x: float
    y: float
    comparable: tuple[Any, ...]
    """Batch size and loss: a contrastive loss of other negatives is another quantity."""


def read_point(folder: Path, x: Axis, y: str) -> Point:
    """What one run's log says.

    Args:
        folder: A run folder of `pretrain`.
        x: The horizontal axis.
        y: `loss`, or the name of an evaluation's number, of which 1 - value is taken: an error goes down.

    Raises:
        FileNotFoundError: No log there.
        ValueError: The log does not have it.
    """
    run = RunFolder(folder, writes=False)
    if not run.log_path.is_file():
        raise FileNotFoundError(
            f"{folder}: no log.jsonl there: expected a run folder of `pairstream pretrain`"
        )
    log = run.read_log()
    lines = [record for record in log if record.get("loss") is not None]
    if not lines:
        raise ValueError(f"{run.log_path}: no line with a loss: the run has not come to its first log line")
    last = lines[-1]
    if y == "loss":
        tail = lines[-max(1, round(len(lines) * TAIL)) :]
        value = float(np.mean([record["loss"] for record in tail]))
    else:
        found = [record for record in log if y in (record.get("evaluation") or {})]
        if not found:
            names = sorted({name for record in log for name in record.get("evaluation") or {}})
            raise ValueError(
                f"{run.log_path}: no evaluation has {y!r}: expected 'loss' or one of {', '.join(names) or '(none)'}"
            )
        last = found[-1]
        value = 1 - float(last["evaluation"][y])
    recipe = yaml.safe_load((folder / "recipe.resolved.yaml").read_text(encoding="utf-8"))
    comparable = (recipe["batch_size"], recipe["loss"]["kind"]) if y == "loss" else ()
    return Point(folder.name, read_axis(run, x, last["samples_seen"], lines), value, comparable)


def read_axis(run: RunFolder, x: Axis, samples: int, lines: list[dict[str, Any]]) -> float:
    """The horizontal place of a run after so many samples."""
    if x == "samples":
        return float(samples)
    if x == "flops":
        per_pair = [record["flops_per_pair"] for record in lines if record.get("flops_per_pair")]
        if not per_pair:
            raise ValueError(f"{run.log_path}: no line has flops_per_pair; take --x samples")
        return samples * float(np.mean(per_pair))
    path = run.path / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if x not in metrics:
        raise ValueError(f"{path}: does not have {x!r}: the run has not come to its end; take --x samples")
    return float(metrics[x])


def scaling(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    x: Axis = "samples",
    y: str = "loss",
    floor: bool | None = None,
    out: Path = Path("scaling"),
) -> PowerLaw:
    """Fit a power law through the ends of several runs; print a table, write scaling.json and a plot.

    Args:
        runs: Run folders; four or more for a floor and a spread.
        x: The horizontal axis: pairs seen, FLOPs, parameters, or distinct pairs of the set.
        y: `loss`, or an evaluation's number by name, such as `image_to_text/recall@1`, of which 1 - value is taken.
        floor: Fit what no x goes below; by default from four runs on.
        out: Folder for scaling.json and scaling.svg.
    """
    points = sorted((read_point(run, x, y) for run in runs), key=lambda point: point.x)
    kinds = {point.comparable for point in points}
    if len(kinds) > 1:
        raise ValueError(
            f"these runs have losses that cannot be compared (batch size and kind: {sorted(kinds)}): a contrastive "
            "loss counts its negatives. Give --y with an evaluation's number."
        )
    law = fit_power_law([point.x for point in points], [point.y for point in points], floor=floor)
    label = "loss" if y == "loss" else f"1 - {y}"
    print(f"{'run':<28}{LABELS[x]:>14}{label:>28}{'fit':>10}{'off by':>9}")
    for point in points:
        fitted = float(law(point.x))
        print(
            f"{point.run[:27]:<28}{point.x:>14.4g}{point.y:>28.4f}{fitted:>10.4f}"
            f"{100 * (fitted / point.y - 1):>8.1f}%"
        )
    spread = f" (leaving out one run: {law.spread[0]:.3f} to {law.spread[1]:.3f})" if law.spread else ""
    print(f"\n{label} = {law.floor:.4g} + {law.scale:.4g} * ({LABELS[x]}) ^ -{law.exponent:.4f}{spread}")
    ahead = 10 * points[-1].x
    print(f"drawn on to ten times the largest, {ahead:.3g}: {float(law(ahead)):.4f}")
    if law.spread is None:
        print("fewer than four runs: no floor, and nothing tells how far the exponent can be trusted")
    write_result(out, law, points, LABELS[x], label)
    print(f"wrote {out / 'scaling.json'} and {out / 'scaling.svg'}")
    return law


def write_result(out: Path, law: PowerLaw, points: Sequence[Point], x: str, y: str) -> None:
    """Write the numbers and a plot with logarithmic axes."""
    from matplotlib.figure import Figure

    content = {
        "x": x,
        "y": y,
        "floor": law.floor,
        "scale": law.scale,
        "exponent": law.exponent,
        "spread": law.spread,
        "runs": [{"run": p.run, "x": p.x, "y": p.y, "fit": float(law(p.x))} for p in points],
    }
    write_text(out / "scaling.json", json.dumps(content, indent=2) + "\n")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    line = np.geomspace(points[0].x, 10 * points[-1].x, 200)
    label = f"{law.floor:.3g} + {law.scale:.3g} x^-{law.exponent:.3f}"
    axes.plot(line, law(line), label=label)
    axes.plot([point.x for point in points], [point.y for point in points], "o", label="runs")
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.legend()
    figure.savefig(out / "scaling.svg")


def main(argv: list[str]) -> int:
    """The command."""
    tyro.cli(scaling, args=argv, prog="pairstream pretrain scaling")
    return 0
