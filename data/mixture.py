"""One or several sources of pairs as one endless sequence of global batches: which sample stands where."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from data.order import EpochOrder

logger = logging.getLogger(__name__)

LARGEST = 1e100  # no weight is larger, so that sums of weights are finite
Mix: TypeAlias = Literal["samples", "batches"]
Sources: TypeAlias = "str | Path | Iterable[str | Path | Source]"  # shards, or sources to be mixed


@dataclass(frozen=True)
class Source:
    """Some shards that are mixed with others.

    Attributes:
        shards: What `data.shards.expand_shards` takes.
        name: What logs call it; the first of its shards' names when empty.
        weight: Its share of the samples relative to the other sources' weights; None goes by size, see
            `temperature` of `PairStream`.
        replacement: Draw its shards with replacement rather than each once per epoch.
        captions: For `data.stream.pair_stream`: how its captions are chosen; None as the stream says.
        rewritten_key: For `pair_stream`: the JSON key of its rewritten captions, a text or a list of texts.
        rewritten_share: For `pair_stream`: how often a rewritten caption is taken instead.
        load: The source's own `load`; None takes the stream's.
    """

    shards: str | Path | Sequence[str | Path]
    name: str = ""
    weight: float | None = None
    replacement: bool = False
    captions: str | None = None
    rewritten_key: str | None = None
    rewritten_share: float | None = None
    load: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Rows:
    """Some rows of a global batch, in order; int64 arrays of one length.

    Attributes:
        sources: Number of each sample's source.
        epochs: Which pass through that source it belongs to.
        numbers: Global indices, counted through all sources.
    """

    sources: np.ndarray
    epochs: np.ndarray
    numbers: np.ndarray


def as_sources(shards: Sources) -> list[Source]:
    """A specification as sources with distinct names; shards alone are one source.

    Raises:
        ValueError: Shards and sources together, or two sources of one name.
    """
    if isinstance(shards, str | Path):
        return [Source(shards, name=str(shards))]
    words = list(shards)
    sources = [word for word in words if isinstance(word, Source)]
    if not sources:
        return [
            Source(
                [word for word in words if not isinstance(word, Source)], name=str(words[0]) if words else ""
            )
        ]
    bare = [
        source.name for source in sources if not isinstance(source.shards, str | Path) and not source.shards
    ]
    if bare:
        raise ValueError(
            f"source {bare[0]!r} has no shards: give it at least one path, glob or URL, or leave it out"
        )
    if len(sources) < len(words):
        raise ValueError(
            "a mixture is a list of sources, got sources and bare shards together: make each a source"
        )
    named = [
        replace(
            source,
            name=source.name
            or str(source.shards if isinstance(source.shards, str | Path) else source.shards[0]),
        )
        for source in sources
    ]
    names = [source.name for source in named]
    if len(set(names)) < len(names):
        raise ValueError(f"the sources of a mixture need different names, got {', '.join(names)}")
    return named


def warn_of_shared_shards(names: Sequence[str], shards: Sequence[Iterable[str]]) -> None:
    """Warn of sources that share shards: a picture may then stand twice in a batch, as its own negative.

    Args:
        names: Of the sources.
        shards: Local paths of each source's shards.
    """
    resolve = cache(Path.resolve)  # folders are few
    owners: dict[Path, str] = {}
    shared: Counter[tuple[str, str]] = Counter()
    for name, paths in zip(names, shards, strict=True):
        for path in map(Path, paths):
            owner = owners.setdefault(resolve(path.parent) / path.name, name)
            if owner != name:
                shared[owner, name] += 1
    for (one, other), count in shared.items():
        logger.warning(
            "sources %s and %s share %d shards: a picture may stand twice in a batch, as its own negative; give each "
            "shard to one source unless that is meant",
            one,
            other,
            count,
        )


def quotas(total: int, weights: Sequence[int]) -> list[int]:
    """Divide `total` draws among sources, so that the draws of a larger total contain those of a smaller one.

    The j-th draw of source k has its turn at time (j + 1/2) / weight_k, and the first `total` draws are had. Every
    share is its exact part rounded, up to what makes the sum right.

    Args:
        total: Draws.
        weights: Of each source, positive.

    Reference:
        Webster's (Sainte-Lague's) method of apportionment, which is house-monotone; in exact arithmetic.

    Example:
        >>> quotas(8, [5, 3]), quotas(10, [5, 3])
        ([5, 3], [6, 4])
    """
    whole = sum(weights)
    shares = [(2 * total * weight + whole) // (2 * whole) for weight in weights]
    while (over := sum(shares) - total) != 0:
        step = -1 if over > 0 else 1
        turns = [
            (Fraction(2 * share + step, weight), number)
            for number, (share, weight) in enumerate(zip(shares, weights, strict=True))
            if step > 0 or share
        ]
        shares[(max(turns) if over > 0 else min(turns))[1]] += step
    return shares


def whole_weights(
    sizes: Sequence[int], given: Sequence[float | None], temperature: float | None
) -> list[int]:
    """The weights of sources as whole numbers, so that quotas are exact.

    Args:
        sizes: Samples of each source.
        given: The sources' own weights: all, or none.
        temperature: Weights are `samples ** (1 / temperature)`: 1 goes by size, a large one is even.

    Raises:
        ValueError: Some have a weight and some have none, one is not positive, or there is a temperature as well.
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    told = [weight for weight in given if weight is not None]
    if told and (len(told) < len(given) or temperature is not None):
        what = "a temperature as well" if len(told) == len(given) else f"{len(told)} of {len(given)} have one"
        raise ValueError(f"weights: give every source one, or none and a temperature; here {what}")
    if any(not isinstance(weight, int | float) or not 0 < weight < LARGEST for weight in told):
        raise ValueError(f"weights must be numbers above 0 (and below {LARGEST:g}), got {told}")
    if not told and temperature in (None, 1):
        return list(sizes)
    power = 1 / float(temperature or 1)
    try:
        shares = told or [size**power for size in sizes]
    except (
        OverflowError
    ):  # a temperature near 0; relative sizes would move the weights of all others by a bit
        shares = [(size / max(sizes)) ** power for size in sizes]
    return [max(1, round(10**12 * share / sum(shares))) for share in shares]


