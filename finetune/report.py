"""The report of a fine-tuning run: numbers beside their baselines, curves, and pictures with what was written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.recipe import FinetuneRecipe
from finetune.tasks import Row, TaskKind
from pairstream.confusion import confusion_picture
from pairstream.report import Report
from pairstream.run import RunFolder
from pretrain.recipe_model import TowersModel

TITLES = {
    "caption": ("Captions", "Captions written for held-out pictures"),
    "vqa": ("Visual questions", "Questions answered"),
    "mixed": ("Captions and visual questions", "What was written"),
    "classify": ("Labels", "Posts and the labels they were given"),
    "choose": ("Visual questions", "Questions answered from a list"),
    "match": ("Matching", "Pictures with right and wrong texts"),
}
CAPTION_ROWS = (("CIDEr-D", "cider"), ("BLEU-4", "bleu4"), ("BLEU-1", "bleu1"), ("ROUGE-L", "rouge_l"))


def write_report(
    folder: RunFolder,
    recipe: FinetuneRecipe,
    task: TaskKind,
    metrics: dict[str, Any],
    rows: Sequence[Row],
    *,
    step: int,
) -> None:
    """Write `report.html` and `report.json` of a run as it is: at each evaluation, and at its end.

    Args:
        folder: The run's, with its log.
        recipe: The run.
        task: Knows how its rows are shown.
        metrics: Of the evaluation.
        rows: The judged pictures.
        step: Of the model that was judged.
    """
    title, wall = TITLES[recipe.task.kind]
    report = Report(
        f"{title}: {folder.path.name}",
        f"{encoder_name(recipe)}, {metrics['images']:,} held-out pictures, after step {step:,} of {recipe.steps:,}",
    )
    if recipe.task.kind == "caption":
        add_caption_numbers(report, metrics)
    elif recipe.task.kind in ("vqa", "choose"):
        add_answer_numbers(report, metrics)
    elif recipe.task.kind == "mixed":
        add_caption_numbers(report, metrics["caption"])
        add_answer_numbers(report, metrics["vqa"])
    else:
        add_label_numbers(report, metrics, task.main)
    if "shifted" in metrics:
        sets = {"target": metrics, **metrics["shifted"]}
        report.table(
            ["set", task.main, "pictures"],
            [[name, found[task.main], found["images"]] for name, found in sets.items()],
            caption="The target set, and shifted ones beside it",
        )
    report.cards(wall, task.cards(rows))
    log = folder.read_log()
    lines = [record for record in log if record.get("loss") is not None]
    report.curves(
        "Loss", {"training": [(line["step"], line["loss"]) for line in lines]}, y="cross-entropy, nats"
    )
    measured = [(record["step"], record["evaluation"][task.main]) for record in log if "evaluation" in record]
    if len(measured) > 1:
        report.curves(task.main, {"held out": measured})
    report.write(folder.path)


def encoder_name(recipe: FinetuneRecipe) -> str:
    """What the report calls the encoder."""
    if isinstance(recipe.model, TowersModel):
        towers = recipe.model.image_tower, recipe.model.text_tower
        return " + ".join(str(getattr(tower, "name", tower.kind)) for tower in towers)
    return recipe.model.name


def add_caption_numbers(report: Report, metrics: dict[str, Any]) -> None:
    report.numbers(
        [
            (label, metrics[name], f"most frequent caption: {metrics[f'baseline_{name}']:.3f}")
            for label, name in CAPTION_ROWS
        ]
    )
    report.text(
        f"The trivial caption is “{metrics['baseline_caption']}”. {metrics['distinct_captions']:,} different captions "
        f"were written for {metrics['images']:,} pictures. Tokeniser: {metrics['tokeniser']}; document frequencies of "
        f"CIDEr-D: {metrics['df_source']}."
    )


def add_answer_numbers(report: Report, metrics: dict[str, Any]) -> None:
    report.numbers(
        [
            (
                "VQA accuracy",
                metrics["accuracy"],
                f"{metrics['questions']:,} questions, mode {metrics['mode']}",
            ),
            ("question only", metrics["question_only_baseline"], metrics["question_only_model"]),
            ("majority", metrics["majority_baseline"], f"always “{metrics['majority_answer']}”"),
        ]
    )
    if "reachable" in metrics:
        report.text(
            f"The list has {metrics['answers']:,} answers; the best of them for every question would score "
            f"{metrics['reachable']:.3f}."
            + (
                f" The same model without the picture: {metrics['text_only']:.3f}."
                if "text_only" in metrics
                else ""
            )
        )
    for name in sorted(key for key in metrics if key.startswith("by_")):
        blind = metrics["question_only"][name]
        label = name.removeprefix("by_").replace("_", " ")
        report.table(
            [label, "accuracy", "question only"],
            [[kind, value, blind[kind]] for kind, value in metrics[name].items()],
            caption=f"VQA accuracy by {label}",
        )


def add_label_numbers(report: Report, metrics: dict[str, Any], main: str) -> None:
    alone = {"picture": "image_only", "text": "text_only"}
    notes = [f"{what} alone: {metrics[name]:.3f}" for what, name in alone.items() if name in metrics]
    several = "map" in metrics
    notes_of = {main: "; ".join(notes)}
    report.numbers(
        [
            (
                "all labels right" if several else "accuracy",
                metrics["accuracy"],
                notes_of.get("accuracy", ""),
            ),
            (
                "macro F1",
                metrics["macro_f1"],
                notes_of.get("macro_f1") or f"{metrics['images']:,} pictures with a label",
            ),
            ("calibration error", metrics["ece"], "15 bins of confidence"),
            ("majority", metrics["majority_baseline"], f"always “{metrics['majority_label']}”"),
        ]
    )
    last = ("average precision", "average_precision") if several else ("AUROC", "auroc")
    report.table(
        ["label", "precision", "recall", "F1", last[0], "samples"],
        [
            [
                name,
                *(entry[key] for key in ("precision", "recall", "f1", last[1])),
                entry["samples"],
            ]
            for name, entry in metrics["by_class"].items()
        ],
        caption="By label",
    )
    if "confusion" in metrics:
        picture = confusion_picture(metrics["confusion"], metrics["labels"])
        report.picture("Confusion", picture, "rows are the truth, columns what was said")
    report.curves(
        "Calibration",
        {
            "model": [(sure, right) for sure, right, _ in metrics["reliability"]],
            "as sure as right": [(0.0, 0.0), (1.0, 1.0)],
        },
        x="confidence",
        y="share right",
    )
