"""What a recipe says about image-text classification; no torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pairstream.recipe import Config


class Pooled(Config):
    """Fusion of the towers' two embeddings, one vector each: hundreds of thousands of parameters, microseconds."""

    kind: Literal["tanh", "concat", "gated"] = "tanh"
    """`tanh` is the classic late fusion tanh(W_i x_i + W_t x_t); `concat` one GELU layer over both side by side;
    `gated` lets a gate choose between the two for each unit, for where one is missing or misleading."""
    width: int = Field(default=256, ge=1)
    """Hidden units."""


class SingleStream(Config):
    """Image and text tokens in one row of transformer layers, as in VisualBERT and ViLT."""

    kind: Literal["single_stream"] = "single_stream"
    width: int = Field(default=128, ge=8)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def fits(self) -> SingleStream:
        return check_heads(self)


class CoAttention(Config):
    """Two rows of layers, each of which looks at the other, as in ViLBERT and LXMERT."""

    kind: Literal["co_attention"] = "co_attention"
    width: int = Field(default=128, ge=8)
    layers: int = Field(default=1, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def fits(self) -> CoAttention:
        return check_heads(self)


def check_heads(config):
    if config.width % config.heads:
        raise ValueError(f"width {config.width} is not a multiple of heads {config.heads}")
    return config


Fusion = Annotated[Pooled | SingleStream | CoAttention, Field(discriminator="kind")]


class ClassifyTask(Config):
    """Give a picture and its text one of several labels."""

    kind: Literal["classify"] = "classify"
    fusion: Fusion = Pooled()
    labels: tuple[str, ...] = ()
    """The labels, in the order of the outputs; those of the training data, sorted, when empty."""
    text_key: str = "text"
    """JSON key of a sample's text. A sample without it is judged by its picture alone."""
    label_key: str = "label"
    """JSON key of a sample's label. Samples without it are passed over."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by the inverse of its share: for macro-F1 where classes are rare; costs accuracy."""
    modality_dropout: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of samples that lose their picture, and as many their text, in training: the model then answers
    with one of them missing, too."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """In front of the output layer."""
    freeze_text_tower: bool = False
    """Train only the fusion (and the image tower, unless it is frozen as well). Posts are no captions: let it train."""

    @model_validator(mode="after")
    def possible(self) -> ClassifyTask:
        if len(self.labels) == 1 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must be two or more different names, got {list(self.labels)}")
        return self
