"""The door: host, key, rate and body are checked here, before anything of a request is parsed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from serve.direct import Direct
from serve.interrupt import Interruptible
from serve.keys import Keys, Rates, whole_seconds
from serve.metrics import Metrics
from serve.refusal import Refusal, busy
from serve.settings import Limits, Settings

logger = logging.getLogger(__name__)

OPEN = ("/", "/healthz", "/readyz", "/openapi.json")  # answered without a key: they say nothing of the models
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
JSON = [(b"content-type", b"application/json"), *HEADERS]
ONCE = (b"host", b"content-length", b"transfer-encoding", b"content-type", b"authorization", b"x-api-key")
WATCH_SECONDS = (
    0.05  # after which a request's caller is watched: most are answered before, and watching costs them
)


class Gate:
    """ASGI middleware in front of the application.

    In this order: the Host header (a page that rebinds its own name to this address is stopped), requests that
    another site's page sends, the key, the caller's rate, the body's type, and its bytes, counted while they arrive
    and bounded in time and over all callers. Only then does the application see a request, with its body whole. A
    caller who hangs up takes his request with him.

    Args:
        app: The application.
        settings: Limits and rates.
        keys: Who may come in; empty for everybody.
        metrics: Counts what is answered and refused.
        direct: POST routes that are answered without the application, by their path.
    """

    def __init__(self, app: Any, settings: Settings, keys: Keys, metrics: Metrics, direct: dict[str, Direct]):
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
        self.direct = direct
        self.rates = Rates(settings.rate, settings.burst)
        self.held = 0  # bytes of bodies in memory

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        began, status = time.perf_counter(), 0

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                extra = [pair for pair in HEADERS if pair[0] not in present]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        size, posted = 0, scope["method"] in ("POST", "PUT", "PATCH", "DELETE")
        direct = self.direct.get(scope["path"]) if scope["method"] == "POST" else None
        try:
            headers = dict(scope["headers"])  # names are in lower case: ASGI
            if len(headers) < len(scope["headers"]):
                check_repeated(scope["headers"])
            self.check_host(headers)
            if scope["path"] not in OPEN:
                self.check_site(headers)
                self.check_caller(headers, scope.get("client"))
            body = b""
            if posted:
                check_type(headers)
                body = await self.read_body(headers, receive)
                size = len(body)
                check_structure(body, self.settings.limits)
            with Interruptible() as work, self.watching(work, receive):
                if direct is None:
                    await self.app(scope, replaying(body), answer)
                else:
                    content = await direct.answer(body)
                    status = 200
                    await send_json(200, content, [], send)
            if work.interrupted:
                self.metrics.refused.labels("hung_up").inc()
        except Refusal as refusal:
            status = refusal.status
            self.metrics.refused.labels(refusal.code).inc()
            await send_refusal(refusal, send, close=posted and size == 0)
        finally:
            self.held -= size
            route = direct.path if direct else getattr(scope.get("route"), "path", "other")
            self.metrics.answered(route, status, time.perf_counter() - began)

    def check_host(self, headers: dict[bytes, bytes]) -> None:
        """The name in the address bar must be one of ours."""
        allowed = self.settings.allowed_hosts
        if "*" in allowed:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name not in allowed:
            raise Refusal(400, "unknown_host", "this server does not answer to the name in the Host header")

    def check_site(self, headers: dict[bytes, bytes]) -> None:
        """Browsers say when another site's page asks; such pages have no business here."""
        if headers.get(b"sec-fetch-site", b"none") in (b"cross-site", b"same-site"):
            raise Refusal(403, "cross_site", "requests from pages of other sites are refused")

    def check_caller(self, headers: dict[bytes, bytes], client: Any) -> None:
        """A known key, and not too often."""
        caller = f"address {client[0]}" if client else "unknown"
        if self.keys:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            given = headers.get(b"x-api-key") or (token.strip() if scheme.lower() == b"bearer" else b"")
            name = self.keys.who(given)
            if name is None:
                raise Refusal(
                    401,
                    "no_key",
                    "expected a valid API key: `Authorization: Bearer KEY` or `X-API-Key: KEY`",
                    {"WWW-Authenticate": "Bearer"},
                )
            caller = name
        wait = self.rates.wait(caller)
        if wait:
            after = whole_seconds(wait)
            raise Refusal(
                429, "too_often", f"too many requests: try again in {after} s", {"Retry-After": after}
            )

    async def read_body(self, headers: dict[bytes, bytes], receive: Any) -> bytes:
        """The body, given up as soon as it is too large or too slow."""
        limits = self.settings.limits
        if (
            b"content-length" in headers and b"transfer-encoding" in headers
        ):  # a proxy may have taken the other
            raise Refusal(400, "bad_length", "expected Content-Length or Transfer-Encoding, not both")
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit():
            raise Refusal(400, "bad_length", "Content-Length is no number")
        if int(declared[:20]) > limits.body_bytes:
            raise too_large(limits.body_bytes)
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            with Interruptible() as block:
                timer = asyncio.get_running_loop().call_later(limits.body_seconds, block.interrupt)
                try:
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise Refusal(400, "hung_up", "the caller hung up before the body was complete")
                        chunk = message.get("body", b"")
                        if size + len(chunk) > limits.body_bytes:
                            raise too_large(limits.body_bytes)
                        if self.held + len(chunk) > limits.bodies_bytes:
                            raise busy("the memory for requests", 1)
                        size += len(chunk)
                        self.held += len(chunk)
                        chunks.append(chunk)
                        more = message.get("more_body", False)
                finally:
                    timer.cancel()
            if block.interrupted:
                raise Refusal(408, "slow_body", f"the body did not arrive within {limits.body_seconds:g} s")
        except BaseException:
            self.held -= size
            raise
        return b"".join(chunks)

    @contextmanager
    def watching(self, work: Interruptible, receive: Any) -> Iterator[None]:
        """Interrupt the work of a request when its caller hangs up."""
        watch: asyncio.Task[None] | None = None

        async def hung_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            work.interrupt()

        def begin() -> None:
            nonlocal watch
            watch = asyncio.ensure_future(hung_up())

        timer = asyncio.get_running_loop().call_later(WATCH_SECONDS, begin)
        try:
            yield
        finally:
            timer.cancel()
            if watch is not None:
                watch.cancel()