class Mixture:
    """Which samples a global batch holds, as a function of its number.

    Of one source: its epochs one after the other, the last batch of each holding what is left. Of several: every
    batch is full and has its exact quotas (`quotas`), each source going through its own epochs; in the one batch in
    which a source begins anew, a sample may stand twice.

    Args:
        orders: Of each source.
        weights: Of each source, whole numbers.
        names: Of each source, for messages.
        global_batch: Samples of a batch, over all ranks.
        mix: `samples` mixes within a batch; `batches` takes each batch from one source.

    Raises:
        ValueError: A source has fewer samples than its share of one batch, or an unknown `mix`.
    """

    def __init__(
        self,
        orders: Sequence[EpochOrder],
        weights: Sequence[int],
        names: Sequence[str],
        *,
        global_batch: int,
        mix: Mix,
    ):
        if mix not in ("samples", "batches"):
            raise ValueError(f"mix {mix!r}: expected 'samples' or 'batches'")
        self.orders, self.weights, self.names = list(orders), list(weights), list(names)
        self.global_batch, self.mix = global_batch, mix
        self.totals = [order.total for order in orders]
        self.samples = sum(self.totals)
        self.firsts = np.cumsum([0, *self.totals])  # global index of each source's first sample
        self.batches_per_epoch = -(-self.samples // global_batch)
        if len(self.orders) == 1:
            return
        for name, total, weight in zip(names, self.totals, weights, strict=True):
            most = global_batch if mix == "batches" else -(-global_batch * weight // sum(weights))
            if most > total:
                raise ValueError(
                    f"source {name} has {total} samples and gives up to {most} to a batch of {global_batch}: the pairs "
                    "of a batch must differ. Take a smaller batch, a lower weight, or leave it out."
                )

    def drawn(self, step: int) -> list[int]:
        """How many samples were drawn of each source before global batch `step`."""
        if len(self.orders) == 1:
            epoch, number = divmod(step, self.batches_per_epoch)
            return [epoch * self.samples + number * self.global_batch]
        if self.mix == "batches":
            return [self.global_batch * batches for batches in quotas(step, self.weights)]
        return quotas(step * self.global_batch, self.weights)

    def epochs_seen(self, step: int) -> dict[str, float]:
        """How often each source was gone through before global batch `step`."""
        return {
            name: count / total
            for name, count, total in zip(self.names, self.drawn(step), self.totals, strict=True)
        }

    def size(self, step: int) -> int:
        """Samples of global batch `step`."""
        return sum(self.drawn(step + 1)) - sum(self.drawn(step))

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows `[start, stop)` of global batch `step`; the sources of a batch alternate evenly."""
        before, after = self.drawn(step), self.drawn(step + 1)
        draws = [np.arange(*span) for span in zip(before, after, strict=True)]
        sources = np.repeat(np.arange(len(draws)), [len(own) for own in draws])
        draws = np.concatenate(draws)
        if len(self.orders) > 1:
            turns = (draws + 0.5) / np.asarray(self.weights, dtype=np.float64)[sources]
            turn = np.argsort(turns, kind="stable")
            sources, draws = sources[turn], draws[turn]
        sources, draws = sources[start:stop], draws[start:stop]
        epochs = draws // np.asarray(self.totals)[sources]
        numbers = np.empty_like(draws)
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)  # their draws are neighbours
            numbers[mine] = self.firsts[source] + self._draw(
                source, int(draws[mine[0]]), int(draws[mine[-1]]) + 1
            )
        return Rows(sources, epochs, numbers)

    def _draw(self, source: int, start: int, stop: int) -> np.ndarray:
        """The samples of draws `[start, stop)` of a source, which may span epochs."""
        order, total = self.orders[source], self.totals[source]
        parts = [
            order.positions(epoch, start - epoch * total, stop - epoch * total)
            for epoch in range(start // total, -(-stop // total))
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def stand_ins(self, source: int, epoch: int, number: int) -> list[int]:
        """Samples that may take the place of one whose shard cannot be read, the first choice first.

        Those of the shards that follow in the source's order of that epoch, each at the same place of its shard.

        Args:
            source: Of the sample.
            epoch: Of the source.
            number: Global index of the sample.
        """
        first = int(self.firsts[source])
        return [first + other for other in self.orders[source].followers(epoch, number - first)]
