"""Open a saved fusion model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from finetune.fusion.model import WEIGHTS, FusionClassifier
from finetune.fusion.recipe import ChooseTask, ClassifyTask, MatchTask
from finetune.recipe_model import TowerLora
from finetune.saved import TASK, opened
from finetune.tower_adapters import adapt_image_tower
from pretrain.encoder import load_encoder

TASKS: dict[str, Any] = {"classify": ClassifyTask, "choose": ChooseTask, "match": MatchTask}


def load_classifier(
    folder: str | Path,
    *,
    device: str = "auto",
    freeze_image_tower: bool = True,
    tower_lora: TowerLora | None = None,
) -> FusionClassifier:
    """Open a saved classifier, chooser of answers or matcher; nothing is downloaded.

    Args:
        folder: What `TaskModel.save` wrote, or a run folder of `pairstream finetune`.
        device: A torch device, or `auto`.
        freeze_image_tower: For a model that goes on training.
        tower_lora: Adapters of its image tower, likewise.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: No task model is there.
        ValueError: It is no classifier, or a part is damaged or of another version.
    """
    with opened(folder) as (place, content):
        kind = content["task"]["kind"]
        if kind not in TASKS:
            raise ValueError(f"a model for {kind}, not for classify")
        task, labels = TASKS[kind].model_validate(content["task"]), content["labels"]
        state = load_file(place / WEIGHTS)
    encoder = load_encoder(place / "encoder", device=device)
    adapt_image_tower(encoder, tower_lora or TowerLora(), place)
    model = FusionClassifier(encoder, task, labels, freeze_image_tower=freeze_image_tower)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{place}: {WEIGHTS} does not fit {TASK}: {error}") from error
    absent = [name for name in missing if not name.startswith("towers.")]
    if absent or unexpected:
        raise ValueError(f"{place}: {WEIGHTS} does not fit {TASK}: {absent or unexpected}")
    model.parts = content.get("parts", {})
    return model.eval()
