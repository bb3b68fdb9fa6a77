"""The encoder of a curation: any object that embeds pictures and texts, made by what the recipe names.

This package knows no model; what it needs of one is the protocol below, as training needs no more of an evaluator than
`run`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data.curate.recipe import EncoderChoice


@runtime_checkable
class PairEncoder(Protocol):
    """Embeds pictures and texts into one space, as rows of length one."""

    def encode_images(self, images: Any, /) -> Any:
        """Contents of picture files, n of them, to (n, dimensions): a tensor or an array."""
        ...

    def encode_texts(self, texts: Any, /) -> Any:
        """Texts, n of them, to (n, dimensions)."""
        ...


def load(choice: EncoderChoice) -> PairEncoder:
    """The encoder that a recipe names; made once in each process.

    Raises:
        ValueError: The import string finds nothing, the options are not its, or it gives no encoder.
    """
    return _load(choice.use, json.dumps(choice.options, sort_keys=True))


@lru_cache(maxsize=1)
def _load(use: str, options: str) -> PairEncoder:
    module, name = use.split(":")
    try:
        made = getattr(import_module(module), name)(**json.loads(options))
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"encoder.use {use!r} with options {options}: could not be made: {error}") from error
    if not isinstance(made, PairEncoder):
        raise ValueError(
            f"encoder.use {use!r}: gives {type(made).__name__}, without encode_images and encode_texts"
        )
    return made


def rows_of(embedded: Any) -> np.ndarray:
    """An encoder's result as float32 (n, dimensions)."""
    return np.asarray(embedded.cpu() if hasattr(embedded, "cpu") else embedded, dtype=np.float32)


def embed_images(encoder: PairEncoder, images: Sequence[bytes], batch_size: int) -> np.ndarray:
    """Pictures as float32 (n, dimensions)."""
    batches = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
    found = [rows_of(encoder.encode_images(list(batch))) for batch in batches]
    return np.concatenate(found) if found else np.zeros((0, 0), dtype=np.float32)


def best_cosines(
    encoder: PairEncoder, images: np.ndarray, captions: Sequence[Sequence[str]], batch_size: int
) -> np.ndarray:
    """The cosine of each picture and that of its captions which fits best; NaN without captions.

    Args:
        encoder: What embeds the captions.
        images: float32 (n, dimensions).
        captions: n lists.
        batch_size: Texts at a time.

    Returns:
        float32 (n,).
    """
    texts = [text for own in captions for text in own]
    owners = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    best = np.full(len(captions), -np.inf, dtype=np.float32)
    for first in range(0, len(texts), batch_size):
        rows = rows_of(encoder.encode_texts(texts[first : first + batch_size]))
        mine = owners[first : first + batch_size]
        np.maximum.at(best, mine, np.einsum("nd,nd->n", rows, images[mine]))
    return np.where(np.isinf(best), np.nan, best).astype(np.float32)
