"""Embed shards: every picture and all its captions, once, in the order of the shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.stream import pair_stream
from pairstream.progress import ProgressBar
from pretrain.encoder import Encoder
from retrieval.artifact import new_artifact, read_artifact, read_lines, write_lines

KIND = "pairstream-embeddings"


@dataclass(frozen=True)
class Embeddings:
    """Pictures and texts of a set as unit rows of one space.

    Attributes:
        images: float32 `(images, dim)`.
        texts: float32 `(texts, dim)`.
        image_of_text: int64 `(texts,)`: the row of the picture that each text describes.
        keys: `images` keys of the samples.
        samples: int64 `(images,)`: global number of each sample in its set, for reading it again.
        captions: The `texts` strings.
        model: Name of the encoder, for people.
        fingerprint: Hash of its weights and configuration, for checks.
        shards: The specification of the set.
        faults: Samples left out, by cause.
    """

    images: np.ndarray
    texts: np.ndarray
    image_of_text: np.ndarray
    keys: list[str]
    samples: np.ndarray
    captions: list[str]
    model: str
    fingerprint: str
    shards: list[str]
    faults: dict[str, int]

    def save(self, folder: str | Path) -> Path:
        """Write `images.npy`, `texts.npy`, `images.jsonl`, `texts.jsonl` and `manifest.json`, all or none.

        Returns:
            The folder.
        """
        content = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "dim": self.images.shape[1],
            "images": len(self.images),
            "texts": len(self.texts),
            "shards": self.shards,
            "faults": self.faults,
        }
        with new_artifact(folder, KIND, content) as temporary:
            np.save(temporary / "images.npy", self.images)
            np.save(temporary / "texts.npy", self.texts)
            write_lines(temporary / "images.jsonl", self.image_records())
            write_lines(temporary / "texts.jsonl", self.text_records())
        return Path(folder)

    def image_records(self) -> list[dict[str, Any]]:
        """One record a picture: `key` and `sample`."""
        return [{"key": k, "sample": int(s)} for k, s in zip(self.keys, self.samples, strict=True)]

    def text_records(self) -> list[dict[str, Any]]:
        """One record a text: `text`, the `key` of its picture and that picture's row `image`."""
        return [
            {"text": text, "key": self.keys[image], "image": int(image)}
            for text, image in zip(self.captions, self.image_of_text, strict=True)
        ]

    @classmethod
    def load(cls, folder: str | Path) -> Embeddings:
        """Read a folder that `save` wrote; the arrays stay on disk and are mapped.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged.
        """
        manifest, path = read_artifact(folder, KIND), Path(folder)
        images, texts = read_lines(path / "images.jsonl"), read_lines(path / "texts.jsonl")
        return cls(
            images=np.load(path / "images.npy", mmap_mode="r", allow_pickle=False),
            texts=np.load(path / "texts.npy", mmap_mode="r", allow_pickle=False),
            image_of_text=np.array([record["image"] for record in texts], dtype=np.int64),
            keys=[record["key"] for record in images],
            samples=np.array([record["sample"] for record in images], dtype=np.int64),
            captions=[record["text"] for record in texts],
            **{name: manifest[name] for name in ("model", "fingerprint", "shards", "faults")},
        )


def embed_shards(
    encoder: Encoder,
    shards: str | Iterable[str],
    *,
    batch_size: int = 64,
    limit: int | None = None,
    workers: int = 0,
    max_faults: float = 0.01,
    show: bool = False,
) -> Embeddings:
    """Embed a set of pictures with all their captions.

    Everything is held in memory: `4 * dim` bytes a picture and a text (2 GiB for a million rows of 512).

    Args:
        encoder: The model.
        shards: What `data.shards.expand_shards` takes.
        batch_size: Pictures at a time, with all their captions.
        limit: Only the first so many samples; None for all.
        workers: Loader processes; 0 decodes in this one.
        max_faults: Share of bad samples past which the work stops.
        show: Show progress.

    Returns:
        Rows in the order of the shards; bad samples are left out and counted.

    Raises:
        ValueError: A limit below 1, no usable sample, too many faults, or an embedding that is not finite.

    Example:
        >>> found = embed_shards(load_encoder("runs/scenes_cpu"), "shards/test")   # doctest: +SKIP
        >>> retrieval_metrics(found.images, found.texts, found.image_of_text)      # doctest: +SKIP
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 sample, got {limit}")
    shards = [shards] if isinstance(shards, str) else list(shards)
    stream = pair_stream(
        shards,
        transform=encoder.transform,
        tokenize=encoder.tokenizer,  # alone: loader processes must not get the towers
        batch_size=batch_size,
        captions="all",
        shuffle=False,
        workers=workers,
        max_faults=max_faults,
    )
    wanted = stream.samples if limit is None else min(limit, stream.samples)
    steps = -(-wanted // batch_size)
    images, texts, owners, keys, samples, captions = [], [], [], [], [], []
    with evaluating(encoder), ProgressBar("embed", steps, show=show) as bar:
        for batch in stream.iterate(0, steps):
            kept = int((batch.indices < wanted).sum())  # the order is the shards', so these come first
            if not kept:
                continue
            owner = batch["image_of_text"]
            mine = int((owner < kept).sum())
            images.append(encoder.encode_images(batch["images"][:kept]).cpu())
            texts.append(encoder.encode_texts(batch["tokens"][:mine]).cpu())
            for rows, of in ((images[-1], torch.arange(kept)), (texts[-1], owner[:mine])):
                usable = torch.isfinite(rows).all(1) & (rows.abs().amax(1) > 0)
                if not usable.all():
                    key = batch.keys[int(of[~usable][0])]
                    what = "picture" if rows is images[-1] else "text"
                    raise ValueError(
                        f"{encoder.name}: the embedding of a {what} of sample {key!r} is NaN, infinite or "
                        "zero; look for an overflow in the model or a damaged checkpoint"
                    )
            owners.append(owner[:mine] + len(keys))
            keys += batch.keys[:kept]
            samples.append(batch.indices[:kept])
            captions += batch["texts"][:mine]
            bar.advance(note=f"{len(keys)} pictures")
    if not keys:
        raise ValueError(
            f"none of the first {wanted} samples of {', '.join(shards)} can be used: {stream.faults}"
        )
    return Embeddings(
        images=torch.cat(images).numpy(),
        texts=torch.cat(texts).numpy(),
        image_of_text=torch.cat(owners).numpy(),
        keys=keys,
        samples=torch.cat(samples).numpy(),
        captions=captions,
        model=encoder.name,
        fingerprint=encoder.fingerprint,
        shards=shards,
        faults=stream.faults,
    )


@contextmanager
def evaluating(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode again afterwards: training may go on."""
    before = {module: module.training for module in encoder.model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
