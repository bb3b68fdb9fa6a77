"""open_clip's CLIP tokenizer as a tokenizer.json of the `tokenizers` library, with the same pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

# What open_clip's pattern takes for a word, a digit or a run of signs.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_tokenizer(tokenizer: Any, path: Path) -> dict[str, Any]:
    """Write a tokenizer's pieces.

    Args:
        tokenizer: open_clip's `SimpleTokenizer`.
        path: tokenizer.json.

    Returns:
        What `serve.export.runtime.Tokenizer` needs beside the file.

    Raises:
        ValueError: Another tokenizer, or one whose options are not carried over.
    """
    if not isinstance(tokenizer, SimpleTokenizer):
        raise ValueError(
            f"the text tower's tokenizer is a {type(tokenizer).__name__}: only open_clip's CLIP tokenizer is exported"
        )
    if tokenizer.reduction_fn is not None or tokenizer.clean_fn("A_b.") != "a_b.":
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
    content = json.loads(backend.to_str())
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return {"context_length": tokenizer.context_length, "clean": "lower"}
