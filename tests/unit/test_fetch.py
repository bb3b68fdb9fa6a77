"""Shards from elsewhere: what is asked for, what is asked for again, what stays in the cache."""

import multiprocessing
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import fsspec
import pytest

import data.fetch as module
from data.ahead import NAME, Ahead
from data.fetch import ShardCache, cache_folder, local_shard
from data.index import index_shard
from data.shards import Sample, ShardWriter, expand_shards
from data.stream import PairStream


class Server:
    """A loopback server that knows ranges; `script` holds what its next GETs do instead of answering.

    A number is a status, `cut` hangs up after half of what it promised. `ranges=False` sends everything always.
    """

    def __init__(self, content: bytes):
        self.content = content
        self.script: list[int | str] = []
        self.asked: list[tuple[str, str | None]] = []
        self.ranges, self.version = True, '"v1"'
        self.index: bytes | None = None  # what lies beside every shard
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.content)))
                self.send_header("ETag", outer.version)
                self.end_headers()

            def do_GET(self):
                wanted = self.headers.get("Range")
                if self.path.partition("?")[0].endswith(".idx"):
                    self.send_response(404 if outer.index is None else 200)
                    self.send_header("Content-Length", str(len(outer.index or b"")))
                    self.end_headers()
                    self.wfile.write(outer.index or b"")
                    return
                outer.asked.append((self.path, wanted))
                step = outer.script.pop(0) if outer.script else 200
                if step not in (200, "cut"):
                    self.send_error(int(step))
                    return
                content = outer.content
                match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "") if outer.ranges else None
                if match:
                    first, last = int(match[1]), min(int(match[2]), len(content) - 1)
                    content = content[first : last + 1]
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(outer.content)}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content if step == 200 else content[: len(content) // 2])

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def paths(self) -> list[str]:
        return sorted(path for path, _ in self.asked)

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def shard(tmp_path, make_picture) -> bytes:
    with ShardWriter(tmp_path / "source") as writer:
        for n in range(5):
            writer.write(Sample(f"{n}", make_picture(n), "jpg", ["a text"]))
    return (tmp_path / "source/00000.tar").read_bytes()


@pytest.fixture
def server(shard):
    server = Server(shard)
    yield server
    server.close()


def load(sample, rng):
    return sample.key


def collate(rows):
    return {"keys": rows}


def keys_of(stream: PairStream) -> list[str]:
    return sorted(key for batch in stream.epoch() for key in batch["keys"])


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name.split("-", 1)[1] for path in folder.glob("*.tar"))


def test_a_shard_is_fetched_once_and_streamed(server, tmp_path):
    urls = [f"{server.url}/a/{n}.tar" for n in range(2)]
    for workers in (0, 2):
        stream = PairStream(urls, load, collate, batch_size=4, cache_dir=tmp_path / "cache", workers=workers)
        assert stream.samples == 10
        assert keys_of(stream) == sorted("01234" * 2)
    assert server.paths == ["/a/0.tar", "/a/1.tar"]
    assert stream.indices[0].name == urls[0]
    left = {path.suffix for path in (tmp_path / "cache").iterdir() if path.is_file()}
    assert left == {".tar", ".idx"}  # nothing half-written


def test_a_cache_that_cannot_be_written_is_one_error(server, tmp_path):
    (tmp_path / "file").touch()
    for folder, says in ((tmp_path / "file", "cannot be made"), (Path("/proc/cache"), "cannot be made")):
        with pytest.raises(ValueError, match=f"cache_dir {folder} {says} .*give the path of a folder"):
            PairStream(f"{server.url}/s.tar", load, collate, batch_size=4, cache_dir=folder)
    with (
        mock.patch("data.fetch.os.access", return_value=False),
        pytest.raises(ValueError, match="cannot be written to: give another folder, or the right to"),
    ):
        PairStream(f"{server.url}/s.tar", load, collate, batch_size=4, cache_dir=tmp_path / "cache")
    assert server.paths == []


@pytest.mark.parametrize("troubles", [[503, 500], ["cut", "cut", 429]])
def test_another_attempt_after_trouble(server, tmp_path, troubles):
    server.script = list(troubles)
    path = local_shard(f"{server.url}/s.tar?version=1", tmp_path, backoff=0.01)
    assert path.read_bytes() == server.content
    assert path.name.endswith("-s.tar")
    assert len(server.asked) == len(troubles) + 1


