"""`pairstream finetune wise`: between the encoder that pretraining gave and the fine-tuned one, and the curve of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.evaluation import judge, open_val, training_texts
from finetune.families import begin
from finetune.recipe import FinetuneRecipe
from finetune.report import encoder_name
from finetune.tasks import make_task
from pairstream.atomic import write_text
from pairstream.recipe import load_recipe
from pairstream.report import Report
from pretrain.encoder import Encoder, load_encoder


def wise(
    *,
    model: Path,
    out: Path,
    zero_shot: str | None = None,
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    shifted: tuple[str, ...] = (),
    save: float | None = None,
    device: str = "auto",
) -> None:
    """Measure a fine-tuned model whose towers are brought part of the way back to the pretrained ones (WiSE-FT).

    The target set is the run's own `data.val`. Head, connector and language model stay as they were fine-tuned. The
    curve costs one evaluation a point and set; choose alpha on pictures that you do not publish numbers of.

    Args:
        model: A run folder of `pairstream finetune` whose towers trained.
        out: A folder for wise.json and report.html.
        zero_shot: The pretrained encoder; the run's own `model` when not given.
        alphas: Shares of the fine-tuned weights: 0 has the pretrained towers, 1 the fine-tuned ones.
        shifted: Shards of another distribution, to be measured beside.
        save: Write the model of this share into OUT/model.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        FileNotFoundError: No run folder there.
        ValueError: A share out of range, towers of another shape, or towers that did not train.

    Reference:
        Wortsman et al. 2022, Robust fine-tuning of zero-shot models.
    """
    from finetune.opening import open_task_model

    for alpha in (*alphas, *(() if save is None else (save,))):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha {alpha}: expected a share from 0 to 1")
    source = model / "recipe.resolved.yaml"
    if not source.is_file():
        raise FileNotFoundError(f"no {source}: expected the run folder of `pairstream finetune`")
    recipe = load_recipe(FinetuneRecipe, "finetune", str(source))
    tuned = open_task_model(model, device=device)
    begun = zero_shot or encoder_name(recipe)
    start = load_encoder(zero_shot, device=device) if zero_shot else begin(recipe, tuned.device)
    towers = Interpolation(tuned.encoder, start, begun)
    task = make_task(recipe.task)
    task.learn(row.judged_by for row in training_texts(recipe))
    sets: dict[str, Sequence[str] | str] = {
        "target": recipe.data.val,
        **({"shifted": shifted} if shifted else {}),
    }
    points = []
    for alpha in alphas:
        towers.set(alpha)
        found = {
            name: judge(recipe, tuned, task, open_val(recipe, tuned, shards=shards))[0][task.main]
            for name, shards in sets.items()
        }
        points.append({"alpha": alpha, **found})
        said = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        print(f"alpha {alpha:g}: {task.main} {said}", file=sys.stderr, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    content = {"metric": task.main, "model": str(model), "zero_shot": begun, "points": points}
    write_text(out / "wise.json", json.dumps(content, indent=2) + "\n")
    write_curve(out, content, list(sets))
    if save is not None:
        towers.set(save)
        tuned.save(out / "model")


def write_curve(out: Path, content: Mapping[str, Any], names: Sequence[str]) -> None:
    """The report: the curve, and its numbers."""
    points, metric = content["points"], content["metric"]
    report = Report(
        "Between pretrained and fine-tuned towers", f"{content['model']}, from {content['zero_shot']}"
    )
    report.curves(
        metric,
        {name: [(point["alpha"], point[name]) for point in points] for name in names},
        x="share of the fine-tuned weights",
    )
    report.table(
        ["alpha", *names], [[point["alpha"], *(round(point[name], 4) for name in names)] for point in points]
    )
    report.write(out)


class Interpolation:
    """Sets an encoder's weights between two states, in place.

    Args:
        encoder: The fine-tuned encoder, which is changed.
        start: The pretrained one.
        name: Of the latter, for messages.

    Raises:
        ValueError: Their weights have other names or shapes, or are all the same.
    """

    def __init__(self, encoder: Encoder, start: Encoder, name: str):
        self.ours = weights(encoder.model)
        theirs = weights(start.model)
        unlike = [key for key in self.ours if key not in theirs or theirs[key].shape != self.ours[key].shape]
        if unlike or len(theirs) != len(self.ours):
            raise ValueError(
                f"{name} is another encoder than the fine-tuned one ({unlike[:3] or 'more weights'}): expected the one "
                "that fine-tuning began with"
            )
        self.ends = {key: (theirs[key].clone(), value.clone()) for key, value in self.ours.items()}
        if all(torch.equal(a, b) for a, b in self.ends.values()):
            raise ValueError(
                f"the towers are those of {name}, none of them was fine-tuned: there is nothing between them"
            )

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """`(1 - alpha)` pretrained + `alpha` fine-tuned; both ends exactly."""
        for key, (first, last) in self.ends.items():
            value = first if alpha == 0 else last if alpha == 1 else torch.lerp(first, last, alpha)
            self.ours[key].copy_(value)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All that training moves: parameters and batch statistics, by name."""
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
