"""A zero-shot classifier: one unit row for each class, made of its prompts, kept with the model it is of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_bytes

from pairstream.atomic import write_bytes
from pairstream.progress import ProgressBar
from pretrain.encoder import Encoder
from retrieval.prompts import Templates, checked_classes, checked_templates, prompts_of, templates_hash
from retrieval.share import ALONE, Share

KIND = "pairstream-classifier"


@dataclass(frozen=True)
class Classifier:
    """Classes as unit rows of a model's space.

    Attributes:
        weights: float32 `(classes, dim)`.
        names: Class names, in the order of the labels.
        model: Name of the encoder, for people.
        fingerprint: Hash of its weights and configuration, for checks.
        templates_hash: Hash of all prompts.
        prompts: Number of prompts.
    """

    weights: np.ndarray
    names: list[str]
    model: str
    fingerprint: str
    templates_hash: str
    prompts: int

    def check_model(self, fingerprint: str, name: str) -> None:
        """Make sure that pictures come from the model that made the classes.

        Raises:
            ValueError: They come from another one.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the classifier is of {self.model} (fingerprint {self.fingerprint}), the pictures are embedded "
                f"by {name} ({fingerprint}): their scores would mean nothing. Build it again with this model."
            )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all.

        Returns:
            The file.
        """
        about = {
            "format": KIND,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "templates_hash": self.templates_hash,
            "prompts": str(self.prompts),
            "names": json.dumps(self.names, ensure_ascii=False),
        }
        path = Path(path)
        write_bytes(path, save_bytes({"weights": np.ascontiguousarray(self.weights)}, metadata=about))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: expected a classifier that --save wrote")
        try:
            with safe_open(path, "numpy") as file:
                about: dict[str, Any] = file.metadata() or {}
                weights = file.get_tensor("weights") if about.get("format") == KIND else None
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}): build it again") from error
        if weights is None:
            raise ValueError(f"{path}: expected a file of {KIND}, found {about.get('format')!r}")
        names = json.loads(about["names"])
        if weights.shape[:1] != (len(names),) or not np.isfinite(weights).all():
            raise ValueError(f"{path}: {weights.shape} weights for {len(names)} names: build it again")
        return cls(
            weights,
            names,
            about["model"],
            about["fingerprint"],
            about["templates_hash"],
            int(about["prompts"]),
        )


def build_classifier(
    encoder: Encoder,
    classes: Sequence[str],
    templates: Templates,
    *,
    batch_size: int = 256,
    share: Share = ALONE,
    show: bool = False,
) -> Classifier:
    """Make a zero-shot classifier: `w_c = norm(mean over prompts of norm(f(prompt)))`.

    Every prompt is normalised, also where a model does not do so itself. Prompts of all classes are encoded
    together, each text once and in order of length, so that short ones are not padded to the longest.

    Args:
        encoder: The model; its own tokenizer is used.
        classes: Class names.
        templates: Templates with `{}` for all classes, or prompts by class.
        batch_size: Prompts at a time.
        share: This process's share of the prompts; all processes get the classifier.
        show: Show progress.

    Returns:
        The classifier.

    Raises:
        ValueError: Fewer than two classes, a template without `{}`, a class without prompts, a batch size
            below 1, prompts whose embeddings are not finite or cancel out.

    Reference:
        Radford et al. 2021, section 3.1.4.

    Example:
        >>> build_classifier(encoder, ["cat", "dog"], ["a photo of a {}."])       # doctest: +SKIP
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 prompt, got {batch_size}")
    names = checked_classes(classes, "classes")
    templates = checked_templates(templates, names, "templates")
    owners, numbers, place = [], [], {}
    for row, name in enumerate(names):
        for prompt in prompts_of(name, templates):
            owners.append(row)
            numbers.append(place.setdefault(prompt, len(place)))
    texts = sorted(place, key=len)
    rows = torch.empty((len(texts), encoder.embed_dim), dtype=torch.float32)
    starts = share.part(range(0, len(texts), batch_size))
    with ProgressBar("classes", len(starts), show=show) as bar:

        def encoded() -> Iterator[tuple[list[str], torch.Tensor]]:
            for start in starts:
                part = texts[start : start + batch_size]
                yield part, encoder.encode_texts(part).cpu()
                bar.advance(note=f"{len(part)} prompts")

        for part, found in share.together(encoded()):
            rows[torch.tensor([place[text] for text in part])] = found
    bad = ~(torch.isfinite(rows).all(1) & (rows.abs().amax(1) > 0))
    if bad.any():
        text = next(text for text, number in place.items() if bad[number])
        raise ValueError(
            f"{encoder.name}: the embedding of the prompt {text!r} is NaN, infinite or zero; look for an "
            "overflow in the model or a damaged checkpoint"
        )
    owner = torch.tensor(owners)
    sums = torch.zeros((len(names), encoder.embed_dim), dtype=torch.float64)
    rows = F.normalize(rows.double(), dim=1)  # whatever the encoder does
    sums.index_add_(0, owner, rows[torch.tensor(numbers)])
    means = sums / torch.bincount(owner, minlength=len(names)).double()[:, None]
    norms = means.norm(dim=1)
    if (norms < 1e-6).any():
        raise ValueError(
            f"the prompts of class {names[int(norms.argmin())]!r} cancel out: it has no direction"
        )
    weights = (means / norms[:, None]).float().numpy()
    return Classifier(
        weights, names, encoder.name, encoder.fingerprint, templates_hash(names, templates), len(owners)
    )