def test_a_broken_transfer_goes_on_where_it_was(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 3000)
    server.script = [200, 200, "cut", 503, 200]
    path = local_shard(f"{server.url}/s.tar", tmp_path, backoff=0.01)
    assert path.read_bytes() == server.content
    starts = [int(re.findall(r"\d+", wanted)[0]) for _, wanted in server.asked]
    assert starts[:6] == [0, 3000, 6000, 6000, 6000, 9000]
    assert len(starts) == -(-len(server.content) // 3000) + 2


def test_failures_with_progress_between_them_do_not_add_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 2000)
    server.script = [200, "cut"] * 4  # one failure after each part
    assert local_shard(f"{server.url}/s.tar", tmp_path, backoff=0.001).read_bytes() == server.content


def test_a_server_that_knows_no_ranges(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 3000)
    server.ranges = False
    assert local_shard(f"{server.url}/s.tar", tmp_path).read_bytes() == server.content
    assert len(server.asked) == 1


def test_giving_up_names_the_url(server, tmp_path):
    server.script = ["cut"] * 5
    with pytest.raises(
        FileNotFoundError, match=rf"shard {server.url}/s.tar cannot be fetched \(5 attempts\)"
    ):
        local_shard(f"{server.url}/s.tar", tmp_path, backoff=0.001)
    assert [path for path in tmp_path.iterdir() if path.is_file() and "s.tar" in path.name] == []


def test_a_missing_shard_is_not_asked_for_twice(server, tmp_path):
    server.script = [404]
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched \(1 attempts\)"):
        local_shard(f"{server.url}/s.tar", tmp_path)
    assert len(server.asked) == 1


def test_nobody_listens(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched.*Check the address"):
        local_shard("http://127.0.0.1:9/s.tar", tmp_path, backoff=0.001)


def test_other_schemes(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"shard nope://a/b.tar: expected a local path, `pipe:COMMAND`, or a URL"
    ):
        local_shard("nope://a/b.tar", tmp_path)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"s3:// needs the package s3fs: pip install 'pairstream\[remote\]'"
    ):
        local_shard("s3://a/b.tar", tmp_path)


def test_any_file_system_of_fsspec(shard, tmp_path):
    memory = fsspec.filesystem("memory")
    for n in range(3):
        memory.pipe(f"/bucket/{n}.tar", shard)
    stream = PairStream(
        "memory://bucket/{0..2}.tar", load, collate, batch_size=4, cache_dir=tmp_path / "cache"
    )
    assert keys_of(stream) == sorted("01234" * 3)
    memory.pipe("/bucket/0.tar.idx", b"")
    for pattern, numbers in (("*.tar", "012"), ("?.tar", "012"), ("[12].tar", "12"), ("*", "012")):
        assert expand_shards(f"memory://bucket/{pattern}") == [f"memory:///bucket/{n}.tar" for n in numbers]
    versioned = ["s3://bucket/0.tar?versionId=3", "http://host/0.tar?key=*&x[]=1"]
    assert expand_shards(versioned) == versioned
    with pytest.raises(
        ValueError, match=r"http://host/\*.tar: http lists no folders, so name them with braces"
    ):
        expand_shards("http://host/*.tar")
    with pytest.raises(ValueError, match=r"shard nope://a/\*.tar: expected a local path"):
        expand_shards("nope://a/*.tar")
    with pytest.raises(
        FileNotFoundError, match=r"shard memory://bucket/3.tar cannot be fetched \(1 attempts\)"
    ):
        local_shard("memory://bucket/3.tar", tmp_path)


def test_a_pipe(shard, tmp_path):
    source = tmp_path / "source/00000.tar"
    stream = PairStream(f"pipe:cat {source}", load, collate, batch_size=4, cache_dir=tmp_path / "cache")
    assert keys_of(stream) == list("01234")
    with pytest.raises(FileNotFoundError, match=r"\(5 attempts\): .*the command ended with 3: no such luck"):
        local_shard("pipe:printf half; echo no such luck >&2; exit 3", tmp_path, backoff=0.001)
    with pytest.raises(FileNotFoundError, match=r"\(5 attempts\): .*the command wrote nothing: gone"):
        local_shard("pipe:(echo gone >&2; false) | cat", tmp_path, backoff=0.001)
    flaky = f"pipe:if [ -e {tmp_path}/tried ]; then cat {source}; else touch {tmp_path}/tried; printf x; false; fi"
    assert local_shard(flaky, tmp_path, backoff=0.001).read_bytes() == shard


# The cache


def fill(cache: ShardCache, url: str, names: str) -> None:
    for second, name in enumerate(names):
        path = cache.local(f"{url}/{name}.tar")[0]
        os.utime(path, (1e9 + second, 1e9 + second))


