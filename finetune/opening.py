"""Open a saved task model, whatever it was trained for."""

from __future__ import annotations

from pathlib import Path

from finetune.fusion.model import FusionClassifier
from finetune.fusion.saved import TASKS, load_classifier
from finetune.model import VisionLanguageModel, load_task_model
from finetune.saved import opened

AnswerModel = VisionLanguageModel | FusionClassifier
"""One that answers questions: by writing, or by choosing from its list of answers."""


def open_task_model(folder: str | Path, *, device: str = "auto") -> AnswerModel:
    """A captioner, VQA model, classifier, chooser of answers or matcher; nothing is downloaded.

    Args:
        folder: What `TaskModel.save` wrote, or a run folder of `pairstream finetune`.
        device: A torch device, or `auto`.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: No task model is there.
        ValueError: A part is damaged or of another version.
    """
    with opened(folder) as (_, content):
        kind = content["task"]["kind"]
    return (load_classifier if kind in TASKS else load_task_model)(folder, device=device)


def open_answer_model(folder: str | Path, *, device: str = "auto") -> AnswerModel:
    """A model that answers questions about pictures.

    Args:
        folder: As for `open_task_model`.
        device: Likewise.

    Raises:
        FileNotFoundError: No task model is there.
        ValueError: It was trained for something else, or is damaged.
    """
    model = open_task_model(folder, device=device)
    if not answers(model):
        raise ValueError(
            f"{folder} was trained for {model.task.kind}: expected a model for questions (vqa, mixed or choose)"
        )
    return model


def answers(model: AnswerModel) -> bool:
    """Whether a task model answers questions."""
    if isinstance(model, FusionClassifier):
        return model.task.kind == "choose"
    return model.vqa_task is not None
