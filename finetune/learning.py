"""Learning: the summed cross-entropy of texts after their pictures, teacher-forced."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.text import IGNORED


class Learns:
    """What a model with a connector and a language model needs to learn; see `finetune.model.VisionLanguageModel`."""

    connector: Any
    language_model: Any
    length_groups: int
    image_tokens: Any

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        image_of_text: Tensor | None = None,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        weights: Tensor | None = None,
        slots: Tensor | None = None,
        owner: Tensor | None = None,
        pictures: Tensor | None = None,
    ) -> Tensor:
        """Summed cross-entropy of the answers.

        Args:
            input_ids: int64 `(n, length)`, prompt and answer, padded on the right.
            attention_mask: int64 `(n, length)`, 0 on padding.
            labels: int64 `(n, length)`, -100 on prompt and padding.
            image_of_text: int64 `(n,)`, each text's picture in the batch; None where rows hold several.
            images: uint8 `(b, 3, h, w)`; or
            tokens: float `(b, n_tokens, token_dim)`, what `image_tokens` made of them earlier.
            weights: float `(n,)`, what each text counts; 1 for all when None.
            slots: int64 `(n, length)`, where pictures stand in rows of several; see `finetune.rows.Rows.pack`.
            owner: int64 `(n, length)`, the picture of its row that a position belongs to, from 1.
            pictures: int64 `(n, s)`, each row's pictures.

        Returns:
            A scalar: the sum, not the mean, so that the caller can divide by the tokens of all ranks.
        """
        if tokens is None:
            assert images is not None, "give images or their tokens"
            tokens = self.image_tokens(images)
        memory = self.connector(tokens)  # (b, p, width)
        texts = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "weights": weights,
            "image_of_text": image_of_text,
            "slots": slots,
            "owner": owner,
            "pictures": pictures,
        }
        if self.length_groups == 1:
            return self.loss_of(memory, **texts)
        total = memory.new_zeros(())
        lengths = attention_mask.sum(dim=1)
        for rows in lengths.argsort(stable=True).chunk(self.length_groups):
            longest = int(lengths[rows[-1]])
            group: dict[str, Any] = {
                name: None if value is None else value[rows] for name, value in texts.items()
            }
            for name in ("input_ids", "attention_mask", "labels", "slots", "owner"):
                group[name] = None if group[name] is None else group[name][:, :longest]
            total = total + self.loss_of(memory, **group)
        return total

    def loss_of(
        self,
        memory: Tensor,
        *,
        input_ids: Any,
        attention_mask: Any,
        labels: Any,
        weights: Any = None,
        image_of_text: Any = None,
        slots: Any = None,
        owner: Any = None,
        pictures: Any = None,
    ) -> Tensor:
        """Summed cross-entropy of texts after the pictures of a batch `(b, p, width)`; see `forward`."""
        words = self.language_model.get_input_embeddings()(input_ids)  # (n, length, width)
        if slots is None:
            own = memory[image_of_text]  # (n, p, width)
            prefix = self.connector.prefix(own).to(words.dtype)  # (n, prefix, width)
            self.connector.look(own)
            embeddings = torch.cat([prefix, words], dim=1)
            seen = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], dim=1)
            before = prefix.shape[1]
        else:
            places = self.connector.prefix(memory).flatten(0, 1).to(words.dtype)  # (b * prefix, width)
            embeddings = torch.where((slots >= 0)[..., None], places[slots.clamp(min=0)], words)
            several = pictures[:, : int(owner.max())]  # of a group of short rows, fewer than of all
            self.connector.look(memory[several].flatten(1, 2), owner)
            seen, before = attention_mask, 0
        # A word is predicted one position before it stands. Columns without a label need no (costly) logits.
        columns = (labels != IGNORED).any(dim=0).nonzero()[:, 0]
        logits = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=seen,
            logits_to_keep=columns + before - 1,
            use_cache=False,
        ).logits  # (n, columns, vocabulary)
        flat, expected = logits.flatten(0, 1).float(), labels[:, columns].flatten()
        if weights is None:
            return F.cross_entropy(flat, expected, ignore_index=IGNORED, reduction="sum")
        each = F.cross_entropy(flat, expected, ignore_index=IGNORED, reduction="none")
        return (each.view(len(labels), -1).sum(dim=1) * weights).sum()

    @staticmethod
    def targets(labels: Tensor) -> Tensor:
        """How many tokens of a batch have to be learnt: what the loss is divided by."""
        return labels.ne(IGNORED).sum()