def test_the_least_recently_used_make_room(server, tmp_path):
    size = len(server.content)
    cache = ShardCache(tmp_path / "cache", limit=3 * size + 10)
    fill(cache, server.url, "abc")
    cache.local(f"{server.url}/a.tar")  # read again, so b is the oldest now
    cache.local(f"{server.url}/d.tar")
    assert shards_in(tmp_path / "cache") == ["a.tar", "c.tar", "d.tar"]
    cache.local(f"{server.url}/e.tar")
    assert shards_in(tmp_path / "cache") == ["a.tar", "d.tar", "e.tar"]
    assert server.paths == [f"/{name}.tar" for name in "abcde"]


def test_a_shard_larger_than_the_cache(server, tmp_path):
    with pytest.raises(
        ValueError, match=r"has [\d,]+ bytes, more than cache_limit \(1,000\): raise the limit"
    ):
        ShardCache(tmp_path, limit=1000).local(f"{server.url}/a.tar")


def settled(server) -> int:
    """How often the server was asked, once what is fetched ahead has come."""
    for thread in threading.enumerate():
        if thread.name.startswith(NAME):
            thread.join(60)  # it ends with what it is at, once its stream is gone
    return len(server.asked)


def test_a_set_larger_than_the_cache_is_streamed_from_its_kept_index(server, tmp_path):
    urls = [f"{server.url}/{n}.tar" for n in range(6)]
    size = len(server.content)
    options = {
        "batch_size": 5,
        "shuffle": False,
        "cache_dir": tmp_path / "cache",
        "cache_limit": 2 * size + 10,
    }
    stream = PairStream(urls, load, collate, **options)
    assert keys_of(stream) == sorted("01234" * 6)
    assert len(shards_in(tmp_path / "cache")) <= 2
    before = settled(server)
    PairStream(urls, load, collate, **options)
    assert len(server.asked) == before  # the second start has all indices, though not the shards


def _fetch(folder: str, url: str, limit: int, names: list[str], at: object) -> None:
    at.wait()  # type: ignore[attr-defined]
    cache = ShardCache(Path(folder), limit=limit)
    for name in names:
        cache.local(f"{url}/{name}.tar")


