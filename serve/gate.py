"""The door: host, key, rate and body are checked here, before anything of a request is parsed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

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
    """

    def __init__(self, app: Any, settings: Settings, keys: Keys, metrics: Metrics):
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
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

        size = 0
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self.check_host(headers)
            if scope["path"] not in OPEN:
                self.check_site(headers)
                self.check_caller(headers, scope.get("client"))
            body = b""
            if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
                check_type(headers)
                body = await self.read_body(headers, receive)
                size = len(body)
                check_structure(body, self.settings.limits)
            await self.pass_on(scope, body, receive, answer)
        except Refusal as refusal:
            self.metrics.refused.labels(refusal.code).inc()
            await send_refusal(refusal, answer, close=size == 0)
        finally:
            self.held -= size
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)

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
        until, chunks, size = time.monotonic() + limits.body_seconds, [], 0
        try:
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(0.001, until - time.monotonic()))
                except (asyncio.TimeoutError, TimeoutError):  # two classes before Python 3.11
                    raise Refusal(
                        408, "slow_body", f"the body did not arrive within {limits.body_seconds:g} s"
                    ) from None
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
                if not message.get("more_body", False):
                    return b"".join(chunks)
        except BaseException:
            self.held -= size
            raise

    async def pass_on(self, scope: Any, body: bytes, receive: Any, send: Any) -> None:
        """Run the application on the whole body; stop it when the caller hangs up."""
        given = False

        async def replay() -> Any:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # hanging up is watched below

        async def hung_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work = asyncio.ensure_future(self.app(scope, replay, send))
        gone = asyncio.ensure_future(hung_up())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            else:
                self.metrics.refused.labels("hung_up").inc()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


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
    content = json.dumps(refusal.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        *((name.lower().encode(), value.encode("latin-1")) for name, value in refusal.headers.items()),
    ]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