def replaying(body: bytes) -> Any:
    """`receive` for an application that is handed its body whole."""
    given = False

    async def receive() -> Any:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()  # hanging up is watched by the door

    return receive


def check_repeated(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse headers of which a proxy may have taken the first where the last is taken here."""
    names = [name for name, _ in headers]
    for name in ONCE:
        if names.count(name) > 1:
            raise Refusal(400, "repeated_header", f"expected the header {name.decode()} once at the most")


def check_type(headers: dict[bytes, bytes]) -> None:
    """Only JSON: a form that another site's page can send without asking is none."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        came = f", got `{kind[:60].decode('ascii', 'replace')}`" if kind else ""
        raise Refusal(415, "not_json", f"expected `Content-Type: application/json`{came}")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(415, "encoded_body", "expected a body without Content-Encoding")


def check_structure(body: bytes, limits: Limits) -> None:
    """Refuse a body with far more elements than any request can have, before it is parsed into objects.

    A parsed element takes some hundred bytes where two were sent: 32 MB of `[],[],...` would become gigabytes.
    """
    allowed = 64 + 4 * limits.pictures + limits.texts * (limits.characters + 1)
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > allowed:
        raise Refusal(413, "too_many_items", "the body has more elements than any request may have")


def too_large(limit: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the body is larger than {limit:,} bytes")


async def send_refusal(refusal: Refusal, send: Any, *, close: bool) -> None:
    """Answer without the application; `close` ends the connection, for a body that was not read."""
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in refusal.headers.items()]
    if close:
        headers.append((b"connection", b"close"))
    await send_json(refusal.status, json.dumps(refusal.body()).encode(), headers, send)


async def send_json(status: int, content: bytes, headers: Sequence[tuple[bytes, bytes]], send: Any) -> None:
    """A whole answer."""
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*JSON, length, *headers]})
    await send({"type": "http.response.body", "body": content})