def test_several_processes_share_a_cache(server, tmp_path):
    size = len(server.content)
    limit = 4 * size + 10
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    names = [list("abcd"), list("abcd"), list("dcba")]
    workers = [
        context.Process(target=_fetch, args=(str(tmp_path), server.url, limit, own, barrier)) for own in names
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert server.paths == ["/a.tar", "/b.tar", "/c.tar", "/d.tar"]  # each once, by one of the three
    assert all(path.read_bytes() == server.content for path in tmp_path.glob("*.tar"))


def test_what_a_killed_process_left_is_replaced(server, tmp_path):
    cache = ShardCache(tmp_path)
    path = cache.path(f"{server.url}/a.tar")
    (tmp_path / f".tmp-{path.name}-99999").write_bytes(b"half")
    cache.local(f"{server.url}/a.tar")
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == [path.name]


# On the way


def test_a_shard_that_is_gone_at_its_source_is_counted(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    urls = [f"{server.url}/{n}.tar" for n in range(4)]
    stream = PairStream(urls, load, collate, batch_size=5, cache_dir=tmp_path, shuffle=False, max_faults=0.3)
    stream.cache.path(urls[1]).unlink()  # dropped from the cache
    before = len(server.asked)
    server.script = [404] * 9
    batches = [batch.keys for batch in stream.epoch()]
    assert stream.faults == {"unreadable_shard": 5}
    # Asked for when it is read, and ahead of that where the thread comes to it; not again for each of five samples.
    assert len(server.asked) - before in (1, 2)
    server.script = []
    assert batches == [list("01234"), [], list("01234"), list("01234")]
    assert [batch.indices.tolist() for batch in stream.iterate(5, 6)] == [[5, 6, 7, 8, 9]]  # it is back


def test_a_shard_that_changed_at_its_source_is_not_read_by_the_old_index(server, tmp_path):
    urls = [f"{server.url}/{n}.tar" for n in range(4)]
    options = {"batch_size": 5, "cache_dir": tmp_path, "shuffle": False, "max_faults": 0.3}
    stream = PairStream(urls, load, collate, **options)
    stream.cache.path(urls[1]).unlink()
    server.version = '"v2"'
    list(stream.epoch())
    assert stream.faults == {"unreadable_shard": 5}
    assert PairStream(urls, load, collate, **options).faults == {}


def index_of(folder: Path, shard: bytes) -> bytes:
    """What a team copies to its bucket along with the shard."""
    folder.mkdir()
    path = folder / "0.tar"
    path.write_bytes(shard)
    os.utime(path, (1, 1))  # one that was just written keeps no index
    index_shard(path)
    return path.with_name("0.tar.idx").read_bytes()


def test_an_index_beside_a_shard_elsewhere_saves_fetching_it(server, shard, tmp_path):
    server.index = index_of(tmp_path / "kept", shard)
    urls = [f"{server.url}/{n}.tar?key=1" for n in range(4)]
    options = {"batch_size": 5, "cache_dir": tmp_path / "cache", "shuffle": False}
    stream = PairStream(urls, load, collate, **options)
    assert (stream.samples, server.asked) == (20, [])
    again = PairStream(urls, load, collate, **options)
    assert again.identity == stream.identity
    assert keys_of(stream) == sorted(list("01234") * 4)
    assert stream.faults == {}
    # The shards were seen now: their indices are as good as those of a scan.
    assert len(list((tmp_path / "cache").glob("*.tar.idx"))) == 4
    assert not list((tmp_path / "cache").glob("*.far.idx"))


def test_a_stale_index_beside_a_shard_is_never_read_by(server, shard, tmp_path, make_picture):
    with ShardWriter(tmp_path / "other") as writer:
        for n in range(5):
            writer.write(Sample(f"{9 - n}", make_picture(n), "jpg", ["a text"]))
    other = (tmp_path / "other/00000.tar").read_bytes()
    assert len(other) == len(shard)
    server.index = index_of(tmp_path / "kept", other)
    urls = [f"{server.url}/{n}.tar" for n in range(2)]
    options = {"batch_size": 5, "cache_dir": tmp_path / "cache", "shuffle": False}
    stream = PairStream(urls, load, collate, max_faults=0.99, **options)
    assert stream.samples == 10
    ShardCache(tmp_path / "cache").local(urls[1])  # by something that knows no index
    assert [next(stream.iterate(step, step + 1))["keys"] for step in (0, 1)] == [[], []]
    assert stream.faults == {"unreadable_shard": 10}
    assert keys_of(PairStream(urls, load, collate, **options)) == sorted(list("01234") * 2)


@pytest.mark.parametrize("trouble", ["longer", "damaged", "web page"])
def test_what_cannot_be_the_index_of_a_shard_is_not_taken(server, shard, tmp_path, trouble):
    longer = shard[: shard.rstrip(b"\0").__len__() + 512 + 20_480]  # the same samples, another size
    index = index_of(tmp_path / "kept", longer + b"\0" * 10_240 if trouble == "longer" else shard)
    server.index = {"longer": index, "damaged": index[:-1], "web page": b"<html>not found</html>"}[trouble]
    stream = PairStream([f"{server.url}/0.tar"], load, collate, batch_size=5, cache_dir=tmp_path / "cache")
    assert server.paths == ["/0.tar"]  # fetched, and scanned
    assert keys_of(stream) == list("01234")


def test_a_shard_that_cannot_be_had_at_the_start_counts_against_the_budget(server, tmp_path):
    urls = [f"{server.url}/{n}.tar" for n in range(3)]
    ShardCache(tmp_path).local(urls[0])
    ShardCache(tmp_path).local(urls[1])
    server.script = [404, 404]
    options = {"batch_size": 5, "cache_dir": tmp_path}
    with pytest.raises(ValueError, match=r"5 of 15 samples cannot be used[^$]*2.tar cannot be fetched"):
        PairStream(urls, load, collate, **options)
    stream = PairStream(urls, load, collate, max_faults=0.4, **options)
    assert (stream.samples, stream.faults) == (10, {"unreadable_shard": 5})


def test_shards_of_later_batches_are_fetched_before_their_turn(server, tmp_path):
    urls = [f"{server.url}/{n}.tar" for n in range(6)]
    stream = PairStream(urls, load, collate, batch_size=5, cache_dir=tmp_path, shuffle=False)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    server.asked.clear()
    batches = stream.iterate(0, 6)
    next(batches)
    for _ in range(500):  # the next shard comes while nobody asks for its batch
        if "/1.tar" in server.paths:
            break
        time.sleep(0.02)
    assert "/1.tar" in server.paths
    assert stream.shards_of(1) == [1]
    assert [batch.keys for batch in batches] == [list("01234")] * 5
    assert server.paths == [f"/{n}.tar" for n in range(6)]  # each once


def test_workers_share_what_is_fetched_ahead_and_failures_are_left_to_the_reader():
    fetched = []

    def fetch(shard: int) -> None:
        fetched.append(shard)
        raise FileNotFoundError(shard)

    with Ahead(fetch, 1, 2) as ahead:
        ahead.ask(range(6))
        ahead.ask(range(3, 8))
        ahead.pool.shutdown(wait=True)
    assert sorted(fetched) == [1, 3, 5, 7]


def test_local_paths_stay_and_the_cache_follows_xdg(monkeypatch, tmp_path):
    assert local_shard("a/b.tar") == Path("a/b.tar")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pairstream/shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/pairstream/shards"
