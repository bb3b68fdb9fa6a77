"""What is added to a contrastive loss: terms with weights, each with its own outputs of the network and parameters.

A term has a part inside the network (`Term.forward`), which runs row by row, so that micro-batches and processes may
divide a batch, and a loss of its outputs over the whole batch (`Term.loss`). Its parameters train and are resumed with
the run, and are no part of the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from torch import Tensor, nn

from pretrain import recipe_loss
from pretrain.collectives import several_ranks, sum_over_ranks
from pretrain.encoder import Encoder
from pretrain.recipe_loss import AlignmentConfig, CaptioningConfig, SelfSupervisionConfig
from pretrain.term_losses import (
    adversarial_loss,
    caption_entropies,
    caption_loss,
    nt_xent,
    reverse_gradient,
)


class Seen(NamedTuple):
    """What the network has computed of some rows when the terms' turn comes."""

    image_features: Tensor
    """`(b, d)`, rows of length one."""
    text_features: Tensor
    """`(b, d)` or `(b, k, d)`"""
    tokens: Tensor
    """int64 `(b, context)` or `(b, k, context)`"""
    embed: Callable[[Tensor], Tensor]
    """uint8 pictures `(n, 3, h, w)` to embeddings `(n, d)`, not normalised."""
    views: Tensor | None = None
    """uint8 `(b, 2, 3, h, w)`, if a term wants them."""
    image_tokens: Tensor | None = None
    """`(b, n, width)` that CoCa's decoder looks at, if a term wants them."""
    text_tokens: Tensor | None = None
    """`(b * k, context, width)` of CoCa's text tower."""


