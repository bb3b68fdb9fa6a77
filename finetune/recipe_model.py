"""What a fine-tuning recipe says of the parts beside the towers: connector, language model, adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from finetune.fusion.recipe import check_heads
from pairstream.recipe import Config


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
