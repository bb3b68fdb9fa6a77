"""The first pass: each shard is read once, its samples are judged one by one, and a record of each is written."""

from __future__ import annotations

import errno
import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.curate import records as store
from data.curate.balance import Entries, uniform
from data.curate.encode import PairEncoder, best_cosines, embed_images, load
from data.curate.filters import MISSING, Facts, Rules, as_number
from data.curate.hashes import grey_of, hash_greys, sha256_of
from data.curate.plant import KINDS, plant
from data.curate.recipe import Alike, ClipScore, CurateRecipe
from data.curate.records import KEPT, NUMBERS, UNUSABLE, Plants, Records
from data.faults import Fault, FaultRecord
from data.fetch import ShardCache, cache_folder
from data.index import index_shard
from data.pictures import Picture
from data.samples import RawSample, empty_index, read_manifest, read_sample
from data.shards import MANIFEST
from data.tar import ShardIndex, ShardReader

LEAK = "leak"
DUPLICATES = ("duplicate_exact", "duplicate_perceptual", "duplicate_semantic")
BALANCE, NO_ENTRY = "balance", "no_entry"
PLANT_SEED = 20240229
LARGEST = float(np.finfo(np.float32).max)


def causes(recipe: CurateRecipe) -> list[str]:
    """What may become of a sample, in the order of the steps; verdicts are positions in this list."""
    return [KEPT, UNUSABLE, MISSING, *recipe.labels(), LEAK, *DUPLICATES, NO_ENTRY, BALANCE]


@dataclass
class Tools:
    """What a process makes once for all its shards."""

    rules: Rules
    alike: list[Alike]
    entries: Entries | None = None
    encoder: PairEncoder | None = None
    score: tuple[str, ClipScore] | None = None
    codes: dict[str, int] = field(default_factory=dict)

    @property
    def hashes(self) -> bool:
        return any(section.perceptual for section in self.alike)

    @property
    def vectors(self) -> bool:
        return any(section.semantic for section in self.alike)


@lru_cache(maxsize=2)
def tools(dumped: str, evaluation: bool) -> Tools:
    """The rules, lists and models of a recipe.

    Raises:
        ValueError: A list, a language or the encoder is not what it should be.
        ImportError: A library is absent.
    """
    recipe = CurateRecipe.model_validate_json(dumped)
    sections = (recipe.leaks,) if evaluation else (recipe.duplicates, recipe.leaks)
    alike: list[Alike] = [section for section in sections if section is not None]
    labels = recipe.labels()
    scores = [
        (label, rule)
        for label, rule in zip(labels, recipe.filters, strict=True)
        if isinstance(rule, ClipScore)
    ]
    made = Tools(
        Rules([], []) if evaluation else Rules(recipe.filters, labels),
        alike,
        Entries.read(recipe.balance.entries) if recipe.balance and not evaluation else None,
        score=scores[0] if scores and not evaluation else None,
        codes={cause: number for number, cause in enumerate(causes(recipe))},
    )
    if recipe.encoder is not None and (made.vectors or made.score):
        made.encoder = load(recipe.encoder)
    return made


@dataclass(frozen=True)
class Seen:
    """What the driver hears of a shard: its samples, and what was damaged."""

    samples: int
    faults: list[FaultRecord]


@dataclass(frozen=True)
class Look:
    """The work on one shard; it travels to the processes that do it.

    Attributes:
        recipe: The recipe.
        folder: Where the records go.
        evaluation: Whether these are the shards of an evaluation set, which are not judged.
    """

    recipe: CurateRecipe
    folder: Path
    evaluation: bool = False

    def __call__(self, number: int, name: str) -> Seen:
        found = look(self.recipe, name, evaluation=self.evaluation)
        store.save(found, self.path(number))
        return Seen(len(found), found.faults)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npz"


