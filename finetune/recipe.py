"""What a fine-tuning recipe says; no torch here, so that `--help` and the checks are quick."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from finetune.recipe_model import (
    Connector,
    ContinuedLanguageModel,
    LanguageModel,
    Lora,
    Mlp,
    PretrainedLanguageModel,
    SmallLanguageModel,
    TowerLora,
)
from finetune.recipe_task import Decoding, Reward, Task
from pairstream.recipe import Config
from pretrain.recipe import Checkpoints
from pretrain.recipe_model import Model, OpenClipModel
from pretrain.recipe_optim import AdamW, Cosine, Optimizer, Schedule, check_schedule


class Rates(Config):
    """Learning rates of the parts, as multiples of `optim.lr`; the pretrained towers have `tower_lr`."""

    connector: float = Field(default=1.0, gt=0)
    language_model: float = Field(default=1.0, gt=0)
    """Its adapters, where it has some."""
    head: float = Field(default=1.0, gt=0)
    """Fusion and output of a classifier."""


class Waits(Config):
    """Optimiser steps for which a part stays as it is while the others train, as in LP-FT.

    A head or connector that still is random would push pretrained weights about.
    """

    towers: int = Field(default=0, ge=0)
    language_model: int = Field(default=0, ge=0)


class Data(Config):
    """Shards and how they are read."""

    train: str | tuple[str, ...]
    """Shards: a folder, glob, braces or URL; or several."""
    val: str | tuple[str, ...]
    """Shards that the results are measured on."""
    shifted: tuple[str, ...] = ()
    """Shards of other distributions, measured at the end beside `val`; never what the best model is chosen by."""
    workers: int = Field(default=0, ge=0)
    """Loader processes of each rank."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Share of the area that a random crop keeps, least and most; (1, 1) takes the evaluation's picture."""
    cache_image_tokens: bool = False
    """Encode each training picture once and keep its tokens in memory (samples x tokens x width x 4 bytes).

    Needs a frozen image tower and no random crop. Steps then cost the language model alone.
    """
    max_faults: float = Field(default=0.01, ge=0, lt=1)
    """Share of bad samples past which the run stops."""

    @field_validator("train", "val")
    @classmethod
    def not_empty(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("the shard list is empty: give a folder, glob or URL of .tar shards")
        return value


class Evaluation(Config):
    """What is measured on the validation shards, and how often."""

    every: int | None = Field(default=None, ge=1)
    """Optimiser steps between evaluations; None measures once, at the end."""
    select: Literal["last", "best"] = "last"
    """`best` keeps the model of the best evaluation (CIDEr-D, accuracy or macro-F1) in `best` of the run folder, and
    reports that one. The number is then the best of several, on the same pictures: measure it on
    others before you publish it."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row without a new best; None goes on to the last step."""
    pictures: int | None = Field(default=None, ge=1)
    """Pictures at the most, the first of the shards; None takes all. CIDEr depends on this number."""
    batch_size: int = Field(default=64, ge=1)
    """Pictures in a batch, on each rank."""
    wall: int = Field(default=24, ge=0)
    """Pictures on the report's wall."""

    @model_validator(mode="after")
    def possible(self) -> Evaluation:
        if self.every is None and (self.patience is not None or self.select == "best"):
            raise ValueError(
                "select: best and patience compare evaluations: set every, the steps between them"
            )
        return self


class FinetuneRecipe(Config):
    """All of a fine-tuning run."""

    run: str
    """The run folder, such as `runs/scenes_caption`."""
    model: Model
    """The dual encoder: a run or checkpoint folder, an open_clip name, `local-dir:` or `hf-hub:`.

    A folder of `finetune` means the encoder of its task model. `kind: towers` joins two towers that were never trained
    together, such as a ResNet and a BERT with their own pretrained weights (as in a recipe of `pretrain`).
    """
    task: Task
    data: Data
    connector: Connector = Mlp()
    language_model: LanguageModel = SmallLanguageModel()
    freeze_image_tower: bool = True
    """Frozen, it stays in evaluation mode and no gradient is computed for it."""
    tower_lr: float = Field(default=0.1, gt=0)
    """Learning rate of an image tower that trains, as a multiple of that of the other parts."""
    rates: Rates = Rates()
    waits: Waits = Waits()
    lora: Lora = Lora()
    tower_lora: TowerLora = TowerLora()
    l2_sp: float = Field(default=0.0, ge=0)
    """Towers that train are pulled to the weights they began with by this share of the learning rate each step, instead
    of wandering off (L2-SP, decoupled as AdamW's decay is); 0.1 to 10."""
    adversarial: float = Field(default=0.0, ge=0)
    """Also learn from word embeddings that are moved by so much (Euclidean norm) to where they hurt most (FGM):
    steadier with few texts, for twice the time. The embeddings must train."""
    reward: Reward = Reward()
    shots: int = Field(default=0, ge=0)
    """Up to so many pictures of the batch with their texts stand in front of another one in training, so that the model
    learns to go on from examples (few-shot prompts). Each text is learnt once, with none to `shots` in front."""
    length_groups: int = Field(default=1, ge=1)
    """Texts of a step are sorted by length into so many groups, each padded only to its own longest: the same loss with
    less padding, for one call of the language model each. For texts of very unequal length."""
    gradient_checkpointing: bool = False
    """Compute the language model's activations again in the backward pass instead of keeping them: a third more time
    for a fraction of the memory."""
    batch_size: int = Field(default=64, ge=1)
    """Pictures in a step, over all ranks together."""
    steps: int = Field(ge=1)
    """Optimiser steps."""
    optim: Optimizer = AdamW(lr=1e-3, weight_decay=0.05)
    schedule: Schedule = Cosine(warmup=50)
    decoding: Decoding = Decoding()
    evaluate: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes bf16 on a GPU that has it and fp32 elsewhere."""
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=20, ge=1)
    """Optimiser steps between lines of log.jsonl."""
    processes: int | None = Field(default=None, ge=1)
    """How many processes the run is meant for; None takes as many as were started."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Accelerate's trackers that get the log as well."""

    @field_validator("model", mode="before")
    @classmethod
    def named(cls, value: Any) -> Any:
        """`model: {name: ...}` needs no kind."""
        return {"kind": "open_clip", **value} if isinstance(value, dict) and "name" in value else value

    @model_validator(mode="after")
    def possible(self) -> FinetuneRecipe:
        if isinstance(self.language_model, ContinuedLanguageModel) and not isinstance(
            self.model, OpenClipModel
        ):
            raise ValueError(
                "language_model continued goes on from the task model that model.name names: give one"
            )
        if self.optim.layer_decay != 1:
            raise ValueError(
                f"optim.layer_decay ({self.optim.layer_decay}) is for pretraining; here tower_lr sets the image "
                "tower's rate"
            )
        check_schedule(self.schedule, self.steps)
        if self.lora.rank and isinstance(self.language_model, SmallLanguageModel):
            raise ValueError(
                "lora.rank adapts a pretrained or continued language model, this one is new: train it"
            )
        if self.tower_lora.rank and self.freeze_image_tower:
            raise ValueError(
                "tower_lora.rank trains adapters of the image tower: set freeze_image_tower: false"
            )
        if self.shots and self.task.kind not in ("caption", "vqa", "mixed"):
            raise ValueError(
                f"shots are for models that write, this task is {self.task.kind}: leave them out"
            )
        if self.shots and self.reward.after is not None:
            raise ValueError("reward learns from one picture at a time: leave shots or reward.after out")
        language = self.language_model
        bits = language.bits if isinstance(language, PretrainedLanguageModel) and not language.freeze else 32
        if bits < 32 and not self.lora.rank:
            raise ValueError(
                f"language_model.bits {bits}: matrices of so few bits cannot train: set lora.rank (QLoRA), or "
                "language_model.freeze"
            )
        if self.reward.after is not None and self.task.kind != "caption":
            raise ValueError(f"reward is for captions (CIDEr-D), this task is {self.task.kind}: leave it out")
        if self.reward.after is not None and self.reward.after >= self.steps:
            raise ValueError(f"reward.after must be below steps ({self.steps}): it would never begin")
        if max(self.waits.towers, self.waits.language_model) >= self.steps:
            raise ValueError(f"waits must be below steps ({self.steps}): the part would never train")
        if self.data.cache_image_tokens and not self.freeze_image_tower:
            raise ValueError(
                "data.cache_image_tokens needs freeze_image_tower: tokens of a tower that trains change"
            )
        if getattr(self.task, "standardise", False) and not self.data.cache_image_tokens:
            raise ValueError(
                "task.standardise takes mean and deviation from features that are kept: set data.cache_image_tokens"
            )
        if self.data.cache_image_tokens and self.data.crop_scale != (1.0, 1.0):
            raise ValueError(
                "data.cache_image_tokens needs data.crop_scale [1.0, 1.0]: random crops cannot be kept"
            )
        return self
