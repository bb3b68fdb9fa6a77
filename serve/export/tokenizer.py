"""The text tower's tokenizer as a tokenizer.json of the `tokenizers` library, with the same pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

# What open_clip's pattern takes for a word, a digit or a run of signs.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLEANINGS = ("lower", "whitespace", "canonicalize")


def write_tokenizer(tokenizer: Any, path: Path) -> dict[str, Any]:
    """Write a tokenizer's pieces.

    Args:
        tokenizer: open_clip's own `SimpleTokenizer`, or its `HFTokenizer` around one of transformers'.
        path: tokenizer.json.

    Returns:
        What `serve.export.runtime.Tokenizer` needs beside the file.

    Raises:
        ValueError: Another tokenizer, or one whose options are not carried over.
    """
    if isinstance(tokenizer, SimpleTokenizer):
        backend, config = clip_tokenizer(tokenizer)
    elif isinstance(tokenizer, HFTokenizer):
        backend, config = transformers_tokenizer(tokenizer)
    else:
        raise ValueError(
            f"the text tower's tokenizer is a {type(tokenizer).__name__}: open_clip's CLIP tokenizer and those of "
            "transformers are exported, no others"
        )
    content = json.loads(backend.to_str())
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return config


def clip_tokenizer(tokenizer: SimpleTokenizer) -> tuple[Tokenizer, dict[str, Any]]:
    """CLIP's byte pairs in `tokenizers`, which has no model that cuts words as open_clip does."""
    if tokenizer.reduction_fn is not None or tokenizer.clean_fn is not get_clean_fn("lower"):
        raise ValueError(
            "the tokenizer has a reduction mask or a cleaning other than 'lower': it is not exported"
        )
    ranks = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    merges = [pair for pair in ranks if len(pair) == 2]
    backend = Tokenizer(models.BPE(vocab=tokenizer.encoder, merges=merges, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens(
        ["<start_of_text>", "<end_of_text>"]
    )  # typed out, they are the marks to open_clip, too
    return backend, {"kind": "clip", "context_length": tokenizer.context_length, "clean": "lower"}


def transformers_tokenizer(tokenizer: HFTokenizer) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer of transformers, which cuts and pads by itself once it has been told how far."""
    inner: Any = tokenizer.tokenizer
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"the text tower's tokenizer is a {type(inner).__name__}, which has no tokenizer.json: it is not exported"
        )
    clean = next((name for name in CLEANINGS if tokenizer.clean_fn is get_clean_fn(name)), None)
    if tokenizer.tokenizer_mode or clean is None:
        raise ValueError(
            f"the text tower's tokenizer works in the mode {tokenizer.tokenizer_mode or tokenizer.clean_fn!r}: "
            "it is not exported"
        )
    length = tokenizer.context_length
    assert length is not None, "open_clip's tokenizers of models have one"
    backend = Tokenizer.from_str(backend.to_str())  # transformers changes its own at every call
    backend.enable_truncation(length, direction=inner.truncation_side)
    backend.enable_padding(
        length=length,
        direction=inner.padding_side,
        pad_id=inner.pad_token_id,
        pad_token=inner.pad_token,
    )
    return backend, {
        "kind": "transformers",
        "context_length": length,
        "clean": clean,
        "blanked": inner.sep_token_id if tokenizer.strip_sep_token else None,
    }
