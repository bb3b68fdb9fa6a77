"""Bad samples: what one fault is, and the budget that decides when there are too many."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

EXAMPLES = 3  # faults of each cause that are kept word for word
JUDGED_AFTER = 100  # samples; a share of fewer says little


class Fault(Exception):  # noqa: N818 - a fault of the data, counted and seldom an error
    """One sample cannot be used; raised by a `load` function, counted by the stream.

    Args:
        cause: A short name that counts are kept by: `undecodable_image`, `missing_image`, `missing_caption`,
            `bad_json`, `bad_text`, `too_large_image`, `truncated_tar`, `duplicate_key`, `bad_shard`, or your
            own.
        detail: What is wrong with this one, in words.

    Example:
        >>> raise Fault("missing_caption", "neither KEY.txt nor a caption in KEY.json")  # doctest: +SKIP
    """

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


@dataclass(frozen=True)
class FaultRecord:
    """Where a fault happened.

    Attributes:
        cause: As in `Fault`.
        shard: Path or URL of the shard.
        key: The sample's key; empty when the shard as a whole is meant.
        detail: What is wrong, in words.
        count: Samples that are lost by it.
    """

    cause: str
    shard: str
    key: str = ""
    detail: str = ""
    count: int = 1

    def __str__(self) -> str:
        where = f"{self.shard}, sample {self.key!r}" if self.key else self.shard
        return f"{where}: {self.detail or self.cause}"


class FaultLog:
    """Counts faults by cause, logs each cause once, and stops the work when their share is too large.

    Args:
        max_faults: Largest tolerated share of the samples seen, in [0, 1); 0 stops at the first fault.

    Raises:
        ValueError: `max_faults` outside [0, 1).
    """

    def __init__(self, max_faults: float):
        if not 0 <= max_faults < 1:
            raise ValueError(f"max_faults is a share of the samples in [0, 1), got {max_faults}")
        self.max_faults = max_faults
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[FaultRecord]] = {}

    def add(self, records: Iterable[FaultRecord], seen: int) -> None:
        """Count faults.

        Args:
            records: The faults.
            seen: Samples looked at since the last call, the faulty ones included.
        """
        self.seen += seen
        for record in records:
            if record.cause not in self.counts:  # in a stream: once an epoch
                logger.warning("left out (%s): %s; further ones are only counted", record.cause, record)
            self.counts[record.cause] += record.count
            examples = self.examples.setdefault(record.cause, [])
            if len(examples) < EXAMPLES:
                examples.append(record)

    def summarise(self, what: str) -> None:
        """Log the counts by cause, if there are any."""
        if self.counts:
            causes = ", ".join(f"{cause} {count}" for cause, count in self.counts.most_common())
            logger.warning("%s: %d of %d samples left out (%s)", what, self.counts.total(), self.seen, causes)

    def judge(self, *, final: bool = False) -> None:
        """Stop when the share of faults is past the budget.

        Before the end of an epoch the share must be past it by three standard deviations: a set that is just
        within its budget would otherwise be stopped by the first unlucky hundred samples.

        Args:
            final: Judge exactly, and even though few samples were seen: these were all there are.

        Raises:
            ValueError: Too many faults; the message has counts, shards and first examples.
        """
        bad = self.counts.total()
        allowed = self.max_faults * self.seen
        if self.max_faults and not final:
            allowed = math.inf if self.seen < JUDGED_AFTER else allowed + 3 * math.sqrt(allowed)
        if bad <= allowed:
            return
        lines = [
            f"{bad} of {self.seen} samples cannot be used ({bad / max(self.seen, 1):.1%}); "
            f"the budget max_faults is {self.max_faults:.1%}. Mend or remove the shards below "
            "(`pairstream data check SHARDS` lists all faults), or raise max_faults."
        ]
        for cause, count in self.counts.most_common():
            lines.append(f"  {cause}: {count}")
            lines += [f"    {example}" for example in self.examples[cause]]
        raise ValueError("\n".join(lines))