def open_shard(name: str) -> tuple[ShardIndex, ShardReader]:
    """One shard's index and what reads it; an unreadable one has an empty index with a fault."""
    cache = ShardCache(cache_folder())
    manifest = cache.path(name).with_name(MANIFEST)
    try:
        found = manifest.stat()
        promised = (
            promises(manifest, found.st_mtime_ns, found.st_size).get(cache.path(name).name, {}).get("samples")
        )
    except OSError:
        promised = None
    expected = promised if isinstance(promised, int) else None
    try:
        path, tag = cache.local(name)
        index = index_shard(path, name, expected, tag=tag)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        index = empty_index(FaultRecord("unreadable_shard", name, "", str(error), expected or 1), cache)
    return index, ShardReader(locate=cache.locate)


@lru_cache(maxsize=4)
def promises(manifest: Path, time: int, size: int) -> dict[str, dict[str, Any]]:
    """A manifest, read once and not for each shard; its time and size make a rewritten one another."""
    return read_manifest(manifest)


def look(recipe: CurateRecipe, name: str, *, evaluation: bool = False) -> Records:
    """Judge the samples of one shard.

    Args:
        recipe: The recipe.
        name: The shard.
        evaluation: Do not judge, only describe.

    Returns:
        A row for each sample.
    """
    kit = tools(recipe.model_dump_json(), evaluation)
    index, opened = open_shard(name)
    shard = _Shard(recipe, kit, index, evaluation)
    with opened as reader:
        for row in range(len(index)):
            try:
                shard.add(row, read_sample(index, row, row, reader))
            except Fault as fault:
                shard.rows.verdicts[row] = kit.codes[UNUSABLE]
                shard.rows.faults.append(FaultRecord(fault.cause, name, index.key(row), fault.detail))
    return shard.finish()


