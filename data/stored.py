"""What teachers said of a sample, kept beside it in its shard as `KEY.NAME.safetensors`.

A teacher's forward pass is paid once and not every epoch. The member travels with the sample through shuffling,
mixing, curation and other numbers of processes, and needs no lookup; the image rows are of a few fixed augmentations
of the picture, which are known by the seeds of their random numbers, so that the student sees the very crop, flip and
colours that the teacher saw, at its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data.faults import Fault
from data.tar import ShardIndex
from data.transforms import TrainTransform

SUFFIX = "safetensors"
SETTINGS = (
    "crop scale, least",
    "crop scale, most",
    "ratio, least",
    "ratio, most",
    "hflip",
    "color_jitter",
    "grayscale",
)


@dataclass(frozen=True)
class Stored:
    """One teacher's rows for one sample.

    Attributes:
        images: `(views, d)`, rows of length one, one for each augmentation of the picture.
        texts: `(captions, d)`, in the order of `RawSample.captions()`.
        logit_scale: The teacher's, exponentiated.
        model: A number that is equal for equal teachers.
        seeds: int64 `(views,)`: view j is `transform(picture, np.random.default_rng(seeds[j]))`.
        settings: float64 `(7,)`: what decides a view beside its seed, as `settings_of` has it.
    """

    images: np.ndarray
    texts: np.ndarray
    logit_scale: float
    model: int
    seeds: np.ndarray
    settings: np.ndarray

    def pack(self) -> bytes:
        """The content of the member; rows in float16, 2 * d bytes each."""
        return save(
            {
                "images": self.images.astype(np.float16),
                "texts": self.texts.astype(np.float16),
                "logit_scale": np.array([self.logit_scale], dtype=np.float64),
                "model": np.array([self.model], dtype=np.int64),
                "seeds": np.asarray(self.seeds, dtype=np.int64),
                "settings": np.asarray(self.settings, dtype=np.float64),
            }
        )


def unpack(content: bytes, name: str, captions: int) -> Stored:
    """Read a member back.

    Args:
        content: Of `KEY.NAME.safetensors`.
        name: The teacher's.
        captions: How many the sample has now.

    Raises:
        Fault: `bad_teacher`: not such a member, or of another number of captions.
    """
    try:
        found = load(content)
        images, texts, seeds = found["images"], found["texts"], found["seeds"]
        stored = Stored(
            images, texts, float(found["logit_scale"][0]), int(found["model"][0]), seeds, found["settings"]
        )
    except (SafetensorError, KeyError, IndexError) as error:
        raise Fault("bad_teacher", f"KEY.{name}.{SUFFIX} is damaged: {error}") from error
    if not (
        images.ndim == texts.ndim == 2 and images.shape[1] == texts.shape[1] and 0 < len(images) == len(seeds)
    ):
        raise Fault(
            "bad_teacher",
            f"KEY.{name}.{SUFFIX}: expected images (views, d), texts (captions, d) and as many seeds as views, got "
            f"{images.shape}, {texts.shape} and {seeds.shape}",
        )
    if len(texts) != captions:
        raise Fault(
            "bad_teacher",
            f"KEY.{name}.{SUFFIX} has {len(texts)} texts for {captions} captions: captions were changed after it was "
            "written (`pairstream pretrain reinforce` writes it anew)",
        )
    return stored


def settings_of(transform: TrainTransform) -> np.ndarray:
    """What decides a view beside its seed: float64 `(7,)`, named by `SETTINGS`. Its size does not."""
    return np.array(
        [*transform.scale, *transform.ratio, transform.hflip, transform.color_jitter, transform.grayscale],
        dtype=np.float64,
    )


def require_same_settings(stored: Stored, transform: TrainTransform, name: str) -> None:
    """Refuse to augment otherwise than the teacher's pictures were.

    Raises:
        ValueError: A setting differs; the message has both values.
    """
    here = settings_of(transform)
    other = [
        f"{what} {theirs:g}, here {ours:g}"
        for what, theirs, ours in zip(SETTINGS, stored.settings, here, strict=True)
        if theirs != ours
    ]
    if other:
        raise ValueError(
            f"the stored teacher {name} saw pictures of another augmentation ({'; '.join(other)}): set "
            "data.crop_scale, data.hflip and data.color_jitter as `pairstream pretrain reinforce` was told, or store "
            "it anew"
        )


def require_members(indices: Sequence[ShardIndex], names: Sequence[str]) -> None:
    """Refuse shards in which a sample has no member of a stored teacher, before anything is trained.

    Args:
        indices: All shards.
        names: Teachers.

    Raises:
        ValueError: A sample lacks one; the message has how many, the first, and what to do.
    """
    for name in names:
        missing, example = 0, ""
        for index in indices:
            codes = [code for code, extension in enumerate(index.names) if extension == f"{name}.{SUFFIX}"]
            has = np.isin(index.extensions, codes)
            owners = np.repeat(np.arange(len(index)), np.diff(index.starts))  # (files,)
            lacking = np.flatnonzero(np.bincount(owners[has], minlength=len(index)) == 0)
            if len(lacking) and not missing:
                example = f"{index.key(int(lacking[0]))!r} in {index.name}"
            missing += len(lacking)
        if missing:
            total = sum(map(len, indices))
            raise ValueError(
                f"no embeddings of the stored teacher {name!r} for {missing} of {total} samples (first {example}): "
                f"expected KEY.{name}.{SUFFIX} beside every picture. Write them with "
                f"`pairstream pretrain reinforce SHARDS --teachers {name}=MODEL --out FOLDER`"
            )
