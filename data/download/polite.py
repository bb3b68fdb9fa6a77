"""How a picture is asked for: robots.txt, a limit per host, limits on the answer, and nothing asked twice.

img2dataset asks through `urllib.request.urlopen`; `install` makes that call go through here, in each worker process.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import socket
import ssl
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException, HTTPMessage, IncompleteRead, InvalidURL, RemoteDisconnected
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.robotparser import RobotFileParser

AGENT = "pairstream"
BLOCK = 1 << 16
SITES = 100_000  # whose rules a process remembers
PLACES = 1 << 20  # of hosts in the file of their limits
ROBOTS_BYTES = 500_000  # RFC 9309: a parser must read at least this much
# What files of pictures begin with. Servers call pictures by all sorts of content types.
PICTURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP",
    b"\xff\x4f\xff",
)


class Refused(OSError):  # noqa: N818 - a server's or our own no, counted and seldom an error
    """No picture; its text is `cause: detail`, which is what img2dataset keeps of it."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


@dataclass(frozen=True)
class Manners:
    """How to ask.

    Attributes:
        timeout: Seconds without a byte, and seconds for a whole body.
        max_bytes: Larger files are dropped.
        host_rate: Requests a second to one host, over all processes; 0 sets no limit.
        robots: Whether robots.txt is asked for and obeyed.
        opt_out: Directives of X-Robots-Tag that forbid the use of a picture.
        hosts: File in which processes share when each host may be asked next.
    """

    timeout: float
    max_bytes: int
    host_rate: float
    robots: bool
    opt_out: tuple[str, ...]
    hosts: Path


class HostLimit:
    """Keeps requests to one host apart, over all threads and processes that share a file.

    The file is a table of the times of the next free slots, 8 bytes each, locked one by one. A host's place is drawn
    by its name: with millions of hosts the file stays at 8 MB, and now and then two of them share a place.

    Args:
        path: The file; made when absent.
        per_second: Requests a second; 0 for no limit but what hosts ask for themselves.
    """

    def __init__(self, path: Path, per_second: float):
        self.interval = 1 / per_second if per_second else 0.0
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.mutex = threading.Lock()  # the lock of a file does not keep threads of one process apart

    def wait(self, host: str, interval: float = 0.0) -> None:
        """Take the next slot of a host and sleep until it comes.

        Args:
            host: With its port.
            interval: Seconds that the host itself asks for (Crawl-delay); the longer one counts.
        """
        interval = max(interval, self.interval)
        if not interval:
            return
        place = 8 * (int.from_bytes(hashlib.sha256(host.encode()).digest()[:4], "big") % PLACES)
        with self.mutex:
            fcntl.lockf(self.file, fcntl.LOCK_EX, 8, place)
            try:
                now = time.time()
                (free,) = struct.unpack("<d", os.pread(self.file, 8, place).ljust(8, b"\0"))
                slot = max(now, free)
                os.pwrite(self.file, struct.pack("<d", slot + interval), place)
            finally:
                fcntl.lockf(self.file, fcntl.LOCK_UN, 8, place)
        time.sleep(slot - now)


class Robots:
    """What the robots.txt of each host allows; asked for once per process."""

    def __init__(self, limit: HostLimit, timeout: float):
        self.limit, self.timeout = limit, timeout
        self.known: dict[str, RobotFileParser | str] = {}
        self.locks: dict[str, threading.Lock] = {}
        self.mutex = threading.Lock()
        self.opener = urllib.request.build_opener()

    def delay(self, url: str) -> float:
        """Make sure that a URL may be fetched.

        Returns:
            The Crawl-delay in seconds, 0 when there is none.

        Raises:
            Refused: `opt_out_robots`, or `robots_unreachable`, which RFC 9309 tells to take as a no for now.
        """
        parts = urlsplit(url)
        site = f"{parts.scheme}://{parts.netloc}"
        with self.mutex:
            lock = self.locks.setdefault(site, threading.Lock())
        with lock:
            if site not in self.known:
                if len(self.known) >= SITES:
                    self.known.clear()
                self.known[site] = self.fetch(site, parts.netloc)
            rules = self.known[site]
        if isinstance(rules, str):
            raise Refused("robots_unreachable", f"{site}/robots.txt: {rules}")
        if not rules.can_fetch(AGENT, url):
            raise Refused("opt_out_robots", f"{site}/robots.txt does not allow {AGENT} to fetch it")
        return float(rules.crawl_delay(AGENT) or 0)

    def fetch(self, site: str, host: str) -> RobotFileParser | str:
        """The rules of a site, or why they cannot be had."""
        rules = RobotFileParser()
        self.limit.wait(host)
        request = urllib.request.Request(f"{site}/robots.txt", headers={"User-Agent": AGENT})
        try:
            with self.opener.open(request, timeout=self.timeout) as answer:
                rules.parse(answer.read(ROBOTS_BYTES).decode("utf-8", "replace").splitlines())
        except urllib.error.HTTPError as error:
            error.close()
            if error.code >= 500:
                return f"HTTP {error.code}"
            rules.parse([])  # no rules: all is allowed
            cast(Any, rules).disallow_all = error.code in (401, 403)
        except (OSError, HTTPException, ValueError) as error:
            return explain(error)[1]
        return rules


