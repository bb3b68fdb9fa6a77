"""What a fine-tuning recipe says; no torch here, so that `--help` and the checks are quick."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from finetune.fusion.recipe import ChooseTask, ClassifyTask, MatchTask, check_heads
from pairstream.recipe import Config
from pretrain.recipe import Checkpoints
from pretrain.recipe_model import Model, OpenClipModel
from pretrain.recipe_optim import AdamW, Cosine, Optimizer, Schedule, check_schedule


class Linear(Config):
    """One matrix from image tokens to the language model's width."""

    kind: Literal["linear"] = "linear"
    merge: int = Field(default=1, ge=1)
    """Neighbouring image tokens, merge x merge, that become one (side by side in its channels); see `Mlp`."""


class Mlp(Config):
    """Two layers with a GELU between; more than a matrix can say, at a few percent of the time."""

    kind: Literal["mlp"] = "mlp"
    merge: int = Field(default=1, ge=1)
    """Neighbouring image tokens, merge x merge, that become one (side by side in its channels).

    The prefix is what the language model spends most of its time on: 2 makes it four times shorter and loses nothing.
    """


class Resampler(Config):
    """A fixed number of learnt queries that look at the image tokens, as in Perceiver and Q-Former.

    The prefix has `queries` positions whatever the tower gives: for towers of hundreds of tokens. It learns more slowly
    than `mlp`, whose prefix keeps the places of things.
    """

    kind: Literal["resampler"] = "resampler"
    queries: int = Field(default=16, ge=1)
    """Positions of the prefix."""
    width: int = Field(default=256, ge=8)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def fits(self) -> Resampler:
        return check_heads(self)


class CrossAttention(Config):
    """Layers between those of the language model that look at the picture; the text alone stands in the sequence.

    With `gated` and a frozen language model as in Flamingo: the gates start closed, so that training begins with the
    language model as it was. Without, and with a language model that trains, a decoder as in BLIP and CoCa. A picture
    takes one position, however many tokens it has, so several pictures and texts can follow each other.
    """

    kind: Literal["cross_attention"] = "cross_attention"
    every: int = Field(default=1, ge=1)
    """One in front of each such many layers of the language model."""
    gated: bool = True
    heads: int = Field(default=4, ge=1)
    """Of the language model's width, which they must divide."""
    feed_forward: int = Field(default=2, ge=1)
    """Width of the layers' second half, as a multiple of the language model's."""
    queries: int = Field(default=0, ge=0)
    """Image tokens are first resampled to so many (see `resampler`); 0 looks at all of them."""


Connector = Annotated[Linear | Mlp | Resampler | CrossAttention, Field(discriminator="kind")]


