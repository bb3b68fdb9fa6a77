"""Texts: which tokens make which word, and how much each word matters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from explain.attention import record_attention
from explain.perturb import leave_one_out, lime, shap_values, word_players
from explain.relevance import chefer_relevance, rollout
from pairstream.errors import require
from pretrain.encoder import Encoder
from pretrain.short_texts import reads_at_the_end, text_features, text_tower

Words = list[tuple[str, float]]
TextScores = Callable[[Sequence[str]], Tensor]


def token_words(encoder: Encoder, text: str) -> tuple[list[str], list[int]]:
    """The words of a text, and the word that each token of its row belongs to.

    Args:
        encoder: Whose tokenizer cuts.
        text: As it was given.

    Returns:
        Words as they stand in the text, and for each token the number of its word, -1 for marks and padding. Words
        behind the context length have no token.

    Raises:
        TypeError: A tokenizer of an unknown kind.
    """
    length = encoder.tokenize([text]).shape[1]
    of = [-1] * length
    tokenizer: Any = encoder.tokenizer
    if isinstance(tokenizer, SimpleTokenizer):
        clean = tokenizer.clean_fn(text).split()
        place = 1  # behind the start token
        for number, word in enumerate(clean):
            for _ in tokenizer.encode(word):
                if place < length - 1:
                    of[place] = number
                place += 1
        words = text.split()
        return (words if len(words) == len(clean) else clean), of
    if isinstance(tokenizer, HFTokenizer) and getattr(tokenizer.tokenizer, "is_fast", False):
        clean = tokenizer.clean_fn(text)
        found: Any = tokenizer.tokenizer
        coded = found(clean, truncation=True, max_length=length, return_offsets_mapping=True)
        words, places = offset_words(clean, coded["offset_mapping"])
        return words, (places + of)[:length]
    raise TypeError(f"{encoder.name}: no words known for a tokenizer {type(tokenizer).__name__}")


def offset_words(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[list[str], list[int]]:
    """Words of a text, and the word of each piece by its place in the text; -1 for pieces without one.

    Example:
        >>> offset_words("two cats", [(0, 0), (0, 3), (3, 6), (6, 8)])
        (['two', 'cats'], [-1, 0, 1, 1])
    """
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    places = []
    for start, stop in offsets:
        inside = [n for n, (first, last) in enumerate(spans) if start < last and first < stop]
        places.append(inside[0] if stop > start and inside else -1)
    return [text[first:last] for first, last in spans], places


def merge_tokens(values: Tensor, of: Sequence[int], words: Sequence[str]) -> Words:
    """Sum the tokens' relevance `(n,)` over each word."""
    sums = [0.0] * len(words)
    for value, word in zip(values.tolist(), of, strict=False):
        if word >= 0:
            sums[word] += value
    return list(zip(words, sums, strict=True))


def word_relevance(encoder: Encoder, image_row: Tensor, text: str, method: str) -> Words:
    """How much each word of a text matters for its cosine with a picture.

    Args:
        encoder: The dual encoder.
        image_row: The picture's unit row, `(d,)`.
        text: The text.
        method: `chefer`, `rollout`, `occlusion` (leave a word out), `integrated_gradients`, `lime` or `shap`.

    Returns:
        Words with their relevance. Chefer's and rollout's are not negative, the others signed.

    Raises:
        ValueError: No words, or a method that this text tower does not allow.
        ImportError: The extra `explain` is not installed.
    """
    if method in ("occlusion", "lime", "shap"):
        return perturbed_words(text, lambda texts: encoder.encode_texts(texts) @ image_row, method)
    words, of = token_words(encoder, text)
    if not words:
        raise ValueError("an empty text has no words to explain: give some")
    tokens = encoder.tokenize([text]).to(encoder.device)
    if method == "integrated_gradients":
        return merge_tokens(integrated_tokens(encoder, image_row, tokens), of, words)
    return merge_tokens(attended_tokens(encoder, image_row, tokens, ask=method == "chefer"), of, words)


def perturbed_words(text: str, scores: TextScores, method: str) -> Words:
    """Relevance of words by leaving them out: `occlusion` one at a time, `lime` or `shap`.

    Raises:
        ValueError: No words.
    """
    words = text.split()
    if not words:
        raise ValueError("an empty text has no words to explain: give some")
    players = word_players(words, scores)
    kinds: dict[str, Callable[[Any, int], np.ndarray]] = {
        "occlusion": leave_one_out,
        "lime": lime,
        "shap": shap_values,
    }
    return list(zip(words, kinds[method](players, len(words)).tolist(), strict=True))


def attended_tokens(encoder: Encoder, image_row: Tensor, tokens: Tensor, *, ask: bool) -> Tensor:
    """Relevance of tokens `(n,)` by the text tower's attention: Chefer's, or rollout where `ask` is False.

    Raises:
        ValueError: A tower without attention that can be watched.
    """
    model: Any = encoder.model
    tower = text_tower(model)
    inside = [tower.transformer] if hasattr(tower, "transformer") else [model.text]
    with torch.enable_grad(), record_attention(*inside) as weights:
        row = F.normalize(text_features(model, tokens).float(), dim=-1)
    if not weights:
        raise ValueError(
            f"{encoder.name}: its text tower has no attention that can be watched: take occlusion"
        )
    gradients = torch.autograd.grad((row[0] * image_row).sum(), weights)
    count = weights[-1].shape[2]
    start = row.new_zeros(1, count)
    if reads_at_the_end(tower):
        pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax"))
        eos = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
        end = tokens if pool == "argmax" else (tokens == eos).int()
        start[0, int(end[0].argmax())] = 1
    elif (
        type(getattr(tower, "pooler", None)).__name__ == "ClsPooler"
        or getattr(tower, "pool_type", "") == "first"
    ):
        start[0, 0] = 1
    elif getattr(tower, "pool_type", "") == "last":
        start[0, -1] = 1
    else:
        there = (tokens[0, :count] != getattr(encoder.tokenizer, "pad_token_id", 0)).float()
        start[0] = there / there.sum()
    weights = [weight.detach() for weight in weights]
    return (chefer_relevance(weights, gradients, start) if ask else rollout(weights, start))[0]


def integrated_tokens(encoder: Encoder, image_row: Tensor, tokens: Tensor, *, steps: int = 32) -> Tensor:
    """Integrated gradients over token embeddings `(n,)`, from padding in place of every content token.

    Raises:
        ValueError: A text tower without a `token_embedding`.
    """
    captum = require("captum.attr", "explain", "integrated gradients")
    tower: Any = text_tower(encoder.model)
    if not reads_at_the_end(tower):
        raise ValueError(
            f"{encoder.name}: integrated gradients of words need open_clip's own text tower: take occlusion"
        )
    end = int((tokens[0] == tokens[0].max()).int().argmax())
    blank = tokens.clone()
    blank[0, 1:end] = 0
    method = captum.LayerIntegratedGradients(
        lambda rows: F.normalize(text_features(encoder.model, rows).float(), dim=-1) @ image_row,
        tower.token_embedding,
    )
    with torch.enable_grad():
        found = method.attribute(tokens, baselines=blank, n_steps=steps)
    return found.detach()[0].sum(-1).float()
