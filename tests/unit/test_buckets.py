"""Shards in buckets: s3:// and gs:// as s3fs and gcsfs really speak them, to servers on this machine."""

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from data import fetch
from data.fetch import ShardCache
from data.index import index_shard
from data.shards import Sample, ShardWriter, expand_shards
from data.stream import PairStream


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


class Cut:
    """A proxy before a server: once, it hangs up in the middle of what answers a ranged GET."""

    def __init__(self, port: int, at: int):
        self.port, self.at, self.ranges = port, at, []
        self.cuts = 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.serving: list[threading.Thread] = []
        self.accepting = threading.Thread(target=self.accept, daemon=True)
        self.accepting.start()

    def accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                asker, _ = self.listening.accept()
                self.serving.append(threading.Thread(target=self.serve, args=(asker,), daemon=True))
                self.serving[-1].start()

    def serve(self, asker: socket.socket) -> None:
        state = {"cut": False}
        with asker, socket.create_connection(("127.0.0.1", self.port)) as server:
            back = threading.Thread(target=self.back, args=(asker, server, state), daemon=True)
            back.start()
            self.forward(asker, server, state)
            back.join()

    def close(self) -> None:
        with suppress(OSError):  # or an `accept` that waits would go on
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for thread in (self.accepting, *self.serving):
            thread.join(10)

    def forward(self, asker: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        with suppress(OSError):
            while chunk := asker.recv(65536):
                if found := re.search(rb"^range: *bytes=(\d+)-(\d+)", chunk, re.IGNORECASE | re.MULTILINE):
                    self.ranges.append((int(found[1]), int(found[2])))
                    state["cut"] = len(self.ranges) == self.at
                server.sendall(chunk)
            server.shutdown(socket.SHUT_WR)

    def back(self, asker: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        with suppress(OSError):
            while chunk := server.recv(65536):
                if state["cut"]:
                    while b"\r\n\r\n" not in chunk:
                        chunk += server.recv(65536)
                    chunk = chunk[: chunk.index(b"\r\n\r\n") + 14]  # ten bytes of what was asked for
                asker.sendall(chunk)
                if state["cut"]:
                    self.cuts += 1
                    for side in (asker, server):
                        side.shutdown(socket.SHUT_RDWR)
            asker.shutdown(socket.SHUT_WR)


@pytest.fixture
def s3(monkeypatch) -> Iterator[str]:
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield "s3"
    server.stop()


@pytest.fixture
def gs(monkeypatch) -> Iterator[str]:
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield "gs"
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def bucket(request, tmp_path, make_picture) -> str:
    """The URL of a bucket with three shards of five samples, one of them with its index."""
    scheme = request.getfixturevalue(request.param)
    with ShardWriter(tmp_path / "set", samples_per_shard=5) as writer:
        for number in range(15):
            writer.write(Sample(f"{number:02d}", make_picture(number), "jpg", ["a text"]))
    first = tmp_path / "set/00000.tar"
    os.utime(first, (1, 1))
    index_shard(first)
    fsspec.get_filesystem_class(scheme).clear_instance_cache()  # they know the server of another test
    system = fsspec.filesystem(scheme)
    name = f"pairs-{os.urandom(4).hex()}"
    system.mkdir(name)
    for path in sorted((tmp_path / "set").glob("*.tar*")):
        system.pipe_file(f"{name}/cc3m/{path.name}", path.read_bytes())
    return f"{scheme}://{name}/cc3m"


def load(sample, rng):
    return sample.key


def collate(rows):
    return {"keys": rows}


def test_a_set_in_a_bucket(bucket, tmp_path):
    options = {"batch_size": 4, "cache_dir": tmp_path / "cache", "workers": 2}
    stream = PairStream(f"{bucket}/{{00000..00002}}.tar", load, collate, **options)
    assert stream.samples == 15
    # Of the shard with its index beside it nothing was fetched yet: a worker will do that, after a fork.
    held = sorted(path.name.split("-", 1)[1] for path in (tmp_path / "cache").glob("*.tar"))
    assert held == ["00001.tar", "00002.tar"]
    expected = [f"{number:02d}" for number in range(15)]
    assert sorted(key for batch in stream.epoch() for key in batch["keys"]) == expected
    assert stream.faults == {}
    # What came is what lies there, byte for byte.
    path = ShardCache(Path(tmp_path / "cache")).path(f"{bucket}/00001.tar")
    assert path.read_bytes() == (tmp_path / "set/00001.tar").read_bytes()


def test_a_shard_that_is_not_in_the_bucket(bucket, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"shard {bucket}/00009.tar cannot be fetched \(1 attempts\)"
    ):
        ShardCache(tmp_path / "cache").local(f"{bucket}/00009.tar")


def test_a_glob_names_what_lies_in_the_bucket(bucket, tmp_path):
    assert expand_shards(f"{bucket}/*.tar") == [f"{bucket}/{number:05d}.tar" for number in range(3)]
    assert expand_shards(f"{bucket}/*2.tar") == [f"{bucket}/00002.tar"]
    with pytest.raises((ValueError, FileNotFoundError), match="absent"):
        expand_shards(f"{bucket}/absent*.tar")


def test_a_connection_that_is_cut_costs_one_range(bucket, tmp_path, monkeypatch):
    scheme = bucket.partition("://")[0]
    endpoint = "AWS_ENDPOINT_URL" if scheme == "s3" else "STORAGE_EMULATOR_HOST"
    proxy = Cut(int(os.environ[endpoint].rpartition(":")[2]), at=3)
    monkeypatch.setenv(endpoint, proxy.url)
    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    monkeypatch.setattr(fetch, "PART", 4096)
    whole = (tmp_path / "set/00002.tar").read_bytes()
    cache = ShardCache(tmp_path / "cache", backoff=0)
    assert cache.local(f"{bucket}/00002.tar")[0].read_bytes() == whole
    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    proxy.close()
    assert proxy.cuts == 1
    starts = [first for first, _ in proxy.ranges]
    again = [first for first in sorted(set(starts)) if starts.count(first) > 1]
    assert again == [2 * 4096]  # the range that broke, and none before it
    assert sorted(set(starts)) == list(range(0, len(whole), 4096))
