"""API keys that are compared in constant time, and how often each caller may ask."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

SHORTEST = 16  # characters of a key
CALLERS = 10_000  # addresses whose rate is remembered


class Keys:
    """Which keys open the door. Only their digests are held.

    Args:
        keys: The keys; none means that everybody may come in.

    Raises:
        ValueError: A key of fewer than 16 characters, or one with blanks or outside ASCII.
    """

    def __init__(self, keys: Iterable[str] = ()):
        keys = list(keys)
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST or not key.isascii() or any(c.isspace() for c in key):
                raise ValueError(
                    f"API key number {number}: expected at least {SHORTEST} ASCII characters without blanks, got "
                    f"{len(key)}. `python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes a good one"
                )
        self.digests = [digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self.digests)

    def who(self, key: bytes) -> str | None:
        """A name for the caller that is no secret, or None. Every key is compared, whichever matches."""
        given, found = digest(key), None
        for number, known in enumerate(self.digests, 1):
            if hmac.compare_digest(given, known):
                found = f"key-{number}"
        return found


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(path: Path) -> Keys:
    """Keys from a file: one a line, blank lines and lines that start with `#` left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no key, or a bad one.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path}: expected API keys, one a line; there is none")
    return Keys(keys)


class Rates:
    """A token bucket for each caller.

    Args:
        rate: Tokens a second; 0 lets everything pass.
        burst: Tokens of a full bucket.
        clock: Seconds, for tests.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self.clock = rate, burst, clock
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, caller: str) -> float:
        """Take one token: 0 when there was one, else the seconds until there is."""
        if not self.rate:
            return 0.0
        now = self.clock()
        tokens, then = self.buckets.pop(caller, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.rate)
        allowed = tokens >= 1
        self.buckets[caller] = (tokens - 1 if allowed else tokens, now)
        if len(self.buckets) > CALLERS:
            self.buckets.popitem(last=False)  # the one that has been quiet the longest
        return 0.0 if allowed else (1 - tokens) / self.rate


def whole_seconds(seconds: float) -> str:
    """For `Retry-After`."""
    return str(max(1, math.ceil(seconds)))
