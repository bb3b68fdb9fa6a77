"""Many HTTP clients from one thread: what they cost themselves must not be taken for the server's.

A client is a keep-alive connection that asks again as soon as it has been answered. Requests are bytes made
beforehand, answers are kept as bytes: neither is made nor parsed while the clock runs.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass
class Load:
    """What all clients saw.

    Attributes:
        seconds: From the first request to the last answer.
        times: Seconds of each request, in the order of the answers.
        answers: Body of each answer, in the order of the requests.
    """

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)


def post(path: str, body: bytes) -> bytes:
    """A whole request, of JSON."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Client(asyncio.Protocol):
    """One connection; takes the next request until there is none."""

    def __init__(self, todo: Iterator[tuple[int, bytes]], found: Load, done: asyncio.Future):
        self.todo, self.found, self.done = todo, found, done
        self.number, self.began, self.buffer, self.wanted = 0, 0.0, b"", 0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        assert self.transport is not None
        self.number, request = next(self.todo, (0, b""))
        if not request:
            self.transport.close()
            return
        self.buffer, self.wanted, self.began = b"", 0, time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.wanted:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end]
            length = LENGTH.search(head)
            if not head.startswith(b"HTTP/1.1 200 ") or length is None:
                self.fail(RuntimeError(f"expected 200 and a length, got {self.buffer[:500]!r}"))
                return
            self.wanted = end + 4 + int(length[1])
        if len(self.buffer) >= self.wanted:
            self.found.times.append(time.perf_counter() - self.began)
            self.found.answers[self.number] = self.buffer[self.buffer.find(b"\r\n\r\n") + 4 :]
            self.number = -1
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.number > 0 or (self.number == 0 and self.wanted == 0 and self.buffer):
            self.fail(RuntimeError("the server hung up"))
        elif not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        assert self.transport is not None
        if not self.done.done():
            self.done.set_exception(error)
        self.transport.abort()


def load(port: int, requests: Sequence[bytes], clients: int) -> Load:
    """Send all requests to a server on this machine, by so many clients.

    Args:
        port: Of the loopback address.
        requests: As `post` makes them.
        clients: Connections.

    Raises:
        RuntimeError: An answer other than 200, or none.
    """
    found = Load(answers=[b""] * len(requests))

    async def main() -> None:
        loop, todo = asyncio.get_running_loop(), iter(enumerate(requests))
        ends = [loop.create_future() for _ in range(clients)]
        began = time.perf_counter()
        for end in ends:
            await loop.create_connection(lambda end=end: Client(todo, found, end), "127.0.0.1", port)
        await asyncio.wait_for(asyncio.gather(*ends), 300)
        found.seconds = time.perf_counter() - began

    asyncio.run(main())
    assert all(found.answers)
    return found
