"""What a number was measured with, so that two of them are compared only where that makes sense."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from pairstream import __version__
from pretrain.encoder import Encoder

# Texts on which tokenizers differ: case, punctuation, entities, blanks, other scripts, an empty and a long one.
PROBES = (
    "A photo of a Dog.",
    "two dogs, one cat; it's 3:15 -- (really?)",
    "caf\u00e9 &amp; na\u00efve \u2014 \u201cquoted\u201d",
    "  blanks \t and\nlines  ",
    "\u72ac \u0441\u043e\u0431\u0430\u043a\u0430 \U0001f436",
    "",
    "word " * 100,
)


def text_hash(parts: Iterable[str]) -> str:
    """A hash of texts in order."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()[:16]


def pairs_hash(keys: Sequence[str], captions: Sequence[str], image_of_text: np.ndarray) -> str:
    """A hash of what was asked: the samples' keys, the captions, and which belongs to which."""
    owners = hashlib.sha256(np.ascontiguousarray(image_of_text, dtype="<i8").tobytes()).hexdigest()
    return text_hash([str(len(keys)), *keys, *captions, owners])


def encoder_facts(encoder: Encoder) -> dict[str, Any]:
    """Everything about a model that changes its embeddings of given pictures and texts.

    Returns:
        `model`, `fingerprint` (weights and configuration), `dtype`, `transform` and `tokenizer`, whose hash is
        of the tokens that it makes of hard texts, so that casing, cleaning and padding count, and of its vocabulary.
    """
    tokens = encoder.tokenize(PROBES)
    content = repr(tuple(tokens.shape)).encode() + np.ascontiguousarray(tokens.numpy(), dtype="<i8").tobytes()
    content += vocabulary(encoder.tokenizer)
    return {
        "model": encoder.name,
        "fingerprint": encoder.fingerprint,
        "dtype": str(next(encoder.model.parameters()).dtype).removeprefix("torch."),
        "transform": json.loads(json.dumps(encoder.preprocess_cfg, default=list)),
        "tokenizer": {
            "kind": type(encoder.tokenizer).__name__,
            "context_length": int(tokens.shape[1]),
            "hash": hashlib.sha256(content).hexdigest()[:16],
        },
    }


def vocabulary(tokenizer: Any) -> bytes:
    """What a tokenizer knows, as bytes: texts that no probe has are cut by it, too; empty where it cannot be seen.

    Args:
        tokenizer: open_clip's own, or one of its wrappers of a transformers tokenizer.
    """
    inner: Any = getattr(tokenizer, "tokenizer", None)
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is not None:
        return backend.to_str().encode("utf-8", "surrogatepass")  # merges, normaliser and all
    if hasattr(inner, "get_vocab"):
        return json.dumps(sorted(inner.get_vocab().items())).encode()
    known = [getattr(tokenizer, name, None) for name in ("encoder", "bpe_ranks")]
    return repr([list(each.items()) for each in known if isinstance(each, dict)]).encode(
        "utf-8", "surrogatepass"
    )


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    return {
        "pairstream": __version__,
        **{name: version(name) for name in ("torch", "open_clip_torch", "faiss-cpu")},
    }
