"""Embeddings kept from one run to the next, under a key of everything that they depend on.

A key is a hash of the model's weights and configuration, its transform, the tokens that its tokenizer makes,
the precision, the kind of device, the versions of the libraries that compute, and the bytes of the data.
Whatever changes one of them misses. Data is hashed each time: reading it takes far less than embedding it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.fetch import local_shard
from data.shards import expand_shards
from pretrain.encoder import Encoder
from retrieval.artifact import new_artifact, read_artifact, sha256
from retrieval.embed import Embeddings
from retrieval.labelled import Label, class_folders
from retrieval.provenance import encoder_facts, versions

KIND = "pairstream-labelled-embeddings"
LAYOUT = 2  # goes up when what is stored changes
COMPUTE = ("timm", "transformers", "torchvision", "pillow", "numpy")  # towers, decoding and resizing


@dataclass(frozen=True)
class LabelledEmbeddings:
    """Pictures of a labelled set as unit rows.

    Attributes:
        rows: float32 `(n, dim)`.
        labels: As they were found.
        keys: Names of the pictures.
        faults: Pictures left out, by cause.
    """

    rows: np.ndarray
    labels: list[Label]
    keys: list[str]
    faults: dict[str, int]

    def save(self, folder: Path) -> None:
        """Write a folder, whole or not at all."""
        with new_artifact(folder, KIND, {"faults": self.faults}) as temporary:
            np.save(temporary / "rows.npy", self.rows)
            content = json.dumps({"labels": self.labels, "keys": self.keys}, ensure_ascii=False)
            (temporary / "labels.json").write_text(content, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> LabelledEmbeddings:
        """Read a folder that `save` wrote.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged.
        """
        manifest = read_artifact(folder, KIND)
        content = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        rows = np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False)
        return cls(rows, content["labels"], content["keys"], manifest["faults"])


def data_digest(data: str | Sequence[str]) -> str:
    """A hash of the bytes of a set: its shards, or the pictures of its class folders with their places.

    Raises:
        FileNotFoundError: Nothing there.
        ValueError: No shards and no class folders.
    """
    names = [data] if isinstance(data, str) else list(data)
    digest = hashlib.sha256()
    folder = Path(names[0])
    if len(names) == 1 and folder.is_dir() and not any(folder.glob("*.tar")):
        for path, label in class_folders(folder)[1]:
            name = str(path.relative_to(folder)).encode("utf-8", "surrogateescape")
            digest.update(b"%s\0%d\0%s\n" % (name, label, sha256(path).encode()))
        return digest.hexdigest()
    for name in expand_shards(names):
        digest.update(sha256(local_shard(name, None)).encode())
    return digest.hexdigest()


def cache_key(encoder: Encoder, data: str | Sequence[str], **options: Any) -> str:
    """The name of what a model makes of a set.

    Args:
        encoder: The model.
        data: The set.
        options: Everything else that changes the rows, such as `limit` and the kind of task.
    """
    facts = {name: value for name, value in encoder_facts(encoder).items() if name != "model"}
    constants: list[Any] = [encoder.normalize.scale, encoder.normalize.shift]
    content = {
        **facts,
        # What is applied, should it ever differ from what the configuration says.
        "applied": [repr(encoder.transform), *(each.flatten().tolist() for each in constants)],
        "device": encoder.device.type,
        "autocast": torch.is_autocast_enabled(encoder.device.type),
        "matmul": torch.get_float32_matmul_precision(),
        "versions": {**versions(), **{name: version(name) for name in COMPUTE}},
        "layout": LAYOUT,
        "data": data_digest(data),
        **options,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def cached(
    cache: Path | None,
    key: Callable[[], str],
    load: Callable[[Path], Any],
    make: Callable[[], Embeddings | LabelledEmbeddings],
) -> tuple[Any, bool]:
    """What lies in the cache, or what is made and put there. Damaged entries are made again.

    Args:
        cache: The cache's folder; None for no cache.
        key: The entry's name, worked out only where there is a cache.
        load: Reads an entry.
        make: Makes it.

    Returns:
        The embeddings, and whether they were found.
    """
    if cache is None:
        return make(), False
    folder = cache / key()
    try:
        return load(folder), True
    except (FileNotFoundError, ValueError):
        made = make()
        made.save(folder)
        return made, False
