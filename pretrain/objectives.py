"""From a recipe's `loss` to a function of one step's features; what it needs of the model is made here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.encoder import Encoder, load_encoder
from pretrain.global_contrast import SampleMeans, global_info_nce
from pretrain.losses import distributed_info_nce, distributed_sigmoid_loss, smoothing_term
from pretrain.recipe_loss import (
    DistillationConfig,
    GlobalContrastConfig,
    HardNegativesConfig,
    InfoNCEConfig,
    Loss,
    MultiPositiveConfig,
    SigmoidConfig,
)
from pretrain.soft_targets import Teacher, distillation_loss, hard_negative_info_nce, multi_positive_info_nce
from pretrain.terms import Terms

Features = tuple[Tensor, ...]
"""Image features `(b, d)`, text features `(b, d)`, exponentiated logit_scale, and logit_bias of a model that has it.

Of `data.captions_per_image` k above one, text features are `(b, k, d)`."""
Objective = Callable[..., Tensor]
"""`objective(features, images, tokens, *more)`: this rank's loss; its gradients are exact after their mean over ranks.

`more` are the further columns of the batch that `pretrain.inputs.input_names` names."""

# Strings on which two tokenizers must agree before one's tokens are given to the other's model.
PROBES = ("a photo of a cat", "Zwölf naïve façades — 3.14 €?", "", "two brown dogs running " * 40)


def build_objective(
    config: Loss, encoder: Encoder, terms: Terms | None = None, means: SampleMeans | None = None
) -> Objective:
    """Make the loss of a recipe, and give the model the parameters that it needs.

    Args:
        config: The recipe's `loss`.
        terms: What is added to it; its outputs are the last of the features.
        encoder: The student. The sigmoid loss gives its model a logit_bias; the others lock one that is there,
            since a shift of all logits means nothing to a softmax.
        means: What `global_contrast` remembers of each sample; None is for trying it on noise: every sample is new.

    Returns:
        The objective.

    Raises:
        ValueError: A teacher whose input is not the student's.
    """
    objective = build_contrast(config, encoder, means)
    if not terms:
        return objective
    count, taken = terms.outputs, int("self_supervision" in terms)

    def with_terms(features: Features, images: Tensor, tokens: Tensor, *more: Tensor) -> Tensor:
        own, outputs = features[:-count], features[-count:]
        return objective(own, images, tokens, *more[taken:]) + terms.loss(outputs, own, tokens)

    return with_terms


def build_contrast(config: Loss, encoder: Encoder, means: SampleMeans | None = None) -> Objective:
    """`build_objective` without terms."""
    if isinstance(config, SigmoidConfig):
        add_logit_bias(encoder, config)
        return lambda features, images, tokens: sigmoid_of(config, features)
    if getattr(encoder.model, "logit_bias", None) is not None:
        encoder.model.logit_bias.requires_grad_(False)
    if isinstance(config, MultiPositiveConfig):
        return lambda features, images, tokens: multi_positive_of(config, features, tokens)
    if isinstance(config, HardNegativesConfig):
        beta = config.beta
        return lambda features, images, tokens: hard_negative_info_nce(*features[:3], beta=beta)
    if isinstance(config, GlobalContrastConfig):
        return lambda features, images, tokens, indices: global_of(config, features, indices, means)
    if isinstance(config, DistillationConfig):
        return Distillation(config, encoder)
    return lambda features, images, tokens: info_nce_of(config, features)


def info_nce_of(config: InfoNCEConfig, features: Features) -> Tensor:
    """InfoNCE as the recipe has it."""
    loss = distributed_info_nce(*features[:3], tile=config.tile, exchange=config.exchange)
    if config.label_smoothing:
        loss = loss + config.label_smoothing * smoothing_term(*features[:3])
    return loss


def multi_positive_of(config: MultiPositiveConfig, features: Features, tokens: Tensor) -> Tensor:
    """An image's positives are its own captions and those that equal one of them."""
    images, texts, scale = features[:3]
    ids = text_ids(tokens)  # (b,) or (b, k)
    return multi_positive_info_nce(
        images, texts.flatten(0, -2), scale, ids, ids.flatten(), label_smoothing=config.label_smoothing
    )


