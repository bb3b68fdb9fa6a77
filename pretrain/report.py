"""What a pretraining run tells afterwards: the model card of a checkpoint and the run's report."""

from __future__ import annotations

from typing import Any

import yaml

from pairstream import __version__
from pairstream.report import Report
from pairstream.run import RunFolder
from pretrain.recipe import PretrainRecipe


def model_card(
    recipe: PretrainRecipe, step: int, samples_seen: int, history: dict[str, dict[str, float]]
) -> str:
    """Markdown for a checkpoint's README.md: recipe, data and the numbers of its step."""
    numbers = history.get(str(step), {})
    table = "".join(f"| {name} | {value:.4g} |\n" for name, value in numbers.items())
    resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    return (
        "---\nlibrary_name: open_clip\ntags: [clip, contrastive, image-text]\n---\n"
        f"# {recipe.run.rstrip('/').rsplit('/', 1)[-1]}, step {step}\n\n"
        f"A dual encoder trained by PairStream {__version__} on {samples_seen:,} pairs (repeats counted) of "
        f"`{recipe.data.names}`.\n\n"
        "```python\nimport open_clip\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH-OF-THIS-FOLDER")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:PATH-OF-THIS-FOLDER")\n```\n\n'
        + (f"| measured at this step | |\n|---|---|\n{table}\n" if table else "")
        + f"## Recipe\n\n```yaml\n{resolved}```\n"
    )


def write_report(folder: RunFolder, recipe: PretrainRecipe, metrics: dict[str, Any]) -> None:
    """Write `report.html` and `report.json` of a finished run."""
    log = folder.read_log()
    report = Report(f"Pretraining: {folder.path.name}", f"{metrics['samples_seen']:,} pairs seen")
    add_training(report, log)
    report.heading("Recipe")
    settings = recipe.model_dump(mode="json")
    flat = [(key, value) for key, value in flatten(settings) if value is not None]
    report.table(["key", "value"], [[key, str(value)] for key, value in flat])
    if metrics["faults"]:
        report.table(
            ["bad samples, by cause", "count"], [[cause, n] for cause, n in metrics["faults"].items()]
        )
    report.write(folder.path)


def add_training(report: Report, log: list[dict[str, Any]]) -> None:
    """Add the headline numbers and the curves of a training log to a report."""
    lines = [record for record in log if record.get("loss") is not None]
    if not lines:
        return
    last = lines[-1]
    report.numbers(
        [
            ("loss", f"{last['loss']:.3f}", "nats"),
            ("pairs seen", f"{last['samples_seen']:,}", f"{last['step']:,} steps"),
            ("samples/s", f"{last['samples_per_s']:.0f}", "all ranks, last lines"),
            ("logit scale", f"{last['logit_scale']:.1f}", "1 / temperature"),
        ]
    )
    report.curves("Loss", {"training": [(r["step"], r["loss"]) for r in lines]}, x="step", y="loss, nats")
    evaluations = [record for record in log if "evaluation" in record]
    recalls: dict[str, list[tuple[float, float]]] = {}
    for record in evaluations:
        for name, value in record["evaluation"].items():
            if "recall@" in name and value is not None:
                recalls.setdefault(name.replace("_", " ").replace("/", ", "), []).append(
                    (record["step"], value)
                )
    if any(len(points) > 1 for points in recalls.values()):
        report.curves("Recall on held-out pairs", recalls, x="step", y="recall")
    report.curves(
        "Gradient norm",
        {"gradient norm": [(r["step"], r["grad_norm"]) for r in lines]},
        x="step",
        y="norm before clipping",
    )


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested dicts with dotted names."""
    if isinstance(value, dict):
        return [
            leaf
            for key, inner in value.items()
            for leaf in flatten(inner, f"{prefix}.{key}" if prefix else key)
        ]
    return [(prefix, value)]
