import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.fetch import cache_folder, local_shard
from data.shards import Sample, ShardWriter
from data.stream import PairStream


class Server:
    """A loopback server whose answers are scripted: status code, or bytes to send before hanging up."""

    def __init__(self, content: bytes):
        self.content = content
        self.script: list[int | str] = []
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                step = outer.script.pop(0) if outer.script else 200
                if step not in (200, "cut"):
                    self.send_error(int(step))
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.content)))
                self.end_headers()
                self.wfile.write(outer.content if step == 200 else outer.content[: len(outer.content) // 2])

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server(tmp_path, make_picture):
    with ShardWriter(tmp_path / "source") as writer:
        for n in range(5):
            writer.write(Sample(f"{n}", make_picture(n), "jpg", ["a text"]))
    server = Server((tmp_path / "source/00000.tar").read_bytes())
    yield server
    server.close()


def load(sample, rng):
    return sample.key


def collate(rows):
    return {"keys": rows}


def test_a_shard_is_fetched_once_and_streamed(server, tmp_path):
    urls = [f"{server.url}/a/{n}.tar" for n in range(2)]
    for _ in range(2):
        stream = PairStream(urls, load, collate, batch_size=4, cache_dir=tmp_path / "cache")
        assert stream.samples == 10
        keys = [key for batch in stream.epoch() for key in batch["keys"]]
        assert sorted(keys) == sorted("01234" * 2)
    assert server.asked == ["/a/0.tar", "/a/1.tar"]
    assert stream.indices[0].name == urls[0]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # and nothing half-written


@pytest.mark.parametrize("troubles", [[503, 500], ["cut", "cut", 429]])
def test_another_attempt_after_trouble(server, tmp_path, troubles):
    server.script = list(troubles)
    path = local_shard(f"{server.url}/s.tar?version=1", tmp_path, backoff=0.01)
    assert path.read_bytes() == server.content
    assert path.name.endswith("-s.tar")
    assert len(server.asked) == len(troubles) + 1


def test_giving_up_names_the_url(server, tmp_path):
    server.script = ["cut"] * 5
    with pytest.raises(
        FileNotFoundError, match=rf"shard {server.url}/s.tar cannot be fetched \(5 attempts\)"
    ):
        local_shard(f"{server.url}/s.tar", tmp_path, backoff=0.001)
    assert list(tmp_path.glob("*.tar")) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_a_missing_shard_is_not_asked_for_twice(server, tmp_path):
    server.script = [404]
    with pytest.raises(FileNotFoundError, match=r"\(1 attempts\): HTTP Error 404"):
        local_shard(f"{server.url}/s.tar", tmp_path)
    assert len(server.asked) == 1


def test_nobody_listens(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched.*Check the address"):
        local_shard("http://127.0.0.1:9/s.tar", tmp_path, backoff=0.001)


def test_other_schemes(tmp_path):
    with pytest.raises(ValueError, match=r"shard ftp://a/b.tar: expected a local path or an http\(s\) URL"):
        local_shard("ftp://a/b.tar", tmp_path)


def test_local_paths_stay_and_the_cache_follows_xdg(monkeypatch, tmp_path):
    assert local_shard("a/b.tar") == Path("a/b.tar")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pairstream/shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/pairstream/shards"