def global_of(
    config: GlobalContrastConfig, features: Features, indices: Tensor, means: SampleMeans | None
) -> Tensor:
    """The global estimator as the recipe has it; `indices` are those of this rank's samples in the set."""
    if means is None:
        means, indices = SampleMeans(len(indices)).to(indices.device), torch.arange(len(indices)).to(indices)
    images, texts, scale = features[:3]
    loss = global_info_nce(images, texts, scale, indices, means, gamma=config.gamma, floor=config.floor)
    means.exchange(indices)
    return loss


def sigmoid_of(config: SigmoidConfig, features: Features) -> Tensor:
    """The sigmoid loss as the recipe has it."""
    images, texts, scale, bias = features
    return distributed_sigmoid_loss(images, texts, scale, bias, tile=config.tile, exchange=config.exchange)


def add_logit_bias(encoder: Encoder, config: SigmoidConfig) -> None:
    """Give a model that was not made for the sigmoid loss its bias and SigLIP's first scale.

    One that has a bias keeps it and its scale. The checkpoint's configuration says so too, so that stock
    open_clip opens it.
    """
    model = encoder.model
    if getattr(model, "logit_bias", None) is not None:
        return
    with torch.no_grad():
        model.logit_scale.fill_(math.log(config.init_scale))
    model.logit_bias = nn.Parameter(torch.full_like(model.logit_scale, config.init_bias))
    encoder.model_cfg = {**encoder.model_cfg, "init_logit_bias": config.init_bias}


def text_ids(tokens: Tensor) -> Tensor:
    """An int64 for each row of tokens, equal for equal rows and, but for one chance in 2^60, different for others.

    Args:
        tokens: int64 `(..., context)`.

    Returns:
        int64 `(...)`.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, tokens.shape[-1:], generator=generator) * 2 + 1
    return (tokens * factors.to(tokens.device)).sum(-1)  # wraps around


class Distillation:
    """InfoNCE and agreement with teachers that see the same pixels and texts, now or when they were stored."""

    def __init__(self, config: DistillationConfig, encoder: Encoder):
        self.config = config
        self.teachers = [load_encoder(name, device=str(encoder.device)) for name in config.teachers]
        for name, teacher in zip(config.teachers, self.teachers, strict=True):
            if teacher.image_size != encoder.image_size:
                raise ValueError(
                    f"loss.teachers: {name} takes pictures of {teacher.image_size} pixels, the student of "
                    f"{encoder.image_size}: take a teacher of the same size, or store what it says "
                    "(`pairstream pretrain reinforce`), which may be of any"
                )
            ours, theirs = encoder.tokenize(PROBES), teacher.tokenize(PROBES)
            if ours.shape != theirs.shape or not torch.equal(ours, theirs):
                raise ValueError(
                    f"loss.teachers: {name} has another tokenizer or context length than the student "
                    f"({tuple(theirs.shape)} and {tuple(ours.shape)} for the same texts): store what it says "
                    "(`pairstream pretrain reinforce`), which may have any"
                )
            teacher.model.requires_grad_(False)

    def __call__(self, features: Features, images: Tensor, tokens: Tensor, *stored: Tensor) -> Tensor:
        image_features, text_features, scale = features[:3]
        loss = (1 - self.config.weight) * distributed_info_nce(image_features, text_features, scale)
        said = [
            Teacher(
                teacher.encode_images(images), teacher.encode_texts(tokens), teacher.model.logit_scale.exp()
            )
            for teacher in self.teachers
        ]
        # Three columns a teacher; the rows of a batch are of one model, so that one scale speaks for all.
        said += [Teacher(stored[at], stored[at + 1], stored[at + 2][0]) for at in range(0, len(stored), 3)]
        shares = self.config.shares or [1.0] * len(said)
        said = [teacher._replace(share=share) for teacher, share in zip(said, shares, strict=True)]
        return loss + self.config.weight * distillation_loss(image_features, text_features, scale, said)
