"""Text features without the padding: what a causal tower does behind the end of a text changes nothing.

CLIP's tokenizer pads each text to 77 places, and captions and prompts take 10 to 25 of them. Where attention
is causal and the feature is read at the end token, the places behind the longest text of a batch can be left
out: the features are the same up to rounding, at a third of the time or less. transformers' towers mask padding out.
"""

from __future__ import annotations

from typing import Any

from open_clip.hf_model import HFTextEncoder, MaxPooler
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn


def text_features(model: Any, tokens: Tensor) -> Tensor:
    """open_clip's `encode_text`, over the batch's longest text only where that is the same.

    Args:
        model: open_clip's CLIP or CustomTextCLIP.
        tokens: int64 `(n, context_length)`, on the model's device.

    Returns:
        `(n, embed_dim)`, not normalised.
    """
    tower = text_tower(model)
    if len(tokens) and isinstance(tower, HFTextEncoder) and not isinstance(tower.pooler, MaxPooler):
        # Padding is masked out, in attention and in the pooling; open_clip's MaxPooler masks something else.
        config: Any = tower.config
        seen = (tokens != config.pad_token_id).any(dim=0).nonzero()
        return model.encode_text(tokens[:, : int(seen.max()) + 1 if len(seen) else 1])
    if not len(tokens) or not reads_at_the_end(tower):
        return model.encode_text(tokens)
    length = int(ends(tower, tokens).max()) + 1
    return features_of(tower, tokens[:, :length])


def text_tokens(model: Any, tokens: Tensor) -> Tensor:
    """The text tower's last tokens, normed, over the batch's longest text only where the others change nothing.

    Args:
        model: open_clip's CLIP or CustomTextCLIP.
        tokens: int64 `(n, context_length)`, on the model's device.

    Returns:
        `(n, length, width)`, `length` at most the tower's context.

    Raises:
        AttributeError: A text tower that gives no tokens.
    """
    tower = text_tower(model)
    if len(tokens) and reads_at_the_end(tower):
        return hidden(tower, tokens[:, : int(ends(tower, tokens).max()) + 1])
    found = model.forward_intermediates(
        text=tokens,
        text_indices=1,
        normalize_intermediates=True,
        intermediates_only=True,
        text_output_fmt="NLC",
    )
    return found["text_intermediates"][-1]


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
