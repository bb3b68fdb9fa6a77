"""Text features without the padding: what a tower does behind the end of a text changes nothing.

CLIP's tokenizer pads each text to 77 places, and captions and prompts take 10 to 25 of them. Where attention
is causal and the feature is read at the end token, or where the padding is masked (transformers' towers), the places
behind the longest text of a batch can be left out: features and gradients are the same up to rounding, at a third of
the time or less.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder, MaxPooler
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

GROUPS, ROWS = 4, 32
"""At most so many groups of like length, of about so many texts at the least."""
GRAIN = 8
"""Training cuts batches of texts to multiples of it, so that there are few shapes and tensor cores are filled."""


def text_features(model: Any, tokens: Tensor) -> Tensor:
    """open_clip's `encode_text`, over the batch's longest text only where that is the same.

    Args:
        model: open_clip's CLIP or CustomTextCLIP.
        tokens: int64 `(n, context_length)`, on the model's device.

    Returns:
        `(n, embed_dim)`, not normalised.
    """
    if not len(tokens):
        return model.encode_text(tokens)
    return cut_features(model, tokens[:, : used_length(model, tokens)])


def cut_features(model: Any, tokens: Tensor) -> Tensor:
    """open_clip's `encode_text` of tokens that may have been cut to any length from `used_length` on.

    Args:
        model: open_clip's CLIP or CustomTextCLIP.
        tokens: int64 `(n, length)`, on the model's device.

    Returns:
        `(n, embed_dim)`, not normalised.
    """
    tower = text_tower(model)
    return features_of(tower, tokens) if reads_at_the_end(tower) else model.encode_text(tokens)


def used_length(model: Any, tokens: Tensor) -> int:
    """Up to which place a tower must see the texts of a batch; waits for the device that the tokens are on.

    Args:
        model: open_clip's CLIP or CustomTextCLIP.
        tokens: int64 `(..., context_length)`, one text at least.

    Returns:
        At most `context_length`, which it is for towers that read the padding.
    """
    tower = text_tower(model)
    rows = tokens.reshape(-1, tokens.shape[-1])
    if reads_at_the_end(tower):
        return int(ends(tower, rows).max()) + 1
    # Padding is masked out, in attention and in the pooling; but open_clip's MaxPooler masks all the rest instead.
    if isinstance(tower, HFTextEncoder) and not isinstance(tower.pooler, MaxPooler):
        seen = (rows != getattr(tower.config, "pad_token_id", None)).any(0).nonzero()
        return int(seen.max()) + 1 if len(seen) else 1
    return rows.shape[1]


def cut_length(model: Any, tokens: Tensor) -> int:
    """`used_length` as training cuts: a multiple of GRAIN, or the whole context."""
    return min(-(-used_length(model, tokens) // GRAIN) * GRAIN, tokens.shape[-1])


def text_tokens(model: Any, tokens: Tensor) -> Tensor:
    """The text tower's last tokens, normed, over the batch's longest text only where the others change nothing.

    Args:
        model: open_clip's CLIP or CustomTextCLIP.
        tokens: int64 `(n, context_length)`, on the model's device.

    Returns:
        `(n, length, width)`, `length` at most the tower's context. What stands behind the end of a text means nothing.

    Raises:
        AttributeError: A text tower that gives no tokens.
    """
    tower = text_tower(model)
    if len(tokens) and reads_at_the_end(tower):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        read = places <= ends(tower, tokens)[:, None]
        groups = groups_of_like_length(read)
        longest = max(length for _, length in groups)
        parts = [
            F.pad(hidden(tower, tokens[rows, :length]), (0, 0, 0, longest - length))
            for rows, length in groups
        ]
        return torch.cat(parts).index_select(0, torch.cat([rows for rows, _ in groups]).argsort())
    found = model.forward_intermediates(
        text=tokens,
        text_indices=1,
        normalize_intermediates=True,
        intermediates_only=True,
        text_output_fmt="NLC",
    )
    return found["text_intermediates"][-1]


def groups_of_like_length(seen: Tensor) -> list[tuple[Tensor, int]]:
    """Rows of texts by length, so that little of a group is padding.

    A GPU's time goes by the number of calls rather than by their size, so there all rows stay together.

    Args:
        seen: bool `(n, m)`: the places that are read of each text, the first ones; n at least 1.

    Returns:
        For each group its rows, int64, and the length of its longest text; together every row once.
    """
    lengths = seen.sum(dim=1)
    groups = min(GROUPS, max(1, len(seen) // ROWS)) if seen.device.type == "cpu" else 1
    return [(rows, int(lengths[rows].max())) for rows in lengths.argsort(stable=True).chunk(groups)]


def hidden(tower: Any, tokens: Tensor) -> Tensor:
    """The last tokens, normed, `(n, length, width)`, of a tower which `reads_at_the_end`."""
    length, dtype = tokens.shape[1], tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
    return tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))


def ends(tower: Any, tokens: Tensor) -> Tensor:
    """Where each text ends, int64 `(n,)`: the place that a tower which `reads_at_the_end` reads."""
    pool, eos = pooling(tower)
    return (tokens if pool == "argmax" else (tokens == eos).int()).argmax(1)


def features_of(tower: Any, tokens: Tensor) -> Tensor:
    """What a tower which `reads_at_the_end` makes of tokens up to any place behind the longest text.

    Args:
        tower: As `text_tower` gives it.
        tokens: int64 `(n, length)`, `length` at most the tower's context.

    Returns:
        `(n, embed_dim)`, not normalised.
    """
    pool, eos = pooling(tower)
    x = text_global_pool(hidden(tower, tokens), tokens, pool, eos_token_id=eos)  # (n, width)
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection


def pooling(tower: Any) -> tuple[Any, int | None]:
    """How a tower finds the end of a text, `argmax` or `eos`, and the token of the latter."""
    pool, eos = (
        getattr(tower, f"text_{name}", getattr(tower, name, None)) for name in ("pool_type", "eos_id")
    )
    return pool, eos


def text_tower(model: Any) -> Any:
    """The module that has the text tower's parts: CLIP itself, or a CustomTextCLIP's `text`."""
    return model if isinstance(model, CLIP) else getattr(model, "text", None)


def reads_at_the_end(tower: Any) -> bool:
    """Whether a text tower is open_clip's own, causal, and read at its end token."""
    if isinstance(tower, CLIP):
        pool, mask, embedding = tower.text_pool_type, tower.attn_mask, None
    elif isinstance(tower, TextTransformer):
        pool, mask, embedding = tower.pool_type, tower.attn_mask, tower.cls_emb
    else:
        return False
    return isinstance(mask, Tensor) and embedding is None and pool in ("argmax", "eos")  # a mask is causal