class Director(urllib.request.OpenerDirector):
    """An opener that asks robots.txt and keeps the host's limit before every request, also those of redirects."""

    def __init__(self, manners: Manners):
        super().__init__()
        self.limit = HostLimit(manners.hosts, manners.host_rate)
        self.rules = Robots(self.limit, manners.timeout) if manners.robots else None
        for handler in (
            urllib.request.ProxyHandler,
            urllib.request.HTTPHandler,
            urllib.request.HTTPSHandler,
            urllib.request.HTTPDefaultErrorHandler,
            urllib.request.HTTPRedirectHandler,
            urllib.request.HTTPErrorProcessor,
            urllib.request.UnknownHandler,
        ):
            self.add_handler(handler())

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        request = fullurl if isinstance(fullurl, urllib.request.Request) else urllib.request.Request(fullurl)
        url = request.full_url
        delay = self.rules.delay(url) if self.rules else 0.0
        self.limit.wait(urlsplit(url).netloc, delay)
        return super().open(request, data, timeout)


@lru_cache(maxsize=1)
def director(manners: Manners) -> Director:
    """The director of a process, which works on one part after the other: robots.txt is not asked for again."""
    return Director(manners)


class Journal:
    """The answers of one unfinished part, kept so that a killed run asks for none of them again.

    Args:
        path: The file; what an earlier run wrote there is answered from.
    """

    def __init__(self, path: Path):
        self.mutex = threading.Lock()
        self.file = path.open("a+b")
        self.known: dict[str, tuple[int, int] | str] = {}
        self.file.seek(0)
        end = 0
        size = path.stat().st_size
        while line := self.file.readline():
            try:
                head = json.loads(line)
            except ValueError:
                break
            body = self.file.tell()
            if body + head["bytes"] > size:
                break
            self.known[head["url"]] = head["refused"] or (body, head["bytes"])
            end = body + head["bytes"]
            self.file.seek(end)
        self.file.truncate(end)
        self.earlier = frozenset(self.known)

    def get(self, url: str) -> bytes | None:
        """The kept body; None when it is not known.

        Raises:
            Refused: It was refused by an earlier run (one of this run may be tried again).
        """
        with self.mutex:
            entry = self.known.get(url)
            if isinstance(entry, str):
                if url in self.earlier:
                    cause, _, detail = entry.partition(": ")
                    raise Refused(cause, detail)
                return None
            if entry is None:
                return None
            self.file.seek(entry[0])
            return self.file.read(entry[1])

    def put(self, url: str, body: bytes = b"", refused: str = "") -> None:
        """Keep an answer."""
        head = json.dumps({"url": url, "bytes": len(body), "refused": refused}).encode() + b"\n"
        with self.mutex:
            self.file.seek(0, io.SEEK_END)
            place = self.file.tell() + len(head)
            self.file.write(head + body)
            self.file.flush()
            self.known[url] = refused or (place, len(body))

    def close(self) -> None:
        self.file.close()


class Answer:
    """What `urlopen` gives: headers, `read`, and the end of a `with`."""

    def __init__(self, headers: Any, read: Callable[[], bytes], close: Callable[[], None] = lambda: None):
        self.headers, self.read, self.close = headers, read, close

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PictureOpener:
    """The opener of a worker process while it fetches one part."""

    def __init__(
        self, manners: Manners, journal: Journal, director: Director, disallowed: Callable[..., bool]
    ):
        self.manners, self.journal, self.director, self.disallowed = manners, journal, director, disallowed

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Answer:
        """Answer a request of img2dataset.

        Raises:
            Refused: With the cause.
        """
        request = fullurl if isinstance(fullurl, urllib.request.Request) else urllib.request.Request(fullurl)
        url = request.full_url
        kept = self.journal.get(url)
        if kept is not None:
            return Answer(HTTPMessage(), lambda: kept)
        response = None
        try:
            request.full_url = encode(url)
            response = self.director.open(request, data, self.manners.timeout)
            tags = response.headers.get_all("X-Robots-Tag", [])
            if tags and self.disallowed(response.headers, AGENT, set(self.manners.opt_out)):
                raise Refused("opt_out_header", f"X-Robots-Tag: {'; '.join(tags)}")
        except Exception as error:
            if response is not None:
                response.close()
            raise self.refuse(url, error) from None
        return Answer(response.headers, lambda: self.read(url, response), response.close)

    def read(self, url: str, response: Any) -> bytes:
        """The whole body, kept in the journal."""
        try:
            body = read_picture(response, self.manners)
        except Exception as error:
            raise self.refuse(url, error) from None
        self.journal.put(url, body)
        return body

    def refuse(self, url: str, error: Exception) -> Refused:
        refused = error if isinstance(error, Refused) else Refused(*explain(error))
        self.journal.put(url, refused=str(refused))
        return refused


