"""The fusion model: two towers' features, a fusion head, and one output a label, answer or judgement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from finetune.fusion.heads import build_head
from finetune.fusion.inputs import channel_scale, token_grid
from finetune.fusion.recipe import ChooseTask, ClassifyTask, MatchTask, Pooled
from finetune.fusion.samples import MATCHES
from finetune.saved import TaskModel, finite
from finetune.text import IGNORED
from finetune.tower_adapters import train_adapters_alone
from pretrain.checkpoint import save_tensors
from pretrain.encoder import Encoder
from pretrain.short_texts import text_features, text_tokens

WEIGHTS = "fusion.safetensors"
Picture = Image.Image | bytes | Tensor


class FusionClassifier(TaskModel):
    """Labels a picture and its text, chooses an answer to a question, or tells whether they match.

    Picture or text may be missing. Pooled heads take the encoder's two embeddings (one vector each); the others the
    towers' last tokens. A missing modality is replaced by learnt vectors, which modality dropout trains.

    Args:
        encoder: The dual encoder.
        task: Fusion head, dropout and freezing; and what is done with the outputs.
        labels: The labels or answers, in the order of the outputs.
        freeze_image_tower: Compute no gradient for the image tower.

    Attributes:
        image_mean: With `task.standardise`, of each channel of the image features, float `(d,)`;
        image_scale: and what it is multiplied with once that is subtracted.

    Raises:
        ValueError: Too few labels.
        TypeError: A head of tokens over a text tower that gives none.

    Example:
        >>> model = load_classifier("runs/scenes_sentiment")                       # doctest: +SKIP
        >>> model.classify([Image.open("post.jpg")], ["what a day"])               # doctest: +SKIP
        [{'negative': 0.01, 'neutral': 0.02, 'positive': 0.97}]
    """

    image_mean: Tensor
    image_scale: Tensor

    def __init__(
        self,
        encoder: Encoder,
        task: ClassifyTask | ChooseTask | MatchTask,
        labels: Sequence[str],
        *,
        freeze_image_tower: bool = True,
    ):
        super().__init__()
        self.several = isinstance(task, ClassifyTask) and task.several
        if len(labels) < (1 if self.several else 2):
            raise ValueError(f"a classifier needs at least two labels, got {list(labels)}")
        self.encoder, self.task, self.labels = encoder, task, list(labels)
        self.freeze_image_tower = freeze_image_tower
        self.pooled = isinstance(task.fusion, Pooled)
        self.image_pooled = isinstance(task.fusion, Pooled) and task.fusion.picture == "embedding"
        self.towers = encoder.model
        self.kept_texts: dict[bytes, Tensor] = {}
        blank = torch.zeros(1, 3, *encoder.image_size, dtype=torch.uint8)
        words = encoder.tokenize([""])
        with torch.no_grad():
            image, text = self.image_features(blank), self.text_features(words)
        self.head = build_head(
            task.fusion,
            image_dim=image.shape[-1],
            text_dim=text.shape[-1],
            norm_image=not task.standardise,
            grid=token_grid(image.shape[1], encoder.image_size),
        )
        self.missing_image = nn.Parameter(torch.randn(image.shape[-1]) * 0.02)
        self.missing_text = nn.Parameter(torch.randn(text.shape[-1]) * 0.02)
        self.dropout = nn.Dropout(task.dropout)
        self.output = nn.Linear(self.head.width, len(self.labels))
        self.register_buffer("class_weights", torch.ones(len(self.labels)), persistent=False)
        if task.standardise:  # of the training pictures, see `learn_scale`
            self.register_buffer("image_mean", torch.zeros(image.shape[-1]))
            self.register_buffer("image_scale", torch.ones(image.shape[-1]))
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
        train_adapters_alone(self.towers.visual)
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
        """uint8 `(b, 3, h, w)` to float `(b, n, d)`: the embedding (n = 1), or what `gather` makes of the tokens."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_image_tower):
            if self.image_pooled:
                return self.towers.encode_image(self.encoder.pixels(images)).unsqueeze(1)
            return self.gather(self.encoder.tokens_of(self.encoder.pixels(images), finer=self.finer))

    @property
    def finer(self) -> bool:
        """Whether the head looks at the finer ones of the image tower's tokens."""
        return self.task.fusion.picture == "finer_tokens"

    def gather(self, tokens: Tensor) -> Tensor:
        """The image tower's tokens `(b, n, d)` to what the head gets of them: all, or one vector `(b, 1, d)`."""
        fusion = self.task.fusion
        if not isinstance(fusion, Pooled):
            return tokens
        mean = tokens.mean(dim=1, keepdim=True)
        if fusion.picture == "tokens":
            return mean
        return torch.cat([mean, tokens.amax(dim=1, keepdim=True)], dim=-1)

    @torch.no_grad()
    def expect(self, shares: Sequence[float]) -> None:
        """Begin with logistic outputs that say how often each is right in training, `(labels,)`, instead of a half.

        Of many answers each is rarely right: the first hundreds of steps would teach that and little else.
        """
        rates = torch.tensor(shares, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        self.output.bias.copy_(rates.logit())

    @torch.no_grad()
    def learn_scale(self, features: Tensor, rows: Sequence[int]) -> None:
        """Take mean and deviation of each channel from the training pictures; a channel that never changes becomes 0.

        Args:
            features: float `(samples, n, d)`, what `image_tokens` made of them.
            rows: Those that count.
        """
        mean, scale = channel_scale(features, rows)
        self.image_mean.copy_(mean)
        self.image_scale.copy_(scale)

    @torch.no_grad()
    def keep_texts(self, texts: Iterable[str]) -> None:
        """Read texts once, for training a pooled head over a text tower that is frozen."""
        # In an order and in batches of their own, so that a resumed run has the same to the last bit.
        rows = sorted(texts, key=lambda text: (len(text), text))
        parts = [self.encoder.tokenize(rows[start : start + 64]) for start in range(0, len(rows), 64)]
        features = torch.cat([self.text_features(part) for part in parts])
        tokens = [row.numpy().tobytes() for part in parts for row in part]
        self.kept_texts = dict(zip(tokens, features, strict=True))

    def text_features(self, text: Tensor) -> Tensor:
        """int64 tokens `(b, m)` to float `(b, 1, d)`, the embedding, or `(b, k, d)`, the tower's tokens.

        Places behind the longest text are left out where that changes nothing, so that k may be less than m.
        """
        if self.training and self.kept_texts:
            kept = [self.kept_texts.get(row.tobytes()) for row in text.cpu().numpy()]
            if all(feature is not None for feature in kept):
                return torch.stack(kept)  # pyright: ignore[reportArgumentType]
        text = text.to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.task.freeze_text_tower):
            if self.pooled:
                return text_features(self.towers, text).unsqueeze(1)
            try:
                return text_tokens(self.towers, text)
            except AttributeError as error:
                raise TypeError(
                    f"{self.encoder.name}: its text tower gives no tokens: take task.fusion.kind tanh, concat or gated"
                ) from error

    @property
    def logistic(self) -> bool:
        """Whether each output is judged alone (sigmoid), or all of them share one (softmax)."""
        return self.several or isinstance(self.task, ChooseTask)

    def forward(
        self,
        text: Tensor,
        text_missing: Tensor,
        labels: Tensor,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        image_of_text: Tensor | None = None,
        text_of: Tensor | None = None,
    ) -> Tensor:
        """Summed cross-entropy, classes weighted.

        Args:
            text: int64 `(n, m)`, tokens; or `(k, m)`, the different ones, with `text_of`.
            text_missing: bool `(n,)`.
            labels: int64 `(n,)`, the label of each text, -100 for those without one; or float `(n, labels)` from 0 to
                1 (soft targets, several labels), a row of -100 for those without any.
            images: uint8 `(b, 3, h, w)`; or
            tokens: float `(b, n_tokens, d)`, what `image_tokens` made of them earlier.
            image_of_text: int64 `(n,)`, each text's picture in the batch; one text a picture when None.
            text_of: int64 `(n,)`, each sample's row of `text`, so that a text that many samples have is read once.

        Returns:
            A scalar: the sum, not the mean, so that the caller can divide by `targets` of all ranks.
        """
        if tokens is None:
            assert images is not None, "give images or their features"
            tokens = self.image_features(images)
        no_image = torch.zeros_like(text_missing)
        if self.training and self.task.modality_dropout:
            draw = torch.rand(len(text_missing), device=text.device)
            share = self.task.modality_dropout
            no_image = (draw < share) & ~text_missing
            text_missing = text_missing | ((draw >= share) & (draw < 2 * share))
        logits = self.logits(tokens, text, no_image, text_missing, text_of, image_of_text).float()
        weights: Any = self.class_weights
        if labels.ndim == 1:
            return F.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORED, reduction="sum")
        # Rows without labels are multiplied away and not cut out, so that no step waits for the device.
        known = labels.ne(IGNORED)
        losses = F.binary_cross_entropy_with_logits(
            logits, labels.clamp(min=0), pos_weight=weights, reduction="none"
        )
        return (losses * known).sum()

    @staticmethod
    def targets(labels: Tensor) -> Tensor:
        """How many samples of a batch have something to learn: what the loss is divided by."""
        return (labels if labels.ndim == 1 else labels[:, :1]).ne(IGNORED).sum()

    def logits(
        self,
        image: Tensor,
        text: Tensor,
        no_image: Tensor,
        no_text: Tensor,
        text_of: Tensor | None = None,
        image_of_text: Tensor | None = None,
    ) -> Tensor:
        """Features of pictures, tokens, and what is missing of each sample, to float `(n, labels)`; see `forward`."""
        words = self.text_features(text)
        if text_of is not None:
            words, text = words[text_of], text[text_of]
        if self.task.standardise:
            image = (image - self.image_mean) * self.image_scale
        nothing = self.missing_image.to(image.dtype).expand(1, image.shape[1], -1)
        own = torch.arange(len(image), device=image.device) if image_of_text is None else image_of_text
        own = torch.where(no_image, len(image), own)
        words = torch.where(no_text[:, None, None], self.missing_text.to(words.dtype), words)
        seen = text[:, : words.shape[1]].ne(0) if not self.pooled else text.new_ones(len(text), 1).bool()
        seen = seen & ~no_text[:, None]
        seen[:, 0] = True  # all that is seen of a missing text, however long its neighbours are
        return self.output(self.dropout(self.head(torch.cat([image, nothing]), words, seen, own)))

    @torch.no_grad()
    def scores(
        self,
        images: Sequence[Picture | None] | Tensor,
        texts: Sequence[str | None],
        image_of_text: Sequence[int] | None = None,
    ) -> Tensor:
        """Probabilities of all outputs.

        Args:
            images: PIL images, file contents, uint8 `(3, H, W)`, or None where there is none; or uint8
                `(b, 3, h, w)` of the model's size.
            texts: None or blank where there is none.
            image_of_text: Each text's picture; one text a picture when None.

        Returns:
            float64 `(texts, labels)` on the CPU: rows that sum to 1, or each from 0 to 1 where outputs are logistic.

        Raises:
            ValueError: Numbers differ, a sample has neither a picture nor a text, or the model's weights make numbers
                that are not finite.
            data.faults.Fault: File contents that are no picture.
        """
        if isinstance(texts, str) or (image_of_text is None and len(images) != len(texts)):
            raise ValueError(
                f"got {len(images)} pictures and {texts!r}: expected one text (or None) for each picture"
            )
        if not len(texts):
            return torch.zeros((0, len(self.labels)), dtype=torch.float64)
        written = [text if text and text.strip() else None for text in texts]
        owners = torch.arange(len(texts)) if image_of_text is None else torch.as_tensor(list(image_of_text))
        blank = torch.zeros(3, *self.encoder.image_size, dtype=torch.uint8)
        if isinstance(images, Tensor):
            no_image, pixels = torch.zeros(len(images), dtype=torch.bool), images
        else:
            no_image = torch.tensor([image is None for image in images])
            pixels = torch.stack(
                [blank if image is None else self.encoder.preprocess(image) for image in images]
            )
        no_image, no_text = no_image[owners], torch.tensor([text is None for text in written])
        if bool((no_image & no_text).any()):
            raise ValueError("a sample with neither a picture nor a text cannot be classified")
        training = self.training
        self.eval()
        different = {
            text: number for number, text in enumerate(dict.fromkeys(text or "" for text in written))
        }
        logits = self.logits(
            self.image_features(pixels),
            self.encoder.tokenize(list(different)).to(self.device),
            no_image.to(self.device),
            no_text.to(self.device),
            torch.tensor([different[text or ""] for text in written], device=self.device),
            owners.to(self.device),
        ).double()
        self.train(training)
        finite(logits)
        return (logits.sigmoid() if self.logistic else logits.softmax(dim=-1)).cpu()

    def classify(
        self, images: Sequence[Picture | None] | Tensor, texts: Sequence[str | None]
    ) -> list[dict[str, float]]:
        """Probabilities of the labels; see `scores`.

        Returns:
            Label to probability, for each pair.
        """
        return [dict(zip(self.labels, row, strict=True)) for row in self.scores(images, texts).tolist()]

    def answer(self, images: Sequence[Picture] | Tensor, questions: Sequence[str]) -> list[str]:
        """The best answer of the list to one question about each picture.

        Raises:
            ValueError: An empty question, numbers that differ, or a model for another task.
        """
        return self.answer_each(images, questions, None)

    def answer_each(
        self,
        images: Sequence[Picture] | Tensor,
        questions: Sequence[str],
        image_of_question: Sequence[int] | None,
    ) -> list[str]:
        """The best answer of the list to any number of questions about each picture, which is encoded once.

        Args:
            images: As for `scores`.
            questions: Any number.
            image_of_question: Each question's picture; one question a picture when None.

        Raises:
            ValueError: As for `answer`.
        """
        if not isinstance(self.task, ChooseTask):
            raise ValueError(f"this model was trained for {self.task.kind}: use classify(images, texts)")
        for question in questions:
            if not question.strip():
                raise ValueError("an empty question cannot be answered: expected some words")
        best = self.scores(images, questions, image_of_question).argmax(dim=1)
        return [self.labels[number] for number in best.tolist()]

    def match(self, images: Sequence[Picture] | Tensor, texts: Sequence[str]) -> list[float]:
        """How probable it is that each text belongs to its picture.

        Raises:
            ValueError: Numbers differ, or a model for another task.
        """
        if not isinstance(self.task, MatchTask):
            raise ValueError(f"this model was trained for {self.task.kind}: use classify(images, texts)")
        return self.scores(images, texts)[:, MATCHES.index("match")].tolist()

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
