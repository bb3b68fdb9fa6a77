"""Shards from http(s): fetched once into a cache folder, then read like any local file."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from pairstream.atomic import aside, fsync_path

logger = logging.getLogger(__name__)

ATTEMPTS = 5
TIMEOUT = 60.0  # seconds without a byte
GIVE_UP = {400, 401, 403, 404, 405, 410, 451}  # another attempt gets the same answer


def cache_folder() -> Path:
    """Where fetched shards are kept: `$XDG_CACHE_HOME/pairstream/shards`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairstream" / "shards"


def local_shard(name: str, cache_dir: str | Path | None = None, *, backoff: float = 1.0) -> Path:
    """The local file of a shard, fetched first when it is a URL.

    A URL names one immutable file: what is in the cache is not asked for again.

    Args:
        name: A path or an http(s) URL.
        cache_dir: The cache folder; `cache_folder()` when None.
        backoff: Seconds before the second attempt; doubled for each further one, five attempts in all.

    Returns:
        The local path.

    Raises:
        FileNotFoundError: The URL cannot be had; the message has the URL and the last answer.
        ValueError: Another scheme than http or https.
    """
    if "://" not in name:
        return Path(name)
    parts = urlsplit(name)
    if parts.scheme not in ("http", "https"):
        raise ValueError(
            f"shard {name}: expected a local path or an http(s) URL, got the scheme {parts.scheme!r}"
        )
    digest = hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]
    path = Path(cache_dir or cache_folder()) / f"{digest}-{Path(parts.path).name or 'shard.tar'}"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            _fetch(name, path)
            return path
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            if getattr(error, "code", None) in GIVE_UP or attempt + 1 == ATTEMPTS:
                raise FileNotFoundError(
                    f"shard {name} cannot be fetched ({attempt + 1} attempts): {error}. "
                    "Check the address and the connection, or copy the shard and give its local path."
                ) from error
            logger.warning("shard %s: %s; another attempt in %.0f s", name, error, backoff * 2**attempt)
            time.sleep(backoff * 2**attempt)
    raise AssertionError("unreachable")


def _fetch(url: str, path: Path) -> None:
    temporary = aside(path)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "pairstream"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, temporary.open("wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
            expected = answer.headers.get("Content-Length")
            if expected is not None and file.tell() != int(expected):
                raise ConnectionError(f"the connection ended after {file.tell()} of {expected} bytes")
        fsync_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