def read_picture(response: Any, manners: Manners) -> bytes:
    """The body of an answer that is a picture, whole, in time and not too large.

    Raises:
        Refused: `not_an_image`, `too_large_file`, `timeout`, `truncated_body`, `truncated_image`.
    """
    end = time.monotonic() + manners.timeout
    promised = response.length  # what is still to come by Content-Length
    if promised is not None and promised > manners.max_bytes:
        raise Refused("too_large_file", f"{promised:,} bytes, more than {manners.max_bytes:,}")
    kind = response.headers.get_content_type() if "Content-Type" in response.headers else ""
    body = bytearray()
    while block := response.read1(BLOCK):
        judged = len(body) >= 16
        body += block
        if not judged and len(body) >= 16 and not looks_like_a_picture(bytes(body[:64]), kind):
            raise Refused("not_an_image", f"the content type is {kind or 'missing'}")
        if len(body) > manners.max_bytes:
            raise Refused("too_large_file", f"more than {manners.max_bytes:,} bytes")
        if time.monotonic() > end:
            raise Refused("timeout", f"not complete after {manners.timeout:g} s ({len(body):,} bytes)")
    if promised is not None and len(body) < promised:
        raise Refused("truncated_body", f"{len(body):,} of {promised:,} bytes")
    if len(body) < 16:
        raise Refused("not_an_image", f"{len(body)} bytes")
    if is_cut(bytes(body)):
        raise Refused("truncated_image", f"the picture ends early ({len(body):,} bytes)")
    return bytes(body)


def looks_like_a_picture(head: bytes, kind: str) -> bool:
    """By its first bytes, or by an honest-looking content type where those are unknown."""
    if head.startswith(PICTURES) or head[8:12] == b"WEBP" or head[4:8] == b"ftyp":
        return True
    return kind.startswith("image/") and b"<" not in head[:16]  # dead links often answer with a web page


def is_cut(body: bytes) -> bool:
    """Whether a JPEG, PNG or WebP file ends before its picture does.

    Decoders fill what is missing with grey and say nothing. Only the container is looked at.
    """
    if body.startswith(b"\xff\xd8"):
        place = 2
        while place + 4 <= len(body) and body[place] == 0xFF:
            marker, size = body[place + 1], int.from_bytes(body[place + 2 : place + 4], "big")
            if marker == 0xFF:  # a fill byte
                place += 1
                continue
            if marker == 0xDA:  # the scan begins; a thumbnail's end, in a segment before, does not count
                return body.find(b"\xff\xd9", place) < 0
            place += 2 + size
        return place >= len(body)
    if body.startswith(b"\x89PNG"):
        return b"IEND" not in body
    if body[:4] == b"RIFF":
        return (
            int.from_bytes(body[4:8], "little") + 8 > len(body) + 1
        )  # some writers leave out the padding byte
    return False


def encode(url: str) -> str:
    """A URL as it goes over the wire: no spaces, nothing but ASCII.

    Raises:
        Refused: `bad_url`.
    """
    try:
        parts = urlsplit(url.strip())
        host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    except (ValueError, UnicodeError) as error:
        raise Refused("bad_url", str(error)) from None
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise Refused("bad_url", "expected http:// or https:// and a host")
    path, query = (quote(part, safe="%/:=&?~#+!$,;'@()*[]|") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, host, path, query, ""))


def explain(error: BaseException) -> tuple[str, str]:
    """The cause and the detail of what urllib raises."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return f"http_{error.code}", str(error.reason)
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return explain(error.reason)
    text = re.sub(r"\s+", " ", str(error)) or type(error).__name__
    kinds: tuple[tuple[Any, str], ...] = (
        (TimeoutError, "timeout"),
        (socket.gaierror, "no_such_host"),
        (ConnectionRefusedError, "connection_refused"),
        (
            (ConnectionResetError, BrokenPipeError, ConnectionAbortedError, RemoteDisconnected),
            "connection_reset",
        ),
        (ssl.SSLError, "tls_error"),
        (IncompleteRead, "truncated_body"),
        ((InvalidURL, UnicodeError, ValueError), "bad_url"),
    )
    return next((cause for kind, cause in kinds if isinstance(error, kind)), "network_error"), text
