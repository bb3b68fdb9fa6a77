"""What a recipe says about models that join a picture with a text: labels, answers from a list, matching; no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pairstream.recipe import Config


class Pooled(Config):
    """Fusion of the towers' two embeddings, one vector each: hundreds of thousands of parameters, microseconds."""

    kind: Literal["tanh", "concat", "gated", "product"] = "tanh"
    """`tanh` is the classic late fusion tanh(W_i x_i + W_t x_t); `concat` one GELU layer over both side by side;
    `gated` lets a gate choose between the two for each unit, for where one is missing or misleading;
    `product` multiplies them unit by unit (low-rank bilinear), for tasks about whether the two agree."""
    width: int = Field(default=256, ge=1)
    """Hidden units."""
    picture: Literal["embedding", "tokens", "mean_max"] = "embedding"
    """What of the picture is fused: its embedding; or the mean of the tower's last tokens, which still has what
    pretraining's projection lets go (the shape of a plain figure, say); or that and beside it their largest value in
    each channel, since a mean loses what is small in the picture."""


class OverTokens(Config):
    """What every fusion has that looks at the tokens of both towers."""

    width: int = Field(default=128, ge=8)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    picture: Literal["tokens", "finer_tokens"] = "tokens"
    """What of the picture is looked at: the tower's last tokens; or those in front of a convolutional tower's last
    stage, four times as many, for tasks about how many there are and where."""

    @model_validator(mode="after")
    def fits(self) -> OverTokens:
        return check_heads(self)


class SingleStream(OverTokens):
    """Image and text tokens in one row of transformer layers, as in VisualBERT and ViLT."""

    kind: Literal["single_stream"] = "single_stream"


class CoAttention(OverTokens):
    """Two rows of layers, each of which looks at the other, as in ViLBERT and LXMERT."""

    kind: Literal["co_attention"] = "co_attention"
    layers: int = Field(default=1, ge=1)


class CrossAttention(OverTokens):
    """Text tokens that look at the picture in each layer, as in ALBEF and BLIP.

    The picture's tokens are computed once for all its texts: the cheapest over many tokens and questions.
    """

    kind: Literal["cross_attention"] = "cross_attention"
    layers: int = Field(default=3, ge=1)


def check_heads(config):
    if config.width % config.heads:
        raise ValueError(f"width {config.width} is not a multiple of heads {config.heads}")
    return config


Fusion = Annotated[Pooled | SingleStream | CoAttention | CrossAttention, Field(discriminator="kind")]


class FusionTask(Config):
    """What all tasks over a picture and a text have in common."""

    fusion: Fusion = Pooled()
    standardise: bool = False
    """Bring each channel of the image features to mean 0 and deviation 1 over the training pictures: channels that vary
    little from picture to picture, and are small beside others, are then learnt from as well and much sooner. Needs
    `data.cache_image_tokens`; mean and deviation are saved with the model."""
    modality_dropout: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of samples that lose their picture, and as many their text, in training: the model then answers
    with one of them missing, too."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """In front of the output layer."""
    freeze_text_tower: bool = False
    """Train only the fusion (and the image tower, unless it is frozen as well). Posts are no captions: let it train."""


class ClassifyTask(FusionTask):
    """Give a picture and its text one of several labels, or several at once."""

    kind: Literal["classify"] = "classify"
    modality_dropout: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of samples that lose their picture, and as many their text, in training: the model then answers
    with one of them missing, too."""
    labels: tuple[str, ...] = ()
    """The labels, in the order of the outputs; those of the training data, sorted, when empty."""
    several: bool = False
    """A sample may have any number of labels, none included: a list, or texts joined by `separator`. One logistic
    output a label; otherwise the labels exclude each other (softmax)."""
    separator: str = Field(default="|", min_length=1)
    """Between the labels of one sample where they are one text, as in a csv."""
    text_key: str = "text"
    """JSON key of a sample's text. A sample without it is judged by its picture alone."""
    label_key: str = "label"
    """JSON key of a sample's label. Samples without it are passed over."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by the inverse of its share (with `several`, the samples that have a label by how
    many have not): for macro-F1 where classes are rare; costs accuracy."""

    @model_validator(mode="after")
    def possible(self) -> ClassifyTask:
        least = 1 if self.several else 2
        if 0 < len(self.labels) < least or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must be two or more different names, got {list(self.labels)}")
        return self


class ChooseTask(FusionTask):
    """Answer questions by choosing from a list of answers, learnt from all humans' answers (soft targets).

    One pass of a small head instead of writing word by word; what is not in the list can never be said, so
    `metrics.json` has `reachable`, the accuracy of the best answers of the list.
    """

    kind: Literal["choose"] = "choose"
    answers: int = Field(default=3129, ge=2)
    """Answers in the list at the most: the most frequent majority answers of the training questions."""
    occurrences: int = Field(default=1, ge=1)
    """Training questions that an answer must be right for; VQAv2's usual list of 3,129 takes 9."""
    questions: int = Field(default=4, ge=1)
    """Questions drawn for each picture in a step. The picture is encoded once for all of them."""
    accuracy: Literal["official", "fixed"] = "fixed"
    """Mode of the VQA accuracy; docs/finetuning.md has the difference."""


class MatchTask(FusionTask):
    """Tell whether a text belongs to a picture; the wrong texts are those of other pictures of the batch."""

    kind: Literal["match"] = "match"
    negatives: int = Field(default=1, ge=1)
    """Wrong captions for each right one."""
