"""What a stranger may send: refused with 4xx, in bounded memory, and the server answers the next caller."""

from __future__ import annotations

import base64
import gc
import io
import json
import socket
import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from serve.app import create_app
from serve.keys import Keys
from serve.settings import Batching, Limits, Settings

MiB = 1 << 20
JSON = {"Content-Type": "application/json"}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, data: bytes | None = None, extra: bytes = b"") -> bytes:
    """A valid grey PNG of any size in a few kilobytes; its pixels are zeros unless given."""
    if data is None:
        squeeze = zlib.compressobj(9)
        row = b"\0" * (width + 1)
        data = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
    return head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(format: str, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, format)
    return file.getvalue()


def refused(live, path, content, code=None, status=None, headers=None):
    found, answer, _ = live.ask(path, content, headers)
    assert 400 <= found < 500, (found, answer)
    assert answer["error"].keys() == {"code", "message"}
    assert len(json.dumps(answer)) < 1500  # what was sent is not sent back
    assert status is None or found == status, answer
    assert code is None or answer["error"]["code"] == code, answer
    return answer["error"]["message"]


@pytest.fixture
def images(picture_field):
    return lambda *contents: {"images": [picture_field(content) for content in contents]}


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        "text",
        7,
        {},
        {"images": None},
        {"images": []},
        {"images": {}},
        {"images": "abc"},
        {"images": [None]},
        {"images": [7]},
        {"images": [{}]},
        {"images": [{"data": None}]},
        {"images": [{"data": 7}]},
        {"images": [{"data": ["YQ=="]}]},
        {"images": [{"data": ""}]},
        {"images": [{"data": "not base64!"}]},
        {"images": [{"data": "YQ==", "url": "http://a.example/"}]},
        {"images": [{"data": "data:image/png,abc"}]},
        {"images": [{"data": "data:" + "x" * 300}]},
        {"images": [{"data": "YQ==", "path": "/etc/passwd"}]},
        {"images": [{"data": "/etc/passwd"}]},
        {"images": [{"data": "YQ=="}], "model": "other"},
    ],
)
def test_wrong_types_are_refused(live, content):
    refused(live, "/v1/embed/image", b"null" if content is None else content, status=422)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/embed/text", {"texts": "a"}),
        ("/v1/embed/text", {"texts": [1]}),
        ("/v1/embed/text", {"texts": [["a"]]}),
        ("/v1/embed/text", b'{"texts": ["\\ud800"]}'),
        ("/v1/embed/text", b'{"texts": ["a"], "\\ud800": 1}'),
        ("/v1/classify", b'{"images": [{"data": "\\ud800"}], "labels": ["\\udfff"]}'),
        ("/v1/search", {"text": "a", "k": 0}),
        ("/v1/search", {"text": "a", "k": -1}),
        ("/v1/search", {"text": "a", "k": 1.5}),
        ("/v1/search", {"text": "a", "k": "5"}),
        ("/v1/search", {"text": "a", "k": 1 << 70}),
        ("/v1/search", {"text": "a", "k": True}),
        ("/v1/search", {"text": "a", "among": "passwords"}),
        ("/v1/search", {}),
        ("/v1/search", {"text": "a", "image": {"data": "YQ=="}}),
        ("/v1/classify", {"images": [{"data": "YQ=="}], "labels": []}),
        ("/v1/classify", {"images": [{"data": "YQ=="}], "labels": ["a"], "template": "no place"}),
        ("/v1/classify", {"images": [{"data": "YQ=="}], "labels": ["a"], "template": "{0.__class__}"}),
        ("/v1/vqa", {"image": {"data": "YQ=="}, "questions": [" "]}),
        ("/v1/vqa", {"image": {"data": "YQ=="}, "questions": ["word " * 300]}),
        ("/v1/caption", {"images": [{"data": "YQ=="}]}),
    ],
)
def test_wrong_values_are_refused(live, path, content):
    refused(live, path, content)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b'{"texts": [' + b"[" * 50_000,
        b'{"texts": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"texts": ' + b"9" * 100_000 + b"}",
        b'{"texts": [NaN, Infinity]}',
        b'{"texts": ["\\u0000"]' + b"\0" * 100,
    ],
)
def test_broken_json_is_refused(live, body):
    refused(live, "/v1/embed/text", body)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_only_json_is_read(live, kind):
    body = json.dumps({"texts": ["a"]}).encode()
    refused(live, "/v1/embed/text", body, "not_json", 415, {"Content-Type": kind})
    refused(live, "/v1/embed/text", body, "encoded_body", 415, {"Content-Encoding": "gzip"})


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "EPS", "PDF", "JPEG2000"])
def test_only_listed_formats_are_tried(live, images, format):
    content = saved(format, (16, 16))
    refused(live, "/v1/embed/image", images(content), "bad_picture", 422)


