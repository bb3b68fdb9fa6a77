"""The second step: what can only be decided when all samples are known, from their records and without a picture."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.curate.balance import Entries, keep_probabilities, uniform
from data.curate.duplicates import (
    Pairs,
    components,
    exact_pairs,
    keepers,
    perceptual_pairs,
    semantic_pairs,
)
from data.curate.hashes import close_pairs
from data.curate.lists import Lists, unit
from data.curate.look import BALANCE, DUPLICATES, LEAK, NO_ENTRY, causes
from data.curate.plant import KINDS
from data.curate.recipe import Alike, ClipScore, CurateRecipe, Similarity
from data.curate.records import Plants, Records
from pairstream.atomic import write_bytes

METHODS = ("exact", "perceptual", "semantic")
COMMON = 20  # entries of the balancing list that the report shows


@dataclass
class Decision:
    """What becomes of each sample, and why.

    Attributes:
        verdicts: Index into `causes`; uint8 (n,).
        copy_of: The row that stays in place of a copy, -1 for none; int64 (n,).
        leak_of: The row of the evaluation set that a sample is a copy of, -1 for none; int64 (n,).
        leak_by: Which of `METHODS` says so; uint8 (n,).
        said: Tables of the report: `planted`, `leaks`, `balance`.
    """

    verdicts: np.ndarray
    copy_of: np.ndarray
    leak_of: np.ndarray
    leak_by: np.ndarray
    said: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        file = io.BytesIO()
        said = np.frombuffer(json.dumps(self.said).encode("utf-8"), dtype=np.uint8)
        np.savez(
            file,
            verdicts=self.verdicts,
            copy_of=self.copy_of,
            leak_of=self.leak_of,
            leak_by=self.leak_by,
            said=said,
        )
        write_bytes(path, file.getvalue())

    @classmethod
    def load(cls, path: Path) -> Decision:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return cls(**{**arrays, "said": json.loads(arrays["said"].tobytes())})


def decide(recipe: CurateRecipe, records: Records, evaluation: Records | None) -> Decision:
    """Leaks, copies, the best share and the balance, in this order, among what the filters left.

    Args:
        recipe: The recipe.
        records: All samples.
        evaluation: Those of the evaluation set, where the recipe has one.

    Returns:
        The decision; the same whatever the order of shards.
    """
    n = len(records)
    none = np.full(n, -1, dtype=np.int64)
    made = Decision(records.verdicts.copy(), none, none.copy(), np.zeros(n, dtype=np.uint8))
    codes = {cause: number for number, cause in enumerate(causes(recipe))}
    if recipe.leaks is not None and evaluation is not None:
        find_leaks(recipe, made, records, evaluation)
        if recipe.leaks.drop:
            made.verdicts[(made.verdicts == 0) & (made.leak_of >= 0)] = codes[LEAK]
    if recipe.duplicates is not None:
        drop_copies(recipe.duplicates, made, records, codes)
    for rule, label in zip(recipe.filters, recipe.labels(), strict=True):
        if isinstance(rule, Similarity | ClipScore) and rule.top is not None:
            scores = records.similarity if isinstance(rule, Similarity) else records.score
            made.verdicts[not_among_best(made.verdicts == 0, scores, records.text, rule.top)] = codes[label]
    if recipe.balance is not None:
        balance(recipe, made, records, codes)
    return made


def not_among_best(alive: np.ndarray, scores: np.ndarray, text: np.ndarray, share: float) -> np.ndarray:
    """Rows that are not of the best share; rows without a score are left alone."""
    rows = np.flatnonzero(alive & np.isfinite(scores))
    stay = int(np.ceil(share * len(rows)))
    return rows[np.lexsort((text[rows], -scores[rows]))[stay:]]


def pairs_by(method: str, section: Alike, records: Records, rows: np.ndarray) -> Pairs | None:
    """Copies among some rows by one method; None when the recipe does not ask for it."""
    if method == "exact":
        return exact_pairs(records.sha256, rows) if section.exact else None
    if method == "perceptual":
        own = section.perceptual
        return perceptual_pairs(records, rows, own.max_distance, own.flips) if own else None
    if section.semantic is None:
        return None
    rows = rows[records.embedded[rows] >= 0]
    vectors = records.embeddings[records.embedded[rows]]
    return semantic_pairs(vectors, rows, records.text[rows], section.semantic.min_similarity)


def drop_copies(section: Alike, made: Decision, records: Records, codes: dict[str, int]) -> None:
    """Leave one of each group of copies, the cheapest search first, so that the dearer ones see fewer samples."""
    alive = np.flatnonzero(made.verdicts == 0)
    groups = np.arange(len(records))
    for method, cause in zip(METHODS, DUPLICATES, strict=True):
        pairs = pairs_by(method, section, records, np.flatnonzero(made.verdicts == 0))
        if pairs is None:
            continue
        stays = keepers(records, components(len(records), pairs))
        dropped = np.flatnonzero(stays != np.arange(len(records)))
        made.verdicts[dropped] = codes[cause]
        made.copy_of[dropped] = stays[dropped]
        groups = stays[groups]
    if records.plants is not None:
        made.said["planted"] = planted_table(section, records, records.plants, alive, groups)


def planted_table(
    section: Alike, records: Records, plants: Plants, alive: np.ndarray, groups: np.ndarray
) -> list[dict[str, Any]]:
    """How well planted copies are found.

    A planted copy is found when a search pairs it with its picture, or with one that the set itself has as a copy of
    that. Any other pair counts as false, although two pictures of a set may well be copies that no search joined.

    Args:
        section: The searches.
        records: The samples.
        plants: The copies.
        alive: Rows that the filters left, which are searched.
        groups: The row that stays in place of each; int64 (n,).

    Returns:
        For each kind of copy and each method, and for all methods together: `planted`, `found`, `recall`, `pairs`,
        `precision` (None without a pair).
    """
    living = np.zeros(len(records), dtype=bool)
    living[alive] = True
    counted = np.flatnonzero(living[plants.base])
    hits: dict[str, Pairs] = {}
    for method in METHODS:
        pairs = cross_pairs(method, section, records, alive, plants)
        if pairs is not None:
            hits[method] = pairs
    if not hits:
        return []
    hits["any"] = tuple(np.concatenate(side) for side in zip(*hits.values(), strict=True))  # type: ignore[assignment]
    table = []
    for kind, name in enumerate(KINDS):
        own = counted[plants.kind[counted] == kind]
        for method, (planted, rows) in hits.items():
            mine = np.isin(planted, own)
            pairs = np.unique(np.stack([planted[mine], rows[mine]], axis=1), axis=0)
            right = groups[pairs[:, 1]] == groups[plants.base[pairs[:, 0]]]
            found = len(np.unique(pairs[right, 0]))
            table.append(
                {
                    "kind": name,
                    "method": method,
                    "planted": len(own),
                    "found": found,
                    "recall": found / len(own) if len(own) else None,
                    "pairs": len(pairs),
                    "precision": float(right.mean()) if len(pairs) else None,
                }
            )
    return table


def cross_pairs(
    method: str, section: Alike, records: Records, rows: np.ndarray, others: Records | Plants
) -> Pairs | None:
    """Copies between two sets by one method; None when the recipe does not ask for it.

    Args:
        method: One of `METHODS`.
        section: The searches.
        records: The samples.
        rows: Those that are looked at.
        others: Planted copies, or an evaluation set.

    Returns:
        Rows of `others`, and rows of `records`.
    """
    if method == "exact":
        if not section.exact:
            return None
        return _equal(others.sha256.view("S16"), records.sha256[rows].view("S16"), rows)
    if method == "perceptual":
        if section.perceptual is None:
            return None
        rows = rows[records.hashed[rows]]
        theirs = np.flatnonzero(others.hashed)
        unique, kinds = np.unique(records.hashes[rows], return_inverse=True)
        found = []
        for hashes in (others.hashes, others.mirrored) if section.perceptual.flips else (others.hashes,):
            asked, places, _ = close_pairs(unique, hashes[theirs], section.perceptual.max_distance)
            which, members = _members(kinds, places, len(unique))
            found.append((theirs[asked[which]], rows[members]))
        return tuple(np.concatenate(side) for side in zip(*found, strict=True))  # type: ignore[return-value]
    if section.semantic is None:
        return None
    rows = rows[records.embedded[rows] >= 0]
    theirs = np.arange(len(others.embeddings))
    own = others.embeddings
    if isinstance(others, Records):
        theirs = np.flatnonzero(others.embedded >= 0)
        own = others.embeddings[others.embedded[theirs]]
    if not len(rows) or not len(theirs):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    vectors = unit(records.embeddings[records.embedded[rows]])
    if isinstance(others, Records):  # an evaluation set is small: every pair is compared
        samples, found = Lists(unit(own), exact=True).search(vectors, section.semantic.min_similarity)
        return theirs[found], rows[samples]
    asked, places = Lists(vectors).search(unit(own), section.semantic.min_similarity)
    return theirs[asked], rows[places]


def _equal(asked: np.ndarray, known: np.ndarray, rows: np.ndarray) -> Pairs:
    unique, kinds = np.unique(known, return_inverse=True)
    if not len(unique):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    places = np.minimum(np.searchsorted(unique, asked), len(unique) - 1)
    hit = np.flatnonzero(unique[places] == asked)
    which, members = _members(kinds, places[hit], len(unique))
    return hit[which], rows[members]


def _members(kinds: np.ndarray, places: np.ndarray, n: int) -> Pairs:
    """For each of some kinds all its members: positions in `places`, and positions in `kinds`."""
    order = np.argsort(kinds, kind="stable")
    starts = np.searchsorted(kinds[order], np.arange(n + 1))
    counts = starts[places + 1] - starts[places]
    which = np.repeat(np.arange(len(places)), counts)
    offsets = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return which, order[starts[places[which]] + offsets]


def find_leaks(recipe: CurateRecipe, made: Decision, records: Records, evaluation: Records) -> None:
    """Which samples an evaluation set has as well, the surest search first."""
    section = recipe.leaks
    assert section is not None
    rows = np.flatnonzero(made.verdicts == 0)
    leaked: set[int] = set()
    counts = {}
    for number, method in enumerate(METHODS):
        pairs = cross_pairs(method, section, records, rows, evaluation)
        if pairs is None:
            continue
        theirs, own = pairs
        first = np.lexsort((evaluation.text[theirs], own))
        theirs, own = theirs[first], own[first]
        new = made.leak_of[own] < 0
        made.leak_by[own[new]] = number
        made.leak_of[own[new][::-1]] = theirs[new][::-1]  # the first of each stays
        counts[method] = len(np.unique(own[new]))
        leaked |= set(theirs.tolist())
    made.said["leaks"] = {
        "samples": int((made.leak_of >= 0).sum()),
        "by": counts,
        "evaluation_samples": len(evaluation),
        "evaluation_samples_leaked": len(leaked),
    }


def balance(recipe: CurateRecipe, made: Decision, records: Records, codes: dict[str, int]) -> None:
    """Draw samples so that no entry of the list has too many."""
    config = recipe.balance
    assert config is not None
    alive = made.verdicts == 0
    stays = keep_probabilities(records.entry_starts, records.entries, alive, config.cap)
    unmatched = alive & (np.diff(records.entry_starts) == 0)
    drawn = uniform(records.text, config.seed) < stays
    made.verdicts[alive & ~unmatched & ~drawn] = codes[BALANCE]
    if config.unmatched == "drop":
        made.verdicts[unmatched] = codes[NO_ENTRY]
    owners = np.repeat(np.arange(len(records)), np.diff(records.entry_starts))
    names = Entries.read(config.entries).names
    before, after = (
        np.bincount(records.entries[which[owners]], minlength=len(names))
        for which in (alive, made.verdicts == 0)
    )
    most = np.lexsort((np.arange(len(names)), -before))[:COMMON]
    made.said["balance"] = {
        "entries": len(names),
        "entries_found": int((before > 0).sum()),
        "entries_above_cap": int((before > config.cap).sum()),
        "common": [[names[entry], int(before[entry]), int(after[entry])] for entry in most if before[entry]],
    }
