"""Pictures by address: only public ones, checked where the connection goes."""

from __future__ import annotations

import asyncio
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serve.app import create_app
from serve.fetch import CheckedBackend, Fetcher, is_public
from serve.refusal import Refusal
from serve.settings import Fetching, Settings


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.8", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1"),
        *("::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::"),
        *("2001:0:7f00:1::", "2001:db8::1", "", "localhost", "0x7f.1", "2130706433"),
    ],
)
def test_no_address_of_ours_is_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


class Site(BaseHTTPRequestHandler):
    """A site that redirects, drips, floods and serves."""

    def do_GET(self):
        kind = self.path.split("/")[1].partition("?")[0]
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif kind == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
        elif kind == "flood":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(1000):
                    self.wfile.write(b"x" * 65536)
            except OSError:
                self.server.stopped = True
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            except OSError:
                pass
        elif kind == "picture":
            self.server.seen.append(dict(self.headers))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.picture)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(make_picture):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    server.picture, server.seen, server.stopped = make_picture(3), [], False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


NAMES = {"public.example": ["127.0.0.1"], "mixed.example": ["127.0.0.1", "10.0.0.1"]}


async def lookup(host: str, port: int) -> list[str]:
    return NAMES.get(host, [host] if host[0].isdigit() else [])


def fetcher(site, **config) -> Fetcher:
    """A fetcher for which 127.0.0.1 stands for the public internet, and 127.0.0.2 for what is behind the wall."""
    config = Fetching(enabled=True, ports=(site.server_port, 80), **config)
    return Fetcher(config, 1_000_000, lookup, lambda address: address == "127.0.0.1")


def fetch(found: Fetcher, url: str) -> bytes:
    return asyncio.run(found.fetch(url))


def test_a_public_picture_is_fetched_through_redirects(site, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # must not be used
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    base = f"http://public.example:{site.server_port}"
    assert fetch(fetcher(site), f"{base}/picture?a=1") == site.picture
    assert fetch(fetcher(site), f"{base}/to/{base}/to//picture") == site.picture
    assert site.seen[-1]["Host"] == f"public.example:{site.server_port}"
    assert not {"cookie", "authorization"} & {name.lower() for name in site.seen[-1]}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/to/http://127.0.0.2:{port}/picture", "url_refused"),
        ("/to//to/http://169.254.169.254/latest", "url_refused"),
        ("/to/http://mixed.example:{port}/picture", "url_refused"),
        ("/to/file:///etc/passwd", "bad_url"),
        ("/to/gopher://public.example/", "bad_url"),
        ("/to/http://public.example:22/", "url_refused"),
        ("/loop", "url_redirects"),
        ("/missing", "url_failed"),
        ("/flood", "picture_too_large"),
        ("/drip", "url_slow"),
    ],
)
def test_what_a_site_may_do_is_bounded(site, path, code):
    url = f"http://public.example:{site.server_port}" + path.format(port=site.server_port)
    before = len(site.seen)
    with pytest.raises(Refusal) as refusal:
        fetch(fetcher(site, seconds=1.0), url)
    assert refusal.value.code == code
    assert "169.254" not in refusal.value.message
    assert len(site.seen) == before


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("file:///etc/passwd", "bad_url"),
        ("ftp://public.example/a", "bad_url"),
        ("data:image/png;base64,AAAA", "bad_url"),
        ("/etc/passwd", "bad_url"),
        ("", "bad_url"),
        ("http://", "bad_url"),
        ("http:///picture", "bad_url"),
        ("http://[::1", "bad_url"),
        ("http://public.example:99999/", "bad_url"),
        ("http://user:secret@public.example/", "bad_url"),
        ("http://public.example:6379/", "url_refused"),
        ("http://127.0.0.2/", "url_refused"),
        ("http://unknown.example/", "url_failed"),
        ("http://ünknown.example/ä", "bad_url"),
        ("http://unknown.example/a\r\nX-Evil: 1", "bad_url"),
    ],
)
def test_addresses_that_are_not_asked(site, url, code):
    with pytest.raises(Refusal) as refusal:
        fetch(fetcher(site), url)
    assert refusal.value.code == code


def test_a_name_is_looked_up_once_and_the_checked_address_is_used():
    """DNS rebinding: the second answer of the name server is private, and nobody asks for it."""
    answers, connected = [["93.184.216.34"], ["127.0.0.1"]], []

    async def rebinding(host: str, port: int) -> list[str]:
        return answers.pop(0)

    class Recorder:
        async def connect_tcp(self, host, port, **options):
            connected.append((host, port))
            raise ConnectionRefusedError

    found = Fetcher(Fetching(enabled=True), 1000, rebinding, is_public, Recorder())
    with pytest.raises(Refusal, match="could not be fetched"):
        fetch(found, "http://rebinding.example/a.jpg")
    assert connected == [("93.184.216.34", 80)]
    with pytest.raises(Refusal, match="not on the public internet"):
        fetch(found, "http://rebinding.example/a.jpg")
    assert len(connected) == 1


def test_no_socket_of_this_machine_is_opened():
    with pytest.raises(Refusal, match="not on the public internet"):
        asyncio.run(CheckedBackend(lookup, is_public).connect_unix_socket("/run/docker.sock"))


def test_the_server_fetches_when_it_is_allowed_to(models, run_app, site):
    app = create_app(models, Settings(fetching=Fetching(enabled=True)), fetcher=fetcher(site))
    with run_app(app) as live:
        url = f"http://public.example:{site.server_port}/picture"
        status, answer, _ = live.ask("/v1/embed/image", {"images": [{"url": url}]})
        assert status == 200
        expected = models.encoder.encode_images([site.picture])[0].tolist()
        assert answer["embeddings"][0] == pytest.approx(expected, abs=1e-5)
        for url in ("http://127.0.0.2/", "http://localhost/", "file:///etc/passwd"):
            assert 400 <= live.ask("/v1/embed/image", {"images": [{"url": url}]})[0] < 500
    with run_app(create_app(models, Settings(fetching=Fetching(enabled=True)))) as live:  # the real rules
        status, answer, _ = live.ask(
            "/v1/embed/image", {"images": [{"url": f"http://127.0.0.1:{site.server_port}/"}]}
        )
        assert (status, answer["error"]["code"]) == (403, "url_refused")
        status, answer, _ = live.ask("/v1/embed/image", {"images": [{"url": "http://localhost/picture"}]})
        assert (status, answer["error"]["code"]) == (403, "url_refused")
