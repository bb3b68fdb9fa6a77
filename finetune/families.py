"""What kinds of task models do differently in training: how they are built, opened again, and fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list

from data.transforms import EvalTransform, TrainTransform
from finetune.fusion.answers import Choosing
from finetune.fusion.model import FusionClassifier
from finetune.fusion.recipe import MatchTask
from finetune.fusion.samples import FusionCollate, make_load
from finetune.fusion.saved import load_classifier
from finetune.language_models import pretrained_language_model, small_language_model
from finetune.model import VisionLanguageModel, build_task_model, load_task_model
from finetune.parts import parts_of
from finetune.recipe import FinetuneRecipe
from finetune.recipe_model import ContinuedLanguageModel, PretrainedLanguageModel
from finetune.recipe_task import Task
from finetune.rows import Rows
from finetune.samples import TextRow, TrainCollate, TrainLoad
from finetune.saved import task_folder
from finetune.text import train_tokenizer, wrap_tokenizer
from finetune.tower_adapters import adapt_image_tower
from pretrain.encoder import Encoder, build_encoder
from pretrain.recipe_model import OpenClipModel


class Family(Protocol):
    """What the trainer asks of a kind of models; `run` is the trainer itself."""

    towers: str
    """Name prefix of the pretrained towers, which train at `tower_lr` times the rate."""

    def rates(self, recipe: FinetuneRecipe) -> dict[str, float]:
        """Multiples of the learning rate by name prefix."""
        ...

    def build(self, run: Any, texts: list[TextRow]) -> Any:
        """The model at step 0."""
        ...

    def word_embeddings(self, model: Any) -> torch.nn.Parameter:
        """The table of word vectors that the texts are read with."""
        ...

    def reopen(self, run: Any, folder: Path) -> Any:
        """The model of the recipe with all weights of a saved one."""
        ...

    def keep(self, run: Any, texts: list[TextRow], bad: frozenset[int]) -> None:
        """What is kept beside the features of all pictures but the `bad` ones, `run.kept`."""
        ...

    def reading(self, run: Any, transform: EvalTransform | TrainTransform | None) -> tuple[Any, Any]:
        """What loads and what collates the training samples."""
        ...


class Writing:
    """Models that write text: an encoder, a connector and a language model."""

    towers = "image_tower."

    def rates(self, recipe: FinetuneRecipe) -> dict[str, float]:
        rates = recipe.rates
        return {
            self.towers: recipe.tower_lr,
            "connector.": rates.connector,
            "language_model.": rates.language_model,
        }

    def word_embeddings(self, model: VisionLanguageModel) -> torch.nn.Parameter:
        return model.language_model.get_input_embeddings().weight

    def build(self, run: Any, texts: list[TextRow]) -> VisionLanguageModel:
        recipe: FinetuneRecipe = run.recipe
        config = recipe.language_model
        if isinstance(config, ContinuedLanguageModel):
            assert isinstance(recipe.model, OpenClipModel), "the recipe has been checked"
            return self.reopen(run, task_folder(recipe.model.name))
        encoder = begin(recipe, run.accelerator.device)
        if isinstance(config, PretrainedLanguageModel):
            language_model, tokenizer = pretrained_language_model(
                config.name, bits=config.bits, device=run.accelerator.device
            )
        else:
            corpus = (text for row in texts for text in (*run.task.corpus(row.judged_by), *row.others))
            made = [train_tokenizer(corpus, config.vocabulary).backend_tokenizer.to_str() if run.main else ""]
            if run.world > 1:
                broadcast_object_list(made)
            tokenizer = wrap_tokenizer(made[0])
            language_model = small_language_model(config, tokenizer)
        model = build_task_model(recipe, encoder, language_model, tokenizer)
        model.parts = parts_of(recipe)
        return model

    def reopen(self, run: Any, folder: Path) -> VisionLanguageModel:
        """The model of the recipe with all weights of a saved one.

        Raises:
            ValueError: Its connector is another.
        """
        recipe: FinetuneRecipe = run.recipe
        parts = load_task_model(folder, device=str(run.accelerator.device))
        if parts.connector_config != recipe.connector:
            raise ValueError(
                f"{folder} has the connector {parts.connector_config.model_dump()}, the recipe "
                f"{recipe.connector.model_dump()}: a model that goes on keeps its own, so give that as `connector`"
            )
        if parts.lora is not None and parts.lora != recipe.lora:
            raise ValueError(
                f"{folder} has the adapters {parts.lora.model_dump()}, the recipe {recipe.lora.model_dump()}: a model "
                "that goes on keeps its own, so give them as `lora`"
            )
        parts.connector.detach()
        torch.manual_seed(recipe.seed)  # adapters that the saved model has not follow from the seed, too
        adapt_image_tower(parts.encoder, recipe.tower_lora, folder)
        model = build_task_model(recipe, parts.encoder, parts.language_model, parts.tokenizer)
        model.connector.load_state_dict(parts.connector.state_dict())
        model.parts = parts.parts
        return model

    def keep(self, run: Any, texts: list[TextRow], bad: frozenset[int]) -> None:
        pass

    def reading(self, run: Any, transform: EvalTransform | TrainTransform | None) -> tuple[Any, Any]:
        model: VisionLanguageModel = run.model
        room, shots = model.context - model.prefix_length, run.recipe.shots
        return (
            TrainLoad(run.recipe.task, model.tokenizer, room=room, transform=transform),
            TrainCollate(
                model.tokenizer.pad_token_id,
                model.encoder.image_size,
                pictures=transform is not None,
                rows=Rows(shots, model.prefix_length, model.context) if shots else None,
            ),
        )


class Fusing:
    """Models that judge a picture with a text: two towers and a fusion head."""

    towers = "towers."

    def rates(self, recipe: FinetuneRecipe) -> dict[str, float]:
        return {"": recipe.rates.head, self.towers: recipe.tower_lr}

    def word_embeddings(self, model: FusionClassifier) -> torch.nn.Parameter:
        tables = [module for module in model.towers.modules() if isinstance(module, torch.nn.Embedding)]
        table: Any = max(tables, key=lambda table: table.num_embeddings)
        return table.weight

    def build(self, run: Any, texts: list[TextRow]) -> FusionClassifier:
        recipe: Any = run.recipe
        encoder = begin(recipe, run.accelerator.device)
        frozen = recipe.freeze_image_tower
        model = FusionClassifier(encoder, recipe.task, run.task.labels, freeze_image_tower=frozen)
        model.parts = parts_of(recipe)
        if isinstance(run.task, Choosing):
            model.expect(run.task.shares)
        return weighted(model, run)

    def reopen(self, run: Any, folder: Path) -> FusionClassifier:
        recipe: FinetuneRecipe = run.recipe
        model = load_classifier(
            folder,
            device=str(run.accelerator.device),
            freeze_image_tower=recipe.freeze_image_tower,
            tower_lora=recipe.tower_lora,
        )
        return weighted(model, run)

    def keep(self, run: Any, texts: list[TextRow], bad: frozenset[int]) -> None:
        """The scale of the channels, and what a frozen text tower makes of the texts, if they are few."""
        recipe: Any = run.recipe
        model: FusionClassifier = run.model
        if recipe.task.standardise and run.step == 0:
            model.learn_scale(run.kept, [row for row in range(len(run.kept)) if row not in bad])
        if recipe.task.freeze_text_tower and model.pooled:
            different = {text for row in texts for text in run.task.corpus(row.judged_by)} | {""}
            if len(different) <= recipe.steps * recipe.batch_size:  # else the steps read fewer
                model.keep_texts(different)

    def reading(self, run: Any, transform: EvalTransform | TrainTransform | None) -> tuple[Any, Any]:
        task, encoder = run.recipe.task, run.model.encoder
        return (
            make_load(task, run.model.labels, encoder.tokenize, transform),
            FusionCollate(
                encoder.image_size,
                pictures=transform is not None,
                negatives=task.negatives if isinstance(task, MatchTask) else 0,
            ),
        )


def begin(recipe: FinetuneRecipe, device: torch.device | str) -> Encoder:
    """The encoder that a run begins with; what is random of it, and all that is made next, follows from the seed."""
    torch.manual_seed(recipe.seed)
    encoder = build_encoder(recipe.model, device=device)
    torch.manual_seed(recipe.seed)
    adapt_image_tower(encoder, recipe.tower_lora)
    return encoder


def weighted(model: FusionClassifier, run: Any) -> FusionClassifier:
    """The model with the loss's class weights, which follow from the data and are not saved."""
    model.class_weights.copy_(torch.tensor(run.task.class_weights))  # pyright: ignore
    return model


def make_family(task: Task) -> Family:
    """The family of a task's models."""
    return Writing() if task.kind in ("caption", "vqa", "mixed") else Fusing()