class SmallLanguageModel(Config):
    """A GPT-2-shaped language model with random weights, and a byte-level BPE vocabulary of the training texts.

    The vocabulary is made from all texts of the shards, captions and questions, whatever the task.
    """

    kind: Literal["config"] = "config"
    width: int = Field(default=256, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    context: int = Field(default=256, ge=8)
    """Positions: image tokens, prompt and answer together must fit."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    vocabulary: int = Field(default=2000, ge=300)
    """Pieces at the most; 256 of them are the bytes, so that any text can be said."""

    @model_validator(mode="after")
    def fits(self) -> SmallLanguageModel:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class PretrainedLanguageModel(Config):
    """A causal language model of transformers' with its tokenizer."""

    kind: Literal["pretrained"] = "pretrained"
    name: str
    """A hub name such as `openai-community/gpt2`, or a folder (config.json, model.safetensors, tokenizer files)."""
    freeze: bool = False
    """Train only the connector (and the image tower, unless it is frozen as well)."""
    bits: Literal[32, 8, 4] = 32
    """Of its matrices: 8 or 4 (bitsandbytes, on a CUDA GPU) take a quarter or an eighth of the memory, cannot train,
    and want `lora` on top (QLoRA) or `freeze`."""


class ContinuedLanguageModel(Config):
    """Go on from the task model that `model.name` names: its connector, language model and tokenizer come along.

    Questions are learnt several times faster by a model that can already name what it sees.
    """

    kind: Literal["continued"] = "continued"


LanguageModel = Annotated[
    SmallLanguageModel | PretrainedLanguageModel | ContinuedLanguageModel, Field(discriminator="kind")
]


class Lora(Config):
    """Low-rank adapters on the language model, whose own weights are then frozen (peft)."""

    rank: int = Field(default=0, ge=0)
    """Of the adapters; 0 has none."""
    alpha: float = Field(default=16.0, gt=0)
    """Adapters count by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """In front of the adapters."""
    dora: bool = False
    """Learn size and direction of the weights apart (DoRA): a little better at low ranks, a third more time."""
    targets: tuple[str, ...] = ()
    """Names of the layers to adapt, such as `q_proj`; all linear ones but the output when empty."""


class TowerLora(Config):
    """Low-rank adapters in the image tower, whose own weights then stay; they train at `tower_lr`.

    The saved encoder has them added, and opens as any other.
    """

    rank: int = Field(default=0, ge=0)
    """Of the adapters; 0 has none."""
    alpha: float = Field(default=16.0, gt=0)
    """Adapters count by alpha / rank."""
    dora: bool = False
    """Learn size and direction of the weights apart (DoRA)."""


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


class Reward(Config):
    """Self-critical training of captions after cross-entropy: drawn texts are learnt as far as they beat greedy ones.

    The reward is CIDEr-D with the document frequencies of the training captions. It raises CIDEr-D by some points and
    makes captions more alike; a step costs the writing of `samples` + 1 texts a picture.
    """

    after: int | None = Field(default=None, ge=0)
    """Optimiser steps of cross-entropy before it; None never begins."""
    samples: int = Field(default=4, ge=1)
    """Captions drawn for each picture."""
    rate: float = Field(default=0.1, gt=0)
    """Learning rate from then on, as a multiple of what the schedule has."""


class CaptionTask(Config):
    """Write a caption of the picture."""

    kind: Literal["caption"] = "caption"
    prompt: str = ""
    """Words before the caption; a pretrained language model may like `A photo of`."""


class VqaTask(Config):
    """Answer questions about the picture by writing the answer."""

    kind: Literal["vqa"] = "vqa"
    prompt: str = "{question}"
    """The question's place in the prompt; `Question: {question} Answer:` suits a pretrained language model."""
    questions: int = Field(default=4, ge=1)
    """Questions drawn for each picture in a step. The picture is encoded once for all of them."""
    target: Literal["majority", "sample"] = "majority"
    """Train on the most frequent human answer, or on one drawn anew each time (softer, for real humans)."""
    accuracy: Literal["official", "fixed"] = "fixed"
    """Mode of the VQA accuracy; docs/finetuning.md has the difference."""

    @field_validator("prompt")
    @classmethod
    def has_question(cls, value: str) -> str:
        try:
            names = [name for _, name, _, _ in Formatter().parse(value) if name is not None]
        except ValueError as error:
            raise ValueError(f"not a template: {error}") from error
        if names != ["question"]:
            raise ValueError("expected exactly one {question} in the prompt")
        return value


class MixedTask(Config):
    """Captions and questions in one run; the prompts tell the model which is wanted.

    A picture of the training shards gives what it has: a caption, questions, or both.
    """

    kind: Literal["mixed"] = "mixed"
    caption: CaptionTask = CaptionTask(prompt="describe the picture:")
    vqa: VqaTask = VqaTask(prompt="question: {question} answer:")

    @model_validator(mode="after")
    def possible(self) -> MixedTask:
        if not self.caption.prompt.strip():
            raise ValueError(
                "task.caption.prompt is empty: the model could not tell a caption from an answer"
            )
        return self


Task = Annotated[
    CaptionTask | VqaTask | MixedTask | ClassifyTask | ChooseTask | MatchTask, Field(discriminator="kind")
]


class Data(Config):
    """Shards and how they are read."""

    train: str | tuple[str, ...]
    """Shards: a folder, glob, braces or URL; or several."""
    val: str | tuple[str, ...]
    """Shards that the results are measured on."""
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


class Decoding(Config):
    """How text is written."""

    num_beams: int = Field(default=1, ge=1)
    """1 is greedy; 3 to 5 give captions a few CIDEr points more at about that many times the work."""
    max_new_tokens: int = Field(default=30, ge=1)
    """Tokens written at the most, the image and prompt not counted."""
    min_new_tokens: int = Field(default=0, ge=0)
    """Tokens written at the least."""
    length_penalty: float = 1.0
    """Beam search divides a text's log-probability by its length to this power: above 0 favours longer texts."""
    no_repeat_ngram: int = Field(default=0, ge=0)
    """No run of so many tokens is written twice; 0 allows it, 3 stops stuttering."""
    sample: bool = False
    """Draw each token instead of taking the likeliest: different texts each time, and lower scores."""
    temperature: float = Field(default=1.0, gt=0)
    """Of drawing: below 1 keeps closer to the likeliest."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of drawing: only from the likeliest tokens that have this probability together (nucleus)."""

    @model_validator(mode="after")
    def possible(self) -> Decoding:
        if not self.sample and (self.temperature != 1.0 or self.top_p != 1.0):
            raise ValueError("temperature and top_p are about drawing: set sample, or leave them at 1")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
            )
        return self


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
        if self.data.cache_image_tokens and self.data.crop_scale != (1.0, 1.0):
            raise ValueError(
                "data.cache_image_tokens needs data.crop_scale [1.0, 1.0]: random crops cannot be kept"
            )
        return self