class Term(nn.Module, ABC):
    """One term: a subclass says what it adds to the network, what that costs, and what the log has of it.

    Attributes:
        outputs: How many tensors `forward` gives.
    """

    outputs = 1

    @abstractmethod
    def forward(self, seen: Seen) -> tuple[Tensor, ...]:
        """The outputs for some rows, which may be part of a batch: a row must not depend on the others.

        Returns:
            `outputs` tensors of their own memory (no views), each with a row for each pair.
        """

    @abstractmethod
    def loss(self, outputs: tuple[Tensor, ...], features: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        """This rank's weighted share of the term: the mean over ranks is the term of the whole batch.

        Args:
            outputs: What `forward` gave, of all this rank's rows.
            features: Those of the contrastive loss: images `(b, d)`, texts `(b, d)` or `(b, k, d)`, and scalars.
            tokens: int64 `(b, context)` or `(b, k, context)`.

        Returns:
            Scalar.
        """

    @abstractmethod
    def record(self) -> dict[str, float]:
        """Numbers of the last step for the log; every rank must call it, and it waits for the device.

        Returns:
            Nothing where there was no step since the last call.
        """


class Alignment(Term):
    """A critic that learns to tell pictures' embeddings from texts', and towers that learn to leave it nothing.

    Args:
        config: The recipe's `terms.alignment`.
        width: Of the embeddings.
    """

    outputs = 2

    def __init__(self, config: AlignmentConfig, width: int):
        super().__init__()
        self.config = config
        self.scale = math.sqrt(width)  # entries of a row of length one are small
        self.critic = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1))
        self.sums: Tensor | None = None

    def forward(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """The critic's logits of pictures `(b,)` and texts `(b,)` or `(b, k)`."""
        sides = seen.image_features, seen.text_features
        told = [self.critic(self.scale * reverse_gradient(side, self.config.weight)) for side in sides]
        return told[0].sum(-1), told[1].sum(-1)  # of one logit each

    def loss(self, outputs: tuple[Tensor, ...], features: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        images, texts = outputs
        value = adversarial_loss(images, texts)
        with torch.no_grad():
            entropies = F.softplus(-images).sum(), F.softplus(texts).sum()
            right = (images > 0).sum(), (texts < 0).sum()
            counts = images.new_tensor([images.numel(), texts.numel()])
            self.sums = torch.cat(
                [
                    counts,
                    torch.stack([*entropies, *right]).to(images.dtype),
                    features[0].sum(0),
                    features[1].flatten(0, -2).sum(0),
                ]
            )
        return value

    def record(self) -> dict[str, float]:
        """`critic_loss`, `critic_accuracy` (0.5: it cannot tell them), and `modality_gap`.

        The last is the distance of the mean picture and the mean text, as `retrieval.diagnostics` has it.
        """
        taken, self.sums = self.sums, None
        if taken is None:
            return {}
        sums = sum_over_ranks(taken.double())
        counts, entropies, right = sums[:6].view(3, 2)
        means = sums[6:].view(2, -1) / counts[:, None]
        return {
            "critic_loss": float((entropies / counts).mean()),
            "critic_accuracy": float((right / counts).mean()),
            "modality_gap": float((means[0] - means[1]).norm()),
        }


class SelfSupervision(Term):
    """SimCLR on two more views of each picture, through an MLP on the image embedding.

    SLIP puts its MLP on the image tower's features before the projection; the embedding itself is what every tower
    has. Layer norms stand for the paper's batch norms, so that micro-batches and processes may divide a batch.

    Args:
        config: The recipe's `terms.self_supervision`.
        width: Of the embeddings.
    """

    def __init__(self, config: SelfSupervisionConfig, width: int):
        super().__init__()
        self.config = config
        widths = [width, config.hidden, config.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(config.hidden, config.embed_dim))
        self.value: Tensor | None = None

    def forward(self, seen: Seen) -> tuple[Tensor]:
        """`(b, 2, embed_dim)`, rows of length one."""
        assert seen.views is not None, "the network takes views where this term is"
        found = self.mlp(seen.embed(seen.views.flatten(0, 1)))
        return (F.normalize(found.unflatten(0, (-1, 2)), dim=-1),)

    def loss(self, outputs: tuple[Tensor, ...], features: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        first, second = outputs[0].unbind(1)
        value = nt_xent(first, second, self.config.temperature)
        self.value = value.detach()
        return self.config.weight * value

    def record(self) -> dict[str, float]:
        """`self_supervision_loss`, unweighted."""
        value, self.value = self.value, None
        return {} if value is None else {"self_supervision_loss": mean_over_ranks(value)}


class Captioning(Term):
    """CoCa's term: its decoder reads picture and caption, and says each next token.

    Args:
        config: The recipe's `terms.captioning`.
        model: The student, whose decoder it is.
    """

    def __init__(self, config: CaptioningConfig, model: CoCa):
        super().__init__()
        self.config, self.pad = config, model.pad_id
        self.decoder = [model.text_decoder]  # in a list: its parameters are the model's
        self.value: Tensor | None = None

    def forward(self, seen: Seen) -> tuple[Tensor]:
        """Cross-entropy summed over each caption, `(b,)` or `(b, k)`."""
        assert seen.image_tokens is not None
        assert seen.text_tokens is not None
        tokens = seen.tokens.flatten(0, -2)  # (b * k, context)
        images = seen.image_tokens.repeat_interleave(len(tokens) // len(seen.image_tokens), dim=0)
        logits = self.decoder[0](images, seen.text_tokens[:, :-1])  # (b * k, context - 1, vocabulary)
        return (caption_entropies(logits, tokens, self.pad).unflatten(0, seen.tokens.shape[:-1]).clone(),)

    def loss(self, outputs: tuple[Tensor, ...], features: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        value = caption_loss(outputs[0], tokens, self.pad)
        self.value = value.detach()
        return self.config.weight * value

    def record(self) -> dict[str, float]:
        """`caption_loss`, nats a token, unweighted."""
        value, self.value = self.value, None
        return {} if value is None else {"caption_loss": mean_over_ranks(value)}


class Terms(nn.ModuleDict):
    """All terms of a recipe, by name; none is an empty one."""

    @property
    def outputs(self) -> int:
        """Tensors that the terms add to the network's."""
        terms: Any = self
        return sum(terms[name].outputs for name in terms)

    def forward(self, seen: Seen) -> tuple[Tensor, ...]:
        """All outputs, in order."""
        return tuple(output for name in self for output in self[name](seen))

    def loss(self, outputs: tuple[Tensor, ...], features: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        """The sum of the weighted terms."""
        left, total = list(outputs), features[0].new_zeros(())
        for name in self:
            term: Any = self[name]
            own = tuple(left.pop(0) for _ in range(term.outputs))
            total = total + term.loss(own, features, tokens)
        return total

    def record(self) -> dict[str, float]:
        """The log's part of the last step."""
        found: dict[str, float] = {}
        for name in self:
            term: Any = self[name]
            found |= term.record()
        return found


def build_terms(config: recipe_loss.TermsConfig | None, encoder: Encoder) -> Terms:
    """Make the terms of a recipe, with random parameters.

    Args:
        config: The recipe's `terms`.
        encoder: The student. A decoder that nothing trains is locked.

    Returns:
        The terms, on the encoder's device.

    Raises:
        ValueError: Captioning with a model that has no decoder.
    """
    config = config or recipe_loss.TermsConfig()
    terms, model = Terms(), encoder.model
    if isinstance(model, CoCa):
        model.text_decoder.requires_grad_(config.captioning is not None)
    if config.alignment:
        terms["alignment"] = Alignment(config.alignment, encoder.embed_dim)
    if config.self_supervision:
        terms["self_supervision"] = SelfSupervision(config.self_supervision, encoder.embed_dim)
    if config.captioning:
        if not isinstance(model, CoCa):
            raise ValueError(
                f"terms.captioning: {type(model).__name__} has no decoder: take a CoCa model of open_clip's "
                "(coca_ViT-B-32), or give model.decoder to towers"
            )
        terms["captioning"] = Captioning(config.captioning, model)
    return terms.to(encoder.device)


def mean_over_ranks(value: Tensor) -> float:
    """Of a scalar that each rank has."""
    world = torch.distributed.get_world_size() if several_ranks() else 1
    return float(sum_over_ranks(value) / world)