def test_pictures_that_are_none_are_refused(live, images, make_picture):
    whole = make_picture(1, (64, 64), "PNG")
    for content in (
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        whole[: len(whole) // 2],
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff" + b"\0" * 1000,
        b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\xff" * 100,
        png(8, 8, data=b"no zlib"),
    ):
        refused(live, "/v1/embed/image", images(content), "bad_picture", 422)
        refused(live, "/v1/caption", images(content), "bad_picture", 422)
    status, _, _ = live.ask("/v1/embed/image", images(whole))
    assert status == 200


def peak_memory() -> int:
    """Bytes: the largest resident size since `forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> int:
    """Reset the peak; returns the present size, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's own count of memory")
def test_bombs_and_floods_take_no_memory(live, images):
    bomb = png(30_000, 30_000, data=zlib.compress(b"\0" * 1000))  # would be 900 MB of grey, 2.7 GB of RGB
    real = png(12_000, 12_000)  # every pixel is there, in 140 kB
    thin = png(2_000_000, 1)  # as high as the model's pictures it would be 190 megapixels
    notes = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (200 * MiB), 9))
    before = forget_peak()
    refused(live, "/v1/embed/image", images(bomb), "picture_too_large", 413)
    refused(live, "/v1/caption", images(real), "picture_too_large", 413)
    refused(
        live, "/v1/vqa", {"image": images(real)["images"][0], "questions": ["a?"]}, "picture_too_large", 413
    )
    refused(live, "/v1/embed/image", images(png(8, 8, extra=notes)))
    assert live.ask("/v1/embed/image", images(thin))[0] == 200
    refused(live, "/v1/embed/text", b'{"texts": [' + b'"a",' * 1_000_000 + b'"a"]}', "too_many_items", 413)
    refused(live, "/v1/embed/image", b'{"images": [' + b"[]," * 10_000_000 + b"[]]}", "too_many_items", 413)
    refused(live, "/v1/embed/image", b'{"images": [' + b"{}," * 400_000 + b"{}]}")
    grown = peak_memory() - before
    assert grown < 250 * MiB, f"{grown / MiB:.0f} MiB"
    assert live.ask("/v1/embed/text", {"texts": ["a"]})[0] == 200


def test_a_jpeg_of_a_thousand_scans_is_refused_undecoded(live, images):
    file = io.BytesIO()
    Image.new("L", (64, 64), 90).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rfind(b"\xff\xda")  # a scan is repeated, which no decoder minds
    endless = content[:last] + content[last:-2] * 1000 + content[-2:]
    message = refused(live, "/v1/embed/image", images(endless), "picture_too_large", 413)
    assert "scans" in message
    assert live.ask("/v1/embed/image", images(content))[0] == 200


def test_numbers_of_items_and_lengths_of_texts_are_bounded(live, images, make_picture):
    content = make_picture(1)
    refused(live, "/v1/embed/text", {"texts": ["a"] * 257}, "too_many_items", 413)
    refused(live, "/v1/embed/text", {"texts": ["a" * 2001]}, "text_too_long", 413)
    refused(live, "/v1/embed/image", images(*[content] * 65), "too_many_items", 413)
    refused(live, "/v1/classify", {**images(content), "labels": ["a"] * 257}, "too_many_items", 413)
    refused(
        live, "/v1/classify", {**images(content), "labels": ["a"], "template": "{}" * 1001}, "text_too_long"
    )
    template = "{}" * 900
    refused(
        live,
        "/v1/classify",
        {**images(content), "labels": ["a" * 900], "template": template},
        "text_too_long",
    )
    refused(live, "/v1/search", {"text": "a", "k": 101}, "too_many_items", 413)
    big = {"data": base64.b64encode(b"\0" * (13 * MiB)).decode()}
    refused(live, "/v1/embed/image", {"images": [big]}, "picture_too_large", 413)


