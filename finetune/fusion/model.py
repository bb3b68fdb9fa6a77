"""The image-text classifier: two towers' features, a fusion head, and one output a label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.fusion.heads import build_head
from finetune.fusion.recipe import ClassifyTask, Pooled
from finetune.saved import TASK, TaskModel, opened
from pretrain.checkpoint import save_tensors
from pretrain.encoder import Encoder, load_encoder

WEIGHTS = "fusion.safetensors"
IGNORED = -100  # the label of a sample that has none
Picture = Image.Image | bytes | Tensor


class FusionClassifier(TaskModel):
    """Labels a picture and its text; either may be missing.

    Pooled heads take the encoder's two embeddings (one vector each); the others the towers' last tokens. A missing
    modality is replaced by learnt vectors, which modality dropout trains.

    Args:
        encoder: The dual encoder.
        task: Fusion head, dropout and freezing.
        labels: The labels, in the order of the outputs.
        freeze_image_tower: Compute no gradient for the image tower.

    Raises:
        ValueError: Fewer than two labels.
        TypeError: A head of tokens over a text tower that gives none.

    Example:
        >>> model = load_classifier("runs/scenes_sentiment")                       # doctest: +SKIP
        >>> model.classify([Image.open("post.jpg")], ["what a day"])               # doctest: +SKIP
        [{'negative': 0.01, 'neutral': 0.02, 'positive': 0.97}]
    """

    def __init__(
        self, encoder: Encoder, task: ClassifyTask, labels: Sequence[str], *, freeze_image_tower: bool = True
    ):
        super().__init__()
        if len(labels) < 2:
            raise ValueError(f"a classifier needs at least two labels, got {list(labels)}")
        self.encoder, self.task, self.labels = encoder, task, list(labels)
        self.freeze_image_tower = freeze_image_tower
        self.pooled = isinstance(task.fusion, Pooled)
        self.towers = encoder.model
        blank = torch.zeros(1, 3, *encoder.image_size, dtype=torch.uint8)
        words = encoder.tokenize([""])
        with torch.no_grad():
            image, text = self.image_features(blank), self.text_features(words)
        self.head = build_head(task.fusion, image_dim=image.shape[-1], text_dim=text.shape[-1])
        self.missing_image = nn.Parameter(torch.randn(image.shape[-1]) * 0.02)
        self.missing_text = nn.Parameter(torch.randn(text.shape[-1]) * 0.02)
        self.dropout = nn.Dropout(task.dropout)
        self.output = nn.Linear(self.head.width, len(self.labels))
        self.register_buffer("class_weights", torch.ones(len(self.labels)), persistent=False)
        self.to(encoder.device)
        self.freeze(blank, words)

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def freeze(self, blank: Tensor, words: Tensor) -> None:
        """Let only those parameters train that are meant to and that the output depends on."""
        image_tower = set(self.towers.visual.parameters())
        for parameter in self.towers.parameters():
            frozen = self.freeze_image_tower if parameter in image_tower else self.task.freeze_text_tower
            parameter.requires_grad_(not frozen)
        if not (self.freeze_image_tower and self.task.freeze_text_tower):
            with torch.enable_grad():
                features = self.image_features(blank), self.text_features(words)
                sum(feature.sum() for feature in features if feature.requires_grad).backward()  # pyright: ignore
            for parameter in self.towers.parameters():  # the temperature, for instance
                parameter.requires_grad_(parameter.grad is not None)
                parameter.grad = None

    def train(self, mode: bool = True) -> FusionClassifier:
        """Training mode for the head; the towers keep batch statistics and dropout as pretraining left them."""
        super().train(mode)
        self.towers.eval()
        return self

    def image_tokens(self, images: Tensor) -> Tensor:
        """What is kept of a picture whose tower is frozen; see `image_features`."""
        return self.image_features(images)

    def image_features(self, images: Tensor) -> Tensor:
        """uint8 `(b, 3, h, w)` to float `(b, n, d)`: the embedding (n = 1), or the tower's tokens."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_image_tower):
            if self.pooled:
                return self.towers.encode_image(self.encoder.pixels(images)).unsqueeze(1)
            return self.encoder.image_tokens(images)

    def text_features(self, text: Tensor) -> Tensor:
        """int64 tokens `(b, m)` to float `(b, 1, d)`, the embedding, or `(b, m, d)`, the tower's tokens."""
        text = text.to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.task.freeze_text_tower):
            if self.pooled:
                return self.towers.encode_text(text).unsqueeze(1)
            try:
                found = self.towers.forward_intermediates(
                    text=text,
                    text_indices=1,
                    normalize_intermediates=True,
                    intermediates_only=True,
                    text_output_fmt="NLC",
                )
            except AttributeError as error:
                raise TypeError(
                    f"{self.encoder.name}: its text tower gives no tokens: take task.fusion.kind tanh, concat or gated"
                ) from error
            return found["text_intermediates"][-1]

    def forward(
        self,
        text: Tensor,
        text_missing: Tensor,
        labels: Tensor,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Summed cross-entropy, classes weighted.

        Args:
            text: int64 `(b, m)`, tokens.
            text_missing: bool `(b,)`.
            labels: int64 `(b,)`, -100 for samples without one.
            images: uint8 `(b, 3, h, w)`; or
            tokens: float `(b, n, d)`, what `image_tokens` made of them earlier.

        Returns:
            A scalar: the sum, not the mean, so that the caller can divide by the labels of all ranks.
        """
        if tokens is None:
            assert images is not None, "give images or their features"
            tokens = self.image_features(images)
        no_image = torch.zeros_like(text_missing)
        if self.training and self.task.modality_dropout:
            draw = torch.rand(len(text), device=text.device)
            share = self.task.modality_dropout
            no_image = (draw < share) & ~text_missing
            text_missing = text_missing | ((draw >= share) & (draw < 2 * share))
        logits = self.logits(tokens, text, no_image, text_missing)
        return F.cross_entropy(
            logits.float(),
            labels,
            weight=self.class_weights,  # pyright: ignore
            ignore_index=IGNORED,
            reduction="sum",
        )

    def logits(self, image: Tensor, text: Tensor, no_image: Tensor, no_text: Tensor) -> Tensor:
        """Features, tokens, and what is missing, to float `(b, labels)`."""
        words = self.text_features(text)
        image = torch.where(no_image[:, None, None], self.missing_image.to(image.dtype), image)
        words = torch.where(no_text[:, None, None], self.missing_text.to(words.dtype), words)
        seen = text.ne(0) if not self.pooled else text.new_ones(len(text), 1).bool()
        seen = seen | no_text[:, None]  # a missing text is seen as such
        seen[:, 0] = True
        return self.output(self.dropout(self.head(image, words, seen)))

    @torch.no_grad()
    def classify(
        self, images: Sequence[Picture | None] | Tensor, texts: Sequence[str | None]
    ) -> list[dict[str, float]]:
        """Probabilities of the labels.

        Args:
            images: PIL images, file contents, uint8 `(3, H, W)`, or None where there is none; or uint8
                `(b, 3, h, w)` of the model's size.
            texts: As many; None or blank where there is none.

        Returns:
            Label to probability, for each.

        Raises:
            ValueError: Numbers differ, or a sample has neither a picture nor a text.
            data.faults.Fault: File contents that are no picture.
        """
        if isinstance(texts, str) or len(images) != len(texts):
            raise ValueError(
                f"got {len(images)} pictures and {texts!r}: expected one text (or None) for each picture"
            )
        if not len(texts):
            return []
        written = [text if text and text.strip() else None for text in texts]
        blank = torch.zeros(3, *self.encoder.image_size, dtype=torch.uint8)
        if isinstance(images, Tensor):
            no_image, pixels = torch.zeros(len(images), dtype=torch.bool), images
        else:
            no_image = torch.tensor([image is None for image in images])
            pixels = torch.stack(
                [blank if image is None else self.encoder.preprocess(image) for image in images]
            )
        no_text = torch.tensor([text is None for text in written])
        if bool((no_image & no_text).any()):
            raise ValueError("a sample with neither a picture nor a text cannot be classified")
        training = self.training
        self.eval()
        logits = self.logits(
            self.image_features(pixels),
            self.encoder.tokenize([text or "" for text in written]).to(self.device),
            no_image.to(self.device),
            no_text.to(self.device),
        )
        self.train(training)
        return [
            dict(zip(self.labels, row, strict=True)) for row in logits.double().softmax(dim=-1).cpu().tolist()
        ]

    def own_state(self) -> dict[str, Tensor]:
        """All but the towers, which lie in the encoder's folder."""
        return {
            name: value.detach().cpu().contiguous()
            for name, value in self.state_dict().items()
            if not name.startswith("towers.")
        }

    def write_parts(self, folder: Path) -> dict[str, Any]:
        """Head, output and learnt vectors."""
        save_tensors(self.own_state(), folder / WEIGHTS)
        return {"task": self.task.model_dump(), "labels": self.labels}


def load_classifier(
    folder: str | Path, *, device: str = "auto", freeze_image_tower: bool = True
) -> FusionClassifier:
    """Open a saved classifier; nothing is downloaded.

    Args:
        folder: What `TaskModel.save` wrote, or a run folder of `pairstream finetune`.
        device: A torch device, or `auto`.
        freeze_image_tower: For a model that goes on training.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: No task model is there.
        ValueError: It is no classifier, or a part is damaged or of another version.
    """
    with opened(folder) as (place, content):
        if content["task"]["kind"] != "classify":
            raise ValueError(f"a model for {content['task']['kind']}, not for classify")
        task, labels = ClassifyTask.model_validate(content["task"]), content["labels"]
        state = load_file(place / WEIGHTS)
    model = FusionClassifier(
        load_encoder(place / "encoder", device=device), task, labels, freeze_image_tower=freeze_image_tower
    )
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{place}: {WEIGHTS} does not fit {TASK}: {error}") from error
    absent = [name for name in missing if not name.startswith("towers.")]
    if absent or unexpected:
        raise ValueError(f"{place}: {WEIGHTS} does not fit {TASK}: {absent or unexpected}")
    return model.eval()
