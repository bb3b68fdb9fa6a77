"""uvicorn around the application: timeouts, shutdown, and what the door must know of the address."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0
HEADER_BYTES = 64 * 1024  # of one request's line and headers; the parser has no limit of its own
HEADERS = 100  # of one request
PIPELINED = 16  # requests that one connection may send before the first is answered
CONNECTIONS = 512


class PatientHttp(HttpToolsProtocol):
    """uvicorn's httptools protocol with bounds where the parser has none.

    Bounded are the bytes and the number of a request's headers, the time in which they must arrive, whatever comes
    without adding to a body (trailers, extensions of chunks), and the requests that one connection sends ahead.
    Trailers are dropped: they must not pass for headers. What is raised in one of the parser's callbacks becomes a 400
    and the end of the connection.
    """

    late: asyncio.TimerHandle | None = None
    in_body = False  # of the request that arrives
    idle_bytes = 0  # since the last headers or piece of a body were complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self.idle_bytes += len(data)
        super().data_received(data)
        if self.idle_bytes > HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("Invalid HTTP request received.")
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > HEADER_BYTES or len(self.headers) > HEADERS or len(self.pipeline) >= PIPELINED:
            raise ValueError("too many or too large headers, or too many requests at once")
        super().on_headers_complete()
        self.in_body, self.idle_bytes = True, 0

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self.idle_bytes = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.in_body = False

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.in_body or answering or self.transport.is_closing():
            self._stop()  # the headers are complete
        elif self.late is None:
            self.late = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None


class Server(uvicorn.Server):
    """A uvicorn server that says when it listens.

    Args:
        config: uvicorn's configuration.
        started: Called once with the port that was bound.
    """

    def __init__(self, config: uvicorn.Config, listening: Callable[[int], None] | None = None):
        super().__init__(config)
        self.listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if sockets is None:  # uvicorn would end the process where the port is taken
            sockets = [bind(self.config.host, self.config.port)]
        await super().startup(sockets=sockets)
        if self.started and self.listening is not None:
            self.listening(self.servers[0].sockets[0].getsockname()[1])


def make_server(
    app: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace: float = 60.0,
    listening: Callable[[int], None] | None = None,
) -> Server:
    """A server that is not yet running.

    Args:
        app: The application.
        host: Address to listen on.
        port: 0 takes a free one.
        grace: Seconds that answers in progress are waited for when the server goes down.
        listening: Called once with the port.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PatientHttp,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody could claim any address
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(grace),
    )
    return Server(config, listening)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, whose connections send what they are given at once.

    asyncio sees to that for its own sockets alone. An answer has two parts, and the second would wait for the first to
    be acknowledged, up to 40 ms.

    Raises:
        OSError: The port is taken, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port} ({error.strerror or error}): choose another --port (0 takes a free "
            "one) or --host"
        ) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # those that are accepted inherit it
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