class _Shard:
    """The records of a shard while it is read; pictures wait here until there are enough for the encoder."""

    def __init__(self, recipe: CurateRecipe, kit: Tools, index: ShardIndex, evaluation: bool):
        self.recipe, self.kit, self.index = recipe, kit, index
        self.rows = store.blank(index.keys, index.name)
        self.rows.faults += index.faults
        self.share = recipe.duplicates.plant if recipe.duplicates and not evaluation else 0.0
        self.batch = recipe.encoder.batch_size if recipe.encoder else 1
        self.greys: list[tuple[int, np.ndarray]] = []
        self.entries: list[list[int]] = [[] for _ in range(len(index))]
        self.waiting: list[tuple[int, bytes, list[str]]] = []  # row, or -1 for a planted copy
        self.vectors: list[np.ndarray] = []
        self.planted: list[tuple[int, int, bytes, np.ndarray | None]] = []  # base, kind, SHA-256, grey
        self.planted_vectors: list[np.ndarray] = []

    def add(self, row: int, raw: RawSample) -> None:
        captions = raw.captions()
        facts = Facts(raw.image, captions, raw.record, self.recipe.max_pixels)
        self.note(row, facts)
        label = self.kit.rules.judge(facts)
        if label is not None:
            self.rows.verdicts[row] = self.kit.codes[label]
            return
        if self.kit.hashes:
            self.greys.append((row, facts.grey))
        if len(facts.captions) < len(captions):
            left = set(facts.captions)
            self.rows.captions[row] = [place for place, text in enumerate(captions) if text in left]
        if self.kit.entries is not None:
            self.entries[row] = self.kit.entries.find(facts.captions)
        if self.kit.encoder is not None:
            self.wait(row, raw.image, facts.captions)
        if self.share and uniform(self.rows.text[row : row + 1], PLANT_SEED)[0] < self.share:
            self.plant(row, raw.image)

    def note(self, row: int, facts: Facts) -> None:
        """Write down what is known of any sample, for the histograms and the search for copies."""
        rows = self.rows
        rows.width[row], rows.height[row] = facts.picture.width, facts.picture.height
        rows.bytes[row] = len(facts.image)
        rows.sha256[row] = facts.sha256[:16]
        said = "\0".join([self.index.key(row), *facts.captions]).encode("utf-8", "surrogatepass")
        rows.text[row] = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")
        if facts.captions:
            rows.characters[row], rows.words[row] = len(facts.captions[0]), len(facts.captions[0].split())
        for name in NUMBERS:
            value = as_number(facts.record.get(name))
            if value is not None:
                getattr(rows, name)[row] = np.clip(value, -LARGEST, LARGEST)

    def plant(self, row: int, image: bytes) -> None:
        for kind, copy in enumerate(plant(image, self.recipe.max_pixels)):
            grey = grey_of(Picture(copy)) if self.kit.hashes else None
            self.planted.append((row, kind, sha256_of(copy)[:16], grey))
            if self.kit.encoder is not None and self.kit.vectors:
                self.wait(-1, copy, [])

    def wait(self, row: int, image: bytes, captions: list[str]) -> None:
        self.waiting.append((row, image, captions))
        if len(self.waiting) >= self.batch:
            self.embed()

    def embed(self) -> None:
        """Embed the pictures that wait, and judge them by their score."""
        if not self.waiting or self.kit.encoder is None:
            return
        rows = np.array([row for row, _, _ in self.waiting])
        vectors = embed_images(self.kit.encoder, [image for _, image, _ in self.waiting], self.batch)
        own = rows >= 0
        alive = np.ones(len(rows), dtype=bool)
        if self.kit.score is not None and own.any():
            label, rule = self.kit.score
            captions = [texts for row, _, texts in self.waiting if row >= 0]
            scores = best_cosines(self.kit.encoder, vectors[own], captions, self.batch)
            self.rows.score[rows[own]] = scores
            alive[own] = scores >= (-np.inf if rule.min is None else rule.min)  # False for no score
            self.rows.verdicts[rows[own & ~alive]] = self.kit.codes[label]
        if self.kit.vectors:
            stays = rows[own & alive]
            first = sum(map(len, self.vectors))
            self.rows.embedded[stays] = np.arange(first, first + len(stays))
            self.vectors.append(vectors[own & alive].astype(np.float16))
            self.planted_vectors.append(vectors[~own].astype(np.float16))
        self.waiting = []

    def finish(self) -> Records:
        self.embed()
        rows = self.rows
        if self.greys:
            places = np.array([row for row, _ in self.greys])
            found = hash_greys([grey for _, grey in self.greys])
            rows.hashes[places], rows.mirrored[places] = found.hashes, found.mirrored
            rows.hashed[places] = found.valid
        counts = np.array([len(own) for own in self.entries], dtype=np.int64)
        rows.entry_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows.entries = np.array([number for own in self.entries for number in own], dtype=np.int32)
        rows.embeddings = _stack(self.vectors)
        if self.planted:
            rows.plants = self.plants()
        return rows

    def plants(self) -> Plants:
        greys = [grey for _, _, _, grey in self.planted if grey is not None]
        n = len(self.planted)
        found = hash_greys(greys)
        none = np.zeros(n, dtype=np.uint64)
        return Plants(
            base=np.array([base for base, _, _, _ in self.planted], dtype=np.int64),
            kind=np.array([kind for _, kind, _, _ in self.planted], dtype=np.uint8),
            sha256=np.array([sha for _, _, sha, _ in self.planted], dtype="V16"),
            hashes=found.hashes if greys else none,
            mirrored=found.mirrored if greys else none,
            hashed=found.valid if greys else np.zeros(n, dtype=bool),
            embeddings=_stack(self.planted_vectors),
        )


def _stack(parts: list[np.ndarray]) -> np.ndarray:
    some: list[Any] = [part for part in parts if len(part)]
    return np.concatenate(some) if some else np.zeros((0, 0), dtype=np.float16)


assert len(KINDS) < 256  # `Plants.kind` is a byte
