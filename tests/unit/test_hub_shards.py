"""Shards on a Hugging Face hub: hf:// as huggingface_hub really speaks it, to a stand-in on this machine."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

import data.fetch as module
from data.fetch import ShardCache
from data.shards import Sample, ShardWriter, expand_shards
from data.stream import PairStream

SET = "hf://datasets/team/pairs"


class Hub:
    """One public data set: what it is, what lies in it, and the files themselves, whole or by range."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.refused: set[str] = set()  # files that answer 403, as those of a set with terms to agree to
        self.sent: list[tuple[str, int]] = []  # what of the files went out: path, bytes
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
                if path == "/api/datasets/team/pairs" or path.startswith(
                    "/api/datasets/team/pairs/revision/"
                ):
                    self.answer(json.dumps({"id": "team/pairs", "sha": "0" * 40}).encode())
                elif match := re.fullmatch(r"/api/datasets/team/pairs/tree/main/?(.*)", path):
                    found = outer.tree(match[1], "recursive=true" in query)
                    missing = {} if found else {"X-Error-Code": "EntryNotFound"}
                    self.answer(json.dumps(found).encode(), 200 if found else 404, missing)
                elif match := re.fullmatch(r"/datasets/team/pairs/resolve/main/(.*)", path):
                    self.file(match[1])
                else:
                    self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})

            def file(self, name: str):
                if name in outer.refused:
                    self.answer(b"", 403)
                elif name not in outer.files:
                    self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
                else:
                    whole = outer.files[name]
                    match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                    part = whole[int(match[1]) : int(match[2]) + 1] if match else whole
                    outer.sent.append((name, len(part)))
                    self.answer(part, 206 if match else 200)

            def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def tree(self, folder: str, recursive: bool) -> list[dict[str, object]]:
        inside = f"{folder}/" if folder else ""
        found: list[dict[str, object]] = []
        for path, content in sorted(self.files.items()):
            below = path.removeprefix(inside)
            if path.startswith(inside) and (recursive or "/" not in below):
                oid = hashlib.sha1(content).hexdigest()
                found.append({"type": "file", "path": path, "size": len(content), "oid": oid})
            elif path.startswith(inside):
                found.append(
                    {"type": "directory", "path": inside + below.split("/")[0], "size": 0, "oid": ""}
                )
        return [row for n, row in enumerate(found) if row not in found[:n]]

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path, make_picture, monkeypatch) -> Iterator[Hub]:
    """Three shards of five samples in the folder `train`."""
    from huggingface_hub import HfFileSystem, close_session, constants

    with ShardWriter(tmp_path / "set", samples_per_shard=5) as writer:
        for number in range(15):
            writer.write(Sample(f"{number:02d}", make_picture(number), "jpg", ["a text"]))
    shards = {f"train/{path.name}": path.read_bytes() for path in sorted((tmp_path / "set").glob("*.tar"))}
    hub = Hub({"README.md": b"a card", **shards})
    # What HF_ENDPOINT and HF_HUB_OFFLINE set when huggingface_hub is imported, which another test may have done.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    HfFileSystem.clear_instance_cache()
    yield hub
    HfFileSystem.clear_instance_cache()
    close_session()
    hub.close()


def load(sample, rng):
    return sample.key


def collate(rows):
    return {"keys": rows}


@pytest.mark.parametrize(
    ("names", "workers"),
    [(f"{SET}/train/*.tar", 2), (f"{SET}/train/{{00000..00002}}.tar", 0), (f"{SET}/**/*.tar", 0)],
)
def test_a_set_on_the_hub(hub, tmp_path, monkeypatch, names, workers):
    monkeypatch.setattr(module, "PART", 3000)
    stream = PairStream(names, load, collate, batch_size=4, cache_dir=tmp_path / "cache", workers=workers)
    assert [index.name for index in stream.indices] == [f"{SET}/train/0000{n}.tar" for n in range(3)]
    keys = sorted(key for batch in stream.epoch() for key in batch["keys"])
    assert keys == [f"{number:02d}" for number in range(15)]
    assert stream.faults == {}
    for path, content in hub.files.items():
        parts = [size for name, size in hub.sent if name == path]
        assert sum(parts) == (len(content) if path.endswith(".tar") else 0)  # no byte twice
    assert {index.tag for index in stream.indices} == {
        hashlib.sha1(hub.files[f"train/0000{n}.tar"]).hexdigest() for n in range(3)
    }


def test_a_glob_that_matches_nothing_on_the_hub(hub):
    with pytest.raises(ValueError, match=rf"no shards found: {SET}/train/b\*.tar matches no .tar file"):
        expand_shards(f"{SET}/train/b*.tar")
    with pytest.raises(ValueError, match=rf"shards {SET}/test/\*.tar cannot be listed: .*Check the address"):
        expand_shards(f"{SET}/test/*.tar")


def test_a_set_that_is_not_on_the_hub(hub, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"shard hf://datasets/team/none/0.tar cannot be fetched \(1 attempts\)"
    ):
        ShardCache(tmp_path).local("hf://datasets/team/none/0.tar")
    with pytest.raises(
        ValueError, match=r"shards hf://datasets/team/none/\*.tar cannot be listed: .*team/none"
    ):
        expand_shards("hf://datasets/team/none/*.tar")
    with pytest.raises(FileNotFoundError, match=r"00009.tar cannot be fetched \(1 attempts\)"):
        ShardCache(tmp_path).local(f"{SET}/train/00009.tar")


def test_what_the_hub_refuses_is_not_asked_for_again(hub, tmp_path):
    hub.refused = {"train/00001.tar"}
    with pytest.raises(FileNotFoundError, match=r"00001.tar cannot be fetched \(1 attempts\): .*403"):
        ShardCache(tmp_path).local(f"{SET}/train/00001.tar")


def test_the_hub_is_not_waited_for_offline(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"\(1 attempts\): OfflineModeIsEnabled: .*HF_HUB_OFFLINE"):
        ShardCache(tmp_path).local(f"{SET}/train/00001.tar")