def raw(port: int, content: bytes, *, parts: int = 1, pause: float = 0.0, timeout: float = 10.0) -> bytes:
    """Send bytes as they are, in parts, and read until the server hangs up or `timeout`."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        try:
            step = max(1, len(content) // parts)
            for start in range(0, len(content), step):
                connection.sendall(content[start : start + step])
                time.sleep(pause)
        except OSError:
            pass  # the server has hung up already
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except OSError:
            pass
        return answer


def test_bodies_are_counted_while_they_arrive(models, run_app):
    with run_app(create_app(models, Settings(limits=Limits(body_bytes=100_000)))) as live:
        port = live.port
        head = b"POST /v1/embed/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        declared = raw(port, head + b"Content-Length: 99999999999\r\n\r\n")
        assert declared.startswith(b"HTTP/1.1 413")
        piece = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
        streamed = raw(port, head + b"Transfer-Encoding: chunked\r\n\r\n" + piece * 2000)
        assert streamed.startswith(b"HTTP/1.1 413") or streamed == b""  # reset while it was still sending
        for length in (b"-5", b"abc", b"1e3", b"9" * 5000):
            assert raw(port, head + b"Content-Length: " + length + b"\r\n\r\n").split()[1][:1] == b"4"
        both = head + b"Content-Length: 15\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert raw(port, both + b'f\r\n{"texts":["a"]}\r\n0\r\n\r\n').startswith(b"HTTP/1.1 400")
        assert live.ask("/v1/embed/text", {"texts": ["a"]})[0] == 200
        assert live.app.middleware_stack is not None


def test_all_bodies_together_are_bounded(models, run_app):
    with run_app(create_app(models, Settings(limits=Limits(bodies_bytes=50_000)))) as live:
        head = b"POST /v1/embed/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        waiting = []
        for _ in range(2):
            connection = socket.create_connection(("127.0.0.1", live.port), timeout=10)
            connection.sendall(head + b"Content-Length: 60000\r\n\r\n" + b" " * 20_000)
            waiting.append(connection)
        time.sleep(0.3)
        status, answer, headers = live.ask("/v1/embed/text", {"texts": ["a" * 1000] * 15})
        assert (status, answer["error"]["code"]) == (503, "busy")
        assert int(headers["Retry-After"]) >= 1
        for connection in waiting:
            connection.close()
        time.sleep(0.3)
        assert live.ask("/v1/embed/text", {"texts": ["a" * 1000] * 15})[0] == 200  # nothing stays counted


def test_slow_callers_are_hung_up_on(models, run_app, monkeypatch):
    monkeypatch.setattr("serve.server.HEADER_SECONDS", 0.4)
    with run_app(create_app(models, Settings(limits=Limits(body_seconds=0.4)))) as live:
        head = b"POST /v1/embed/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow = head + b"Content-Length: 40\r\n\r\n" + b" " * 20
        assert raw(live.port, slow, parts=1).startswith(b"HTTP/1.1 408")
        assert raw(live.port, b"GET /healthz HTTP/1.1\r\nX-A: " + b"a" * 50, parts=25, pause=0.1) == b""
        assert raw(live.port, b"") == b""  # a connection that never says anything
        assert live.ask("/v1/embed/text", {"texts": ["a"]})[0] == 200


def test_a_caller_who_hangs_up_takes_the_request_along(models, run_app, monkeypatch):
    app = create_app(models)
    service = app.state.service
    monkeypatch.setattr(service.texts, "run", lambda texts: time.sleep(0.5) or [[0.0]] * len(texts))
    with run_app(app) as live:
        body = json.dumps({"texts": ["a"]}).encode()
        head = b"POST /v1/embed/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for _ in range(5):
            connection = socket.create_connection(("127.0.0.1", live.port))
            connection.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.05)
            connection.close()
        until = time.monotonic() + 5
        while b'pairstream_refused_total{reason="hung_up"} 5.0' not in live.ask("/metrics")[1]:
            assert time.monotonic() < until, "the requests went on"
            time.sleep(0.05)
        while service.texts.admitted:  # the pass that was running may still end
            assert time.monotonic() < until, "the requests went on"
            time.sleep(0.05)


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/v1/../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/pictures/../../../etc/passwd",
        "/v1/pictures/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/pictures/%00",
        "/v1/pictures/1e3",
        "/v1/pictures/99999999999999999999999999",
        "/v1/pictures/-1",
        "//v1/info/..",
        "/v1/info/",
        "/v1/pictures/",
        "/page.html",
        "/docs",
        "/redoc",
        "/v1/" + "a" * 5000,
    ],
)
def test_path_tricks_lead_nowhere(live, path):
    status, answer, _ = live.ask(path)
    assert 400 <= status < 500
    assert b"root:" not in (answer if isinstance(answer, bytes) else json.dumps(answer).encode())


def test_balancers_may_ask_for_the_head_of_health(live):
    for path in ("/", "/healthz", "/readyz"):
        status, answer, _ = live.ask(path, method="HEAD", headers={"Accept": "application/json"})
        assert (status, answer) == (200, b"")


def test_pictures_that_are_given_up_leave_nothing_in_the_log(
    models, run_app, make_picture, caplog, monkeypatch
):
    app = create_app(models, Settings(embedding=Batching(deadline=0.2), decoders=1))
    monkeypatch.setattr("serve.service.decode", lambda content, limits: time.sleep(0.4))
    with run_app(app) as live:
        content = {"images": [{"data": base64.b64encode(make_picture(1)).decode()}] * 4}
        status, answer, _ = live.ask("/v1/embed/image", content)
        assert (status, answer["error"]["code"]) == (504, "deadline")
        body = json.dumps(content).encode()
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            head = "POST /v1/embed/image HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.1)
        until = time.monotonic() + 5
        while app.state.service.images.admitted:
            assert time.monotonic() < until, "the request went on"
            time.sleep(0.02)
        gc.collect()  # a future whose exception nobody took says so when it goes
        assert live.ask("/healthz")[0] == 200
    gc.collect()
    assert not caplog.records


def test_other_methods_are_refused(live):
    for method in ("PUT", "DELETE", "PATCH"):
        assert live.ask("/v1/embed/text", {"texts": ["a"]}, method=method)[0] == 405
    assert live.ask("/v1/embed/text")[0] == 405
    status, _, headers = live.ask(
        "/v1/embed/text",
        headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
        method="OPTIONS",
    )
    assert 400 <= status < 500
    assert not [name for name in headers if name.lower().startswith("access-control")]  # CORS is closed


def test_pages_of_others_are_stopped(live):
    texts = {"texts": ["a"]}
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "169.254.169.254"):
        refused(live, "/v1/embed/text", texts, "unknown_host", 400, {"Host": host})
    for host in ("localhost:9", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert live.ask("/v1/embed/text", texts, {"Host": host})[0] == 200
    refused(live, "/v1/embed/text", texts, "cross_site", 403, {"Sec-Fetch-Site": "cross-site"})
    assert live.ask("/v1/embed/text", texts, {"Sec-Fetch-Site": "same-origin"})[0] == 200


def test_addresses_are_off_unless_switched_on(live):
    for url in ("http://169.254.169.254/latest", "file:///etc/passwd", "https://example.com/a.jpg"):
        refused(live, "/v1/embed/image", {"images": [{"url": url}]}, "urls_off", 403)


def test_keys_and_rates(models, run_app):
    key = "0123456789abcdef"
    with run_app(create_app(models, Settings(rate=0.5, burst=3), keys=Keys([key, "f" * 16]))) as live:
        texts = {"texts": ["a"]}
        for headers in (
            {},
            {"X-API-Key": "wrong"},
            {"Authorization": f"Basic {key}"},
            {"X-API-Key": key[:-1]},
        ):
            refused(live, "/v1/embed/text", texts, "no_key", 401, headers)
            for path in ("/v1/info", "/metrics", "/v1/pictures/0"):
                assert live.ask(path, headers=headers)[0] == 401
        assert live.ask("/healthz")[0] == 200
        assert live.ask("/")[0] == 200
        assert live.ask("/v1/embed/text", texts, {"Authorization": f"Bearer {key}"})[0] == 200
        assert live.ask("/v1/embed/text", texts, {"X-API-Key": key})[0] == 200
        assert live.ask("/v1/info", headers={"X-API-Key": key})[0] == 200
        status, answer, headers = live.ask("/v1/info", headers={"X-API-Key": key})
        assert (status, answer["error"]["code"]) == (429, "too_often")
        assert int(headers["Retry-After"]) >= 1
        assert live.ask("/v1/info", headers={"X-API-Key": "f" * 16})[0] == 200  # each key has its own


def test_a_full_queue_answers_at_once(models, run_app, monkeypatch):
    import threading

    app = create_app(models, Settings(embedding=Batching(queue=2), rate=0))
    go = threading.Event()
    monkeypatch.setattr(app.state.service.texts, "run", lambda texts: go.wait(20) and [[0.0]] * len(texts))
    with run_app(app) as live:
        found: list[int] = []
        ask = lambda: found.append(live.ask("/v1/embed/text", {"texts": ["a"]})[0])  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while app.state.service.texts.admitted < 2 and time.monotonic() < until:
            time.sleep(0.01)
        status, answer, headers = live.ask("/v1/embed/text", {"texts": ["a"]})
        assert (status, answer["error"]["code"]) == (503, "busy")
        assert int(headers["Retry-After"]) >= 1
        assert live.ask("/healthz")[0] == 200
        go.set()
        for thread in threads:
            thread.join()
        assert found == [200, 200]
