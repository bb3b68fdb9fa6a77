"""Texts for the language model: its tokenizer, and prompts with answers as padded token rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "<end>"
IGNORED = -100  # the label of a position that is not learnt, as everywhere in torch and transformers


class Pair(NamedTuple):
    """One thing to learn: token ids of what is given and of what is to be written, its end included."""

    prompt: list[int]
    answer: list[int]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in small letters, trained on the texts.

    Bytes are its alphabet, so that there is no unknown word: what training never saw just takes more tokens.

    Args:
        texts: Captions, or questions and answers.
        vocabulary: Pieces at the most, 256 bytes and 2 marks included.

    Returns:
        The tokenizer, with an end and a padding token; equal texts give an equal one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer.to_str())


def wrap_tokenizer(content: str) -> PreTrainedTokenizerFast:
    """transformers' view of a tokenizer given as the JSON of the tokenizers library."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content),
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


def require_end_and_pad(tokenizer: Any, name: str) -> Any:
    """Make sure that a tokenizer can end a text and pad a batch.

    A missing padding token is no obstacle, since padding is masked by position and never by its id: the end token
    serves. A missing end token is, for a text would never stop.

    Raises:
        ValueError: There is no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {name} has neither an end nor a padding token that could stop a text: "
            "set its eos_token and save it again, or choose another language model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without start and end marks."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def make_pair(tokenizer: Any, prompt: str, answer: str) -> Pair:
    """Tokens of a prompt and of its answer; the answer is a word of its own and ends with the end token."""
    text = f" {answer.strip()}" if prompt else answer.strip()
    return Pair(token_ids(tokenizer, prompt), [*token_ids(tokenizer, text), tokenizer.eos_token_id])


def pack(pairs: Sequence[Pair], pad: int) -> dict[str, Tensor]:
    """Rows for teacher forcing, padded on the right.

    Args:
        pairs: Prompts with answers.
        pad: The padding token.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each int64 `(n, length)`; only the tokens of the answer, its end
        included, have labels.

    Example:
        >>> pack([Pair([5, 6], [7, 1]), Pair([5], [1])], pad=0)["labels"].tolist()
        [[-100, -100, 7, 1], [-100, 1, -100, -100]]
    """
    length = max((len(prompt) + len(answer) for prompt, answer in pairs), default=0)
    input_ids = torch.full((len(pairs), length), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        start, stop = len(prompt), len(prompt) + len(answer)
        input_ids[row, :stop] = torch.tensor(prompt + answer, dtype=torch.int64)
        attention_mask[row, :stop] = 1
        labels[row, start:stop] = torch.tensor(answer, dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
