"""HTTP as bytes: shapes that proxies and parsers read differently, and heads without end."""

from __future__ import annotations

import json
import socket
import time

import pytest

from serve.app import create_app
from serve.keys import Keys
from serve.server import HEADER_BYTES, HEADERS, PIPELINED, bind
from serve.settings import Settings

POST = b"POST /v1/embed/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"texts":["a"]}'
WHOLE = POST + b"Content-Length: 15\r\n\r\n" + BODY
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


def exchange(port: int, *parts: bytes, pause: float = 0.0, timeout: float = 2.0) -> bytes:
    """Send bytes as they are and read until the server hangs up or says nothing more for `timeout` seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while piece := connection.recv(1 << 16):
                answer += piece
        except OSError:
            pass  # hung up, or nothing more to say
        return answer


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def test_the_second_part_of_an_answer_waits_for_nothing():
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_requests_sent_ahead_are_answered_in_order(live):
    body = [json.dumps({"texts": ["a"] * count}).encode() for count in (1, 2, 3)]
    requests = [POST + b"Content-Length: %d\r\n\r\n" % len(each) + each for each in body]
    answer = exchange(live.port, b"".join(requests), timeout=5)
    assert statuses(answer) == [200, 200, 200]
    pieces = [part.partition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert [len(json.loads(piece)["embeddings"]) for piece in pieces] == [1, 2, 3]


def test_only_so_many_are_taken_ahead(live):
    answer = exchange(live.port, WHOLE * (PIPELINED + 30), timeout=5)
    assert 400 in statuses(answer)
    assert len(statuses(answer)) <= PIPELINED + 2
    assert live.ask("/healthz")[0] == 200


def test_bodies_may_come_in_chunks(live):
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    assert statuses(exchange(live.port, head + b'8\r\n{"texts"\r\n7;a=b\r\n:["a"]}\r\n0\r\n\r\n')) == [200]
    assert statuses(exchange(live.port, head, b"f\r\n", BODY + b"\r\n0\r\n", b"\r\n", pause=0.05)) == [200]


@pytest.mark.parametrize(
    "chunks",
    [
        b"5\r\n" + BODY + b"\r\n0\r\n\r\n",  # longer than it says
        b"ff\r\n" + BODY + b"\r\n0\r\n\r\n",  # shorter
        b"-f\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"0xf\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"f\n" + BODY + b"\n0\n\n",  # line feeds alone
        b"f \r\n" + BODY + b"\r\n0\r\n\r\n",
    ],
)
def test_chunks_of_wrong_sizes_are_no_body(live, chunks):
    answer = exchange(live.port, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks, timeout=0.5)
    assert 200 not in statuses(answer)
    assert not [status for status in statuses(answer) if status >= 500]


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 15\r\nContent-Length: 2\r\n",
        b"Content-Length: 15, 15\r\n",
        b"Content-Length: +15\r\n",
        b"Content-Length: 15\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 15\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
        b"Content-Length : 15\r\n",
        b"Content-Length: 15\r\nX: a\x00b\r\n",
        b"Content-Length: 15\r\n folded: yes\r\n",
        b"Content-Length: 15\nX: a\r\n",
        b"Host: evil.example\r\nContent-Length: 15\r\n",
        b"Content-Length: 15\r\nhost: localhost\r\n",
    ],
)
def test_heads_that_may_be_read_in_two_ways_are_refused(live, head):
    """None is answered, and what follows is not taken for a request of its own."""
    answer = exchange(live.port, POST + head + b"\r\n" + BODY + HEALTH + b"\r\n", timeout=0.5)
    assert 200 not in statuses(answer), answer
    assert not [status for status in statuses(answer) if status >= 500]


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /healthz\r\n\r\n",  # HTTP/0.9
        b"GET /healthz HTTP/1.1\r\n\r\n",  # no Host
        b"GET /healthz HTTP/3.7\r\nHost: localhost\r\n\r\n",
        b"get /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://evil.example HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\x00" * 200,
    ],
)
def test_what_is_no_request_is_answered_with_400_or_nothing(live, request_):
    answer = exchange(live.port, request_, timeout=0.5)
    assert all(400 <= status < 500 for status in statuses(answer)), answer
    assert live.ask("/healthz")[0] == 200


def test_heads_are_bounded(live):
    many = b"".join(b"X-%d: a\r\n" % number for number in range(HEADERS + 5))
    assert statuses(exchange(live.port, HEALTH + many + b"\r\n")) == [400]
    large = b"X-A: " + b"a" * HEADER_BYTES + b"\r\n"
    assert statuses(exchange(live.port, HEALTH + large + b"\r\n")) == [400]
    long = b"GET /" + b"a" * HEADER_BYTES + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert statuses(exchange(live.port, long)) == [400]
    endless = [b"a" * 10_000] * 30  # a value that has no end
    assert statuses(exchange(live.port, HEALTH + b"X-A: ", *endless, pause=0.01)) in ([400], [])
    assert statuses(exchange(live.port, HEALTH + b"X-A: " + b"a" * 20_000 + b"\r\n\r\n")) == [200]


def test_trailers_are_bounded_and_no_headers(models, run_app):
    key = "0123456789abcdef"
    with run_app(create_app(models, Settings(rate=0), keys=Keys([key]))) as live:
        head = POST + b"Transfer-Encoding: chunked\r\n\r\nf\r\n" + BODY + b"\r\n0\r\n"
        assert statuses(exchange(live.port, head + b"X-API-Key: " + key.encode() + b"\r\n\r\n")) == [401]
        keyed = head.replace(b"Host", b"X-API-Key: " + key.encode() + b"\r\nHost", 1)
        assert statuses(exchange(live.port, keyed + b"X-Sum: 1\r\n\r\n")) == [200]
        endless = [b"a" * 10_000] * 30
        assert statuses(exchange(live.port, keyed + b"X-Sum: ", *endless, pause=0.01)) in ([400], [])


def test_a_hundred_slow_callers_hold_up_nobody(live):
    """Slowloris: as many connections as fit, each with half a request."""
    waiting = []
    try:
        for number in range(100):
            connection = socket.create_connection(("127.0.0.1", live.port), timeout=5)
            connection.sendall(HEALTH if number % 2 else POST + b"Content-Length: 40\r\n\r\n{")
            waiting.append(connection)
        assert live.ask("/v1/embed/text", {"texts": ["a"]})[0] == 200
        assert live.ask("/healthz")[0] == 200
    finally:
        for connection in waiting:
            connection.close()
    assert live.ask("/healthz")[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"[" * 100_000 + b"]" * 100_000, 400),
        (b'{"texts": ["a"], "texts": ["b", "c"]}', 200),  # the last counts, as everywhere in Python
        (b'{"texts": [NaN]}', 422),
        (b'{"text": "a", "k": Infinity}', 422),
        (b'{"texts": ["' + b"\xff\xfe" + b'"]}', 400),
        (b'{"texts": ["\\u0000 a \\u0000"]}', 200),
        ('{"texts": ["\u202e\u200d\U0001f9d1\u0301 \ufdfd"]}'.encode(), 200),
        ('{"texts": ["a"]}'.encode("utf-16"), 200),  # JSON says UTF-8, and Python guesses
        (b'{"texts": ["a"]} x', 422),
        (b'{"texts": ["a"]}\0', 422),
        (b'{"texts": ["a"], "k": ' + b"9" * 5000 + b"}", 400),  # longer than Python reads
        (b'{"__proto__": {}, "texts": ["a"]}', 422),
    ],
)
def test_odd_json(live, body, status):
    found, answer, _ = live.ask("/v1/embed/text", body)
    assert found == status, answer
