"""What a recipe says of the objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pairstream.recipe import Config


class InfoNCEConfig(Config):
    """CLIP's loss: each image finds its text among all of the batch, and each text its image."""

    kind: Literal["info_nce"] = "info_nce"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over the batch."""
    tile: int | None = Field(default=None, ge=1)
    """Side of a block of logits; None chooses."""
    exchange: Literal["gather", "ring"] = "gather"
    """How texts reach all ranks: all at once, or passed on so that memory does not grow with the ranks."""


class SigmoidConfig(Config):
    """SigLIP's loss: each combination of image and text is a yes-or-no question."""

    kind: Literal["sigmoid"] = "sigmoid"
    init_scale: float = Field(default=10.0, gt=0)
    """First logit scale (exponentiated) of a model without a logit_bias; one that has it keeps its own."""
    init_bias: float = -10.0
    """First logit_bias of such a model."""
    tile: int | None = Field(default=None, ge=1)
    """Side of a block of logits; None chooses."""
    exchange: Literal["gather", "ring"] = "ring"


class MultiPositiveConfig(Config):
    """InfoNCE in which all captions of an image, and captions that are equal, are positives."""

    kind: Literal["multi_positive"] = "multi_positive"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over the batch."""


class HardNegativesConfig(Config):
    """InfoNCE in which negatives count the more, the more they look like the positive."""

    kind: Literal["hard_negatives"] = "hard_negatives"
    beta: float = Field(default=0.2, ge=0)
    """Sharpness of the weights; 0 is InfoNCE."""


class GlobalContrastConfig(Config):
    """InfoNCE against a moving average of each sample's denominator, for batches too small for a softmax."""

    kind: Literal["global_contrast"] = "global_contrast"
    gamma: float = Field(default=0.6, gt=0, le=1)
    """Share of the batch's own denominator in a sample's average; 1 is InfoNCE."""
    floor: float | None = Field(default=None, ge=0)
    """Added to the averages; None is 1 / (N - 1) for N pairs in a batch."""


class DistillationConfig(Config):
    """InfoNCE and agreement with the softmax of teachers over the same batch."""

    kind: Literal["distillation"] = "distillation"
    teachers: tuple[str, ...] = ()
    """Checkpoints, run folders or names of open_clip's with the student's image size and tokenizer."""
    stored: tuple[str, ...] = ()
    """Names of teachers whose embeddings lie in the shards, of any size (`pairstream pretrain reinforce`)."""
    shares: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """What each of `teachers` and then of `stored` counts, in any unit; none counts them equally."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the agreement; the rest is InfoNCE."""

    @model_validator(mode="after")
    def complete(self) -> DistillationConfig:
        names = (*self.teachers, *self.stored)
        if not names:
            raise ValueError(
                "expected a teacher in `teachers` (online) or `stored` (in the shards), got none"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"a teacher is named twice: {', '.join(names)}; give it a larger share instead")
        if self.shares and len(self.shares) != len(names):
            raise ValueError(
                f"expected a share for each of {len(names)} teachers ({', '.join(names)}), got {len(self.shares)}"
            )
        return self


Loss = Annotated[
    InfoNCEConfig
    | SigmoidConfig
    | MultiPositiveConfig
    | HardNegativesConfig
    | GlobalContrastConfig
    | DistillationConfig,
    Field(discriminator="kind"),
]


class AlignmentConfig(Config):
    """A critic tells pictures' embeddings from texts', and its gradient reaches the towers reversed: the modality gap
    closes."""

    weight: float = Field(default=0.1, ge=0)
    """What the reversed gradient counts in the towers; the critic itself always has all of its own. 0 measures only."""
    hidden: int = Field(default=256, ge=1)
    """Width of the critic's one hidden layer."""


class SelfSupervisionConfig(Config):
    """SLIP: two more views of each picture find each other among those of the batch (SimCLR)."""

    weight: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=0.1, gt=0)
    hidden: int = Field(default=1024, ge=1)
    """Width of the projection MLP's two hidden layers; the paper's 4096 suits large towers."""
    embed_dim: int = Field(default=256, ge=1)
    """Width of what is compared."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the area that a view's crop keeps, least and most."""
    hflip: float = Field(default=0.5, ge=0, le=1)
    """Probability of mirroring; no caption is compared with these views."""
    color_jitter: float = Field(default=0.4, ge=0, le=1)
    grayscale: float = Field(default=0.2, ge=0, le=1)


class CaptioningConfig(Config):
    """CoCa's second loss: a decoder writes the caption, token by token, from picture and text tower."""

    weight: float = Field(default=2.0, gt=0)
    """Of the cross-entropy a token; the contrastive loss has 1, as open_clip's and the paper's do."""


class TermsConfig(Config):
    """What is added to the contrastive loss."""

    alignment: AlignmentConfig | None = None
    """Adversarial modality alignment."""
    self_supervision: SelfSupervisionConfig | None = None
    """Image-image contrast (SLIP)."""
    captioning: CaptioningConfig | None = None
    """CoCa's captioning; the model needs a decoder."""
