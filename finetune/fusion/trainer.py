"""Training of an image-text classifier: the fine-tuning loop over posts instead of prompts and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.stream import PairStream
from data.transforms import TrainTransform
from finetune.fusion.model import FusionClassifier, load_classifier
from finetune.fusion.recipe import ClassifyTask
from finetune.fusion.samples import PostCollate, PostLoad
from finetune.fusion.task import Classification
from finetune.trainer import Finetuner
from pretrain.encoder import load_encoder


class ClassifierTrainer(Finetuner):
    """Trains the classifier of a recipe whose task is `classify`; see `Finetuner`.

    Example:
        >>> ClassifierTrainer(recipe).train()["accuracy"]                          # doctest: +SKIP
        0.96
    """

    slow_parts = ("towers.",)
    task: Classification
    model: Any

    @property
    def chosen(self) -> ClassifyTask:
        """The recipe's task with its labels filled in."""
        assert isinstance(self.recipe.task, ClassifyTask)
        return self.recipe.task.model_copy(update={"labels": self.task.labels})

    def build(self, texts: list[Any]) -> Any:
        """The model at step 0."""
        recipe = self.recipe
        encoder = load_encoder(
            recipe.model.name, pretrained=recipe.model.pretrained, device=str(self.accelerator.device)
        )
        torch.manual_seed(recipe.seed)
        return self.weighted(
            FusionClassifier(
                encoder, self.chosen, self.task.labels, freeze_image_tower=recipe.freeze_image_tower
            )
        )

    def reopen(self, folder: Path) -> Any:
        """The model of a checkpoint, to go on with."""
        frozen = self.recipe.freeze_image_tower
        return self.weighted(
            load_classifier(folder, device=str(self.accelerator.device), freeze_image_tower=frozen)
        )

    def weighted(self, model: FusionClassifier) -> FusionClassifier:
        """The model with the loss's class weights, which follow from the data and are not saved."""
        model.class_weights.copy_(torch.tensor(self.task.class_weights))  # pyright: ignore
        return model

    def open_train(self) -> PairStream:
        """The training batches of this rank."""
        recipe, encoder = self.recipe, self.model.encoder
        cached, crop = recipe.data.cache_image_tokens, recipe.data.crop_scale
        transform = (
            encoder.transform if crop == (1.0, 1.0) else TrainTransform(encoder.image_size, scale=crop)
        )
        return PairStream(
            recipe.data.train,
            PostLoad(self.chosen, encoder.tokenize, None if cached else transform),
            PostCollate(encoder.image_size, pictures=not cached),
            batch_size=recipe.batch_size // self.world,
            seed=recipe.seed,
            rank=self.rank,
            world_size=self.world,
            workers=recipe.data.workers,
            max_faults=recipe.data.max_faults,
        )
