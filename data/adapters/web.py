"""Pictures over http(s): fetched with limits, many at a time, in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPException
from typing import TypeVar
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from data.faults import Fault

TIMEOUT = 20.0  # seconds for a whole picture
MAX_BYTES = 20_000_000
BLOCK = 1 << 16
OPAQUE = ("application/octet-stream", "binary/octet-stream")  # what plain file stores answer

ArgumentT = TypeVar("ArgumentT")
ResultT = TypeVar("ResultT")


def fetch(url: str, *, timeout: float = TIMEOUT, max_bytes: int = MAX_BYTES) -> bytes:
    """Get one picture.

    Args:
        url: http or https.
        timeout: Seconds for the whole answer; a server that sends a byte now and then holds up nothing.
        max_bytes: Size past which the answer is dropped.

    Returns:
        The body.

    Raises:
        Fault: `unreachable_url` (no such host, an HTTP error, too slow), `not_an_image` (by its content type;
            dead links often answer with a web page), `too_large_file`.
    """
    end = time.monotonic() + timeout
    content = bytearray()
    try:
        quoted = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = Request(quoted, headers={"User-Agent": "pairstream", "Accept": "image/*"})
        with urlopen(request, timeout=timeout) as response:
            kind = response.headers.get_content_type() if "Content-Type" in response.headers else OPAQUE[0]
            if not kind.startswith("image/") and kind not in OPAQUE:
                raise Fault("not_an_image", f"{url}: the content type is {kind}, expected image/*")
            while block := response.read1(BLOCK):
                content += block
                if len(content) > max_bytes:
                    raise Fault("too_large_file", f"{url}: more than {max_bytes:,} bytes")
                if time.monotonic() > end:
                    raise Fault("unreachable_url", f"{url}: not complete after {timeout:g} s")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is the answer, with its connection
        raise Fault("unreachable_url", f"{url}: {error or type(error).__name__}") from error
    return bytes(content)


def map_threads(
    function: Callable[[ArgumentT], ResultT], arguments: Iterable[ArgumentT], threads: int = 16
) -> Iterator[ResultT]:
    """`map`, with some calls running ahead in threads; results come in the order of the arguments.

    Args:
        function: Waits for the network most of its time.
        arguments: Read as needed, four for each thread ahead at most.
        threads: Calls at the same time.
    """
    pool = ThreadPoolExecutor(threads)
    running: deque[Future[ResultT]] = deque()
    try:
        for argument in arguments:
            running.append(pool.submit(function, argument))
            if len(running) == 4 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
