"""`pairstream data download` against a server on this machine that does all that servers do."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip(
    "img2dataset", reason="the extra `download` is not installed (img2dataset stops below Python 3.13)"
)

import pyarrow as pa
import pyarrow.parquet as pq

from data.check import check_shards
from data.download import command
from data.download.command import download
from data.download.worker import WORK
from data.samples import index_shards, read_sample
from data.tar import ShardReader


class Web(ThreadingHTTPServer):
    """Pictures, and all kinds of trouble, by the name in the path; counts who was asked for what."""

    daemon_threads = True

    def __init__(self, picture: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.picture = picture
        self.asked: Counter[str] = Counter()
        self.times: list[float] = []
        self.robots = "User-agent: *\nDisallow: /private/\n"
        self.robots_code = 200
        self.healed = False
        self.gate = threading.Event()
        self.gate.set()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of it


class Handler(BaseHTTPRequestHandler):
    server: Web

    def log_message(self, *words: Any) -> None:
        pass

    def answer(
        self,
        body: bytes,
        kind: str = "image/jpeg",
        code: int = 200,
        length: int | None = None,
        **headers: str,
    ):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        web, path = self.server, self.path
        web.asked[path] += 1
        web.times.append(time.monotonic())
        picture = web.picture
        if path == "/robots.txt":
            self.answer(web.robots.encode(), "text/plain", web.robots_code)
            return
        web.gate.wait(20)
        name = path.rsplit("/", 1)[-1].split(".")[0]
        if name == "gone":
            self.answer(b"no", "text/html", 404)
        elif name == "flaky" and not web.healed:
            self.answer(b"later", "text/plain", 503)
        elif name == "reset":
            self.connection.close()
        elif name == "slow":
            self.send_response(200)
            self.send_header("Content-Length", str(len(picture)))
            self.end_headers()
            for place in range(0, len(picture), 20):
                self.wfile.write(picture[place : place + 20])
                time.sleep(0.2)
        elif name == "page":
            self.answer(b"<html><body>sold this domain</body></html>", "text/html")
        elif name == "lies":
            self.answer(b"<!doctype html><html>not a picture</html>", "image/jpeg")
        elif name == "huge":
            self.answer(picture + bytes(300_000))
        elif name == "broken":
            self.answer(picture[: len(picture) // 2], length=len(picture))
        elif name == "cut":
            self.answer(picture[: len(picture) // 2])
        elif name == "noai":
            self.answer(picture, X_Robots_Tag="noai")
        elif name == "otherbot":
            self.answer(picture, X_Robots_Tag="otherbot: noai")
        elif name == "moved":
            self.send_response(302)
            self.send_header("Location", "/private/behind.jpg")
            self.end_headers()
        else:
            self.answer(picture, "application/octet-stream" if name == "plain" else "image/jpeg")


@pytest.fixture
def web(make_picture):
    server = Web(make_picture(1, (320, 400)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Work on the parts in this process, one after the other; the list gets the number of each."""
    seen: list[int] = []

    def work(name: str, downloader: Any, jobs: Any, processes: int, cluster: str | None) -> None:
        for job in jobs:
            seen.append(job[0])
            downloader(job)

    monkeypatch.setattr(command, "distribute", work)
    return seen


def write_list(path: Path, web: Web, names: list[str], **columns: list[Any]) -> Path:
    rows = {
        "url": [web.url(name) for name in names],
        "caption": [f"a picture {name}" for name in names],
        **columns,
    }
    if path.suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(rows)
            writer.writerows(zip(*rows.values(), strict=True))
    return path


def fetch(source: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    options = {
        "samples_per_shard": 10,
        "threads": 4,
        "timeout": 3.0,
        "host_rate": 0.0,
        "quiet": True,
        **options,
    }
    assert download(str(source), out=out, **options) == 0
    return json.loads((out / "download.json").read_text())


def records(out: Path) -> list[dict[str, Any]]:
    found = []
    with ShardReader() as reader:
        for index in index_shards(out):
            found += [read_sample(index, number, 0, reader) for number in range(len(index))]
    rows = [{**raw.record, "image": raw.image, "text": raw.text} for raw in found]
    return sorted(rows, key=lambda row: row["source_row"])  # in a shard they lie as they came


TROUBLE = {
    "gone.jpg": "http_404",
    "reset.jpg": "connection_reset",
    "slow.jpg": "timeout",
    "page.jpg": "not_an_image",
    "lies.jpg": "not_an_image",
    "huge.jpg": "too_large_file",
    "broken.jpg": "truncated_body",
    "cut.jpg": "truncated_image",
    "noai.jpg": "opt_out_header",
    "private/own.jpg": "opt_out_robots",
    "moved.jpg": "opt_out_robots",
    "flaky.jpg": "http_503",
}


def test_every_failure_has_its_cause_and_the_shards_are_sound(web: Web, here, tmp_path: Path) -> None:
    good = ["1.jpg", "plain.jpg", "otherbot.jpg", "with space ü.jpg"]
    names = [*good, *TROUBLE]
    listed = write_list(tmp_path / "list.parquet", web, names, similarity=[0.25] * 15 + [float("nan")])
    summary = fetch(listed, tmp_path / "out", max_bytes=200_000)
    failed = pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    assert {row["url"].split("/", 3)[-1]: row["cause"] for row in failed} == TROUBLE
    assert summary["failed"] == dict(Counter(TROUBLE.values()).most_common())
    assert (summary["rows"], summary["samples"]) == (16, 4)
    findings = check_shards(tmp_path / "out")
    assert findings["manifest"]
    assert findings["faults"] == {}
    assert findings["samples"] == 4
    first = records(tmp_path / "out")[0]
    assert first["caption"] == first["text"] == "a picture 1.jpg"
    assert (first["similarity"], first["source_row"], first["url"]) == (0.25, 0, web.url("1.jpg"))
    assert (first["width"], first["height"]) == (256, 320), "the shorter side is 256"
    assert {row["similarity"] for row in pq.read_table(tmp_path / "out" / "00001.parquet").to_pylist()} == {
        0.25,
        None,
    }
    report = (tmp_path / "out" / "opt_out.csv").read_text().splitlines()
    assert report[0] == "url,host,by,detail"
    assert len(report) == 4
    assert any(line.endswith(",header,X-Robots-Tag: noai") for line in report)
    assert summary["opted_out_hosts"] == {f"127.0.0.1:{web.server_address[1]}": 3}
    assert web.asked["/private/own.jpg"] == web.asked["/private/behind.jpg"] == 0, "robots.txt forbids it"


def test_opt_outs_are_obeyed_only_as_long_as_one_wants(web: Web, here, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.csv", web, ["noai.jpg", "private/own.jpg"])
    summary = fetch(listed, tmp_path / "out", respect_opt_out=False, robots=False)
    assert summary["samples"] == 2
    assert summary["opt_out"] == []
    assert web.asked["/robots.txt"] == 0


def test_only_failed_pictures_are_tried_again(web: Web, here, tmp_path: Path, capsys) -> None:
    names = ["1.jpg", "flaky.jpg", "gone.jpg", "noai.jpg", "2.jpg", "flaky.jpg?b"]
    listed = write_list(tmp_path / "list.csv", web, names, similarity=["0.5"] * 6)
    out = tmp_path / "out"
    assert fetch(listed, out, samples_per_shard=3)["samples"] == 2
    web.healed = True
    before = Counter(web.asked)
    summary = fetch(listed, out, samples_per_shard=3, retry_failed=True)
    asked = web.asked - before
    assert asked == {"/flaky.jpg": 1, "/flaky.jpg?b": 1, "/gone.jpg": 1}, "opt-outs stay out"
    assert (summary["rows"], summary["samples"], summary["attempts"]) == (6, 4, 2)
    assert summary["failed"] == {"http_404": 1, "opt_out_header": 1}
    assert check_shards(out)["faults"] == {}
    rows = {row["source_row"]: row["similarity"] for row in records(out)}
    assert rows == {0: 0.5, 4: 0.5, 1: 0.5, 5: 0.5}
    before = Counter(web.asked)
    fetch(listed, out, samples_per_shard=3, retry_failed=True, retry_causes=("timeout",), quiet=False)
    assert web.asked == before, "nothing failed so"
    assert "no picture failed for timeout: nothing is tried again" in capsys.readouterr().err
    summary = fetch(listed, out, samples_per_shard=3, retry_failed=True, retry_causes=("http_404",))
    assert summary["failed"] == {"http_404": 1, "opt_out_header": 1}
    assert summary["rows"] == 6


def test_a_killed_part_asks_for_nothing_twice(web: Web, here, tmp_path: Path, monkeypatch) -> None:
    """The part is stopped between two pictures; what had come, failures too, is kept."""
    from data.download import worker

    names = [f"{number}.jpg" for number in range(12)] + ["gone.jpg"]
    listed = write_list(tmp_path / "list.tsv", web, names)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:

        class Killed(BaseException):
            pass

        def finish(*_: Any) -> None:
            raise Killed

        patch.setattr(worker.PartDownloader, "finish", finish)
        with pytest.raises(Killed):
            fetch(listed, out, samples_per_shard=13)
    assert not list(out.glob("*.tar")), "an unfinished shard is not in the folder"
    journal = out / WORK / "journal" / "00000"
    journal.write_bytes(journal.read_bytes()[:-10])  # the last answer was being written
    before = Counter(web.asked)
    assert before.total() == 14
    summary = fetch(listed, out, samples_per_shard=13)
    assert summary["samples"] == 12
    assert summary["failed"] == {"http_404": 1}
    again = web.asked - before - Counter(["/robots.txt"])
    assert again.total() == 1, "only the one whose answer was cut"
    assert check_shards(out)["faults"] == {}
    assert sorted(path.name for path in (out / WORK).iterdir()) == ["done", "plan.json"]


def test_a_finished_download_asks_for_nothing(web: Web, here, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.csv", web, ["1.jpg", "2.jpg"])
    first = fetch(listed, tmp_path / "out")
    before = Counter(web.asked)
    assert fetch(listed, tmp_path / "out") == first
    assert web.asked == before
    assert here == [0]


def test_one_host_is_asked_so_many_times_a_second(web: Web, here, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.csv", web, [f"{number}.jpg" for number in range(8)])
    fetch(listed, tmp_path / "out", host_rate=20.0)
    gaps = np.diff(sorted(web.times))
    assert len(gaps) == 8, "robots.txt counts too"
    assert sum(gaps) >= 8 / 20 * 0.95


def test_crawl_delay_counts_where_it_is_longer(web: Web, here, tmp_path: Path) -> None:
    web.robots = "User-agent: *\nCrawl-delay: 1\n"
    fetch(write_list(tmp_path / "list.csv", web, ["1.jpg", "2.jpg"]), tmp_path / "out", host_rate=50.0)
    asked = sorted(web.times)[1:]
    assert asked[1] - asked[0] >= 0.95


def test_two_hosts_share_a_limit_over_openers(tmp_path: Path) -> None:
    from data.download.polite import HostLimit

    one, other = HostLimit(tmp_path / "hosts", 10.0), HostLimit(tmp_path / "hosts", 10.0)
    began = time.monotonic()
    for limit in (one, other, one, other):
        limit.wait("a.example")
    limit.wait("b.example")
    assert time.monotonic() - began >= 0.28, "the fourth slot begins after three tenths of a second"


@pytest.mark.parametrize(
    ("code", "cause"),
    [(200, "opt_out_robots"), (401, "opt_out_robots"), (404, None), (500, "robots_unreachable")],
)
def test_what_robots_txt_answers(web: Web, tmp_path: Path, code: int, cause: str | None) -> None:
    from data.download.polite import HostLimit, Refused, Robots

    web.robots_code = code
    web.robots = "User-agent: *\nAllow: /\n\nUser-agent: pairstream\nDisallow: /\n"
    rules = Robots(HostLimit(tmp_path / "hosts", 0.0), 5.0)
    if cause is None:
        assert rules.delay(web.url("a.jpg")) == 0
    else:
        with pytest.raises(Refused, match=f"^{cause}: "):
            rules.delay(web.url("a.jpg"))
    with contextlib.suppress(Refused):
        rules.delay(web.url("b.jpg"))
    assert web.asked["/robots.txt"] == 1
    with pytest.raises(Refused, match=r"robots_unreachable: http://127\.0\.0\.1:9/robots\.txt"):
        rules.delay("http://127.0.0.1:9/a.jpg")


@pytest.mark.parametrize(
    ("format", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]
)
def test_a_file_that_ends_early_is_seen(make_picture, format: str, options: dict) -> None:
    from data.download.polite import is_cut

    image = Image.open(io.BytesIO(make_picture(3, (200, 100))))
    thumbnail = io.BytesIO()
    image.resize((20, 10)).save(thumbnail, "JPEG")
    exif = b"Exif\0\0" + thumbnail.getvalue()  # with an end mark of its own
    file = io.BytesIO()
    image.save(file, format, **options, **({"exif": exif} if format == "JPEG" else {}))
    whole = file.getvalue()
    assert not is_cut(whole)
    assert not is_cut(whole + b"\n\n"), "a little more does no harm"
    assert all(is_cut(whole[:-cut]) for cut in (10, len(whole) // 4))


def test_sideways_and_16_bit_pictures_are_set_right(web: Web, here, tmp_path: Path) -> None:
    file = io.BytesIO()
    image = Image.fromarray(np.tile(np.arange(300, dtype=np.uint8)[:, None, None] // 2, (1, 400, 3)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, "JPEG", exif=exif)
    web.picture = file.getvalue()
    fetch(write_list(tmp_path / "a.csv", web, ["1.jpg"]), tmp_path / "a")
    (record,) = records(tmp_path / "a")
    assert (record["width"], record["height"]) == (256, 341), "upright: 300 x 400, shorter side 256"
    file = io.BytesIO()
    Image.fromarray(np.full((60, 60), 30_000, np.uint16)).save(file, "PNG")
    web.picture = file.getvalue()
    fetch(write_list(tmp_path / "b.csv", web, ["1.png"]), tmp_path / "b")
    (record,) = records(tmp_path / "b")
    pixels = np.asarray(Image.open(io.BytesIO(record["image"])).convert("L"), dtype=float)
    assert abs(pixels.mean() - 30_000 / 257) < 2
    assert (record["width"], record["height"]) == (60, 60)


def test_rows_that_cannot_be_asked_for_are_counted(web: Web, here, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    rows = [{"url": web.url("1.jpg"), "caption": "one"}, {"url": "ftp://a/b.jpg", "caption": "two"},
            {"url": web.url("3.jpg"), "caption": " "}]  # fmt: skip
    path.write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    summary = fetch(path, tmp_path / "out")
    assert summary["failed"] == {"bad_url": 1, "missing_caption": 1, "bad_row": 1}
    assert summary["samples"] == 1
    assert web.asked["/3.jpg"] == 0


def test_a_quote_left_open_costs_its_own_rows_only(tmp_path: Path) -> None:
    from data.download.tables import Columns, count_rows, read_parts

    path = tmp_path / "list.csv"
    path.write_text('url,caption\nhttp://a/1,"open\n' + "http://a/2,x\n" * 12_000 + "http://a/3,last\n")
    columns = Columns("url", "caption", {})
    (table,) = read_parts([path], columns, 10_000, count_rows([path], columns))
    rows = table.to_pylist()
    assert (rows[0]["url"], rows[-1]["url"], rows[-1]["caption"]) == (None, "http://a/3", "last")
    assert [row["source_row"] for row in rows] == list(range(len(rows)))


def test_a_part_without_a_picture_leaves_no_shard(web: Web, here, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.csv", web, ["gone.jpg", "1.jpg"])
    summary = fetch(listed, tmp_path / "out", samples_per_shard=1)
    assert summary["shards"] == 1
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00001.tar"]


def test_published_layouts(web: Web, here, tmp_path: Path) -> None:
    url = web.url
    (tmp_path / "cc3m.tsv").write_text(f'a "quoted\t{url("1.jpg")}\nsecond\t{url("2.jpg")}\n')
    (tmp_path / "cc12m.tsv").write_text(f"{url('1.jpg')}\tfirst\n")
    laion = {"SAMPLE_ID": [7], "URL": [url("1.jpg")], "TEXT": ["one"], "WIDTH": [10], "HEIGHT": [10],
             "similarity": [0.3], "punsafe": [0.1], "pwatermark": [0.2], "NSFW": ["UNLIKELY"]}  # fmt: skip
    pq.write_table(pa.table(laion), tmp_path / "laion.parquet")
    import hashlib

    digests = [hashlib.sha256(web.picture).hexdigest(), "0" * 64]
    boxes = [[[0.1, 0.1, 0.5, 0.5]], []]
    datacomp = {"uid": ["a", "b"], "url": [url("1.jpg"), url("2.jpg")], "text": ["one", "two"], "sha256": digests,
                "original_width": [320, 320],
                "face_bboxes": boxes, "clip_l14_similarity_score": [0.2, 0.3]}  # fmt: skip
    pq.write_table(pa.table(datacomp), tmp_path / "datacomp.parquet")
    (tmp_path / "sbu.json").write_text(
        json.dumps({"image_urls": [url("1.jpg")], "captions": ["one"], "user_ids": ["u"]})
    )
    (tmp_path / "red").mkdir()
    for name in ("a_2020.json", "b_2020.json"):
        row = {"image_url": url(f"{name}.jpg"), "caption": "one", "raw_caption": "One", "subreddit": name}
        (tmp_path / "red" / name).write_text(json.dumps({"info": {}, "annotations": [row]}))
    held = {
        name: (fetch(name, tmp_path / name, table=(str(tmp_path / table),)), records(tmp_path / name))
        for name, table in {
            "cc3m": "cc3m.tsv", "cc12m": "cc12m.tsv", "laion2b": "laion.parquet", "datacomp": "datacomp.parquet",
            "sbu": "sbu.json", "redcaps": "red",
        }.items()
    }  # fmt: skip
    assert [row["caption"] for row in held["cc3m"][1]] == ['a "quoted', "second"]
    assert [row["caption"] for row in held["cc12m"][1]] == ["first"]
    (row,) = held["laion2b"][1]
    assert (row["similarity"], row["punsafe"], row["pwatermark"], row["NSFW"]) == (0.3, 0.1, 0.2, "UNLIKELY")
    (row,) = held["datacomp"][1]
    assert row["uid"] == "a"
    assert row["source_sha256"] == row["sha256"] == digests[0]
    assert row["source_original_width"] == 320
    assert held["datacomp"][0]["failed"] == {"hash_mismatch": 1}
    assert [row["user_ids"] for row in held["sbu"][1]] == ["u"]
    assert [row["subreddit"] for row in held["redcaps"][1]] == ["a_2020.json", "b_2020.json"]
    # Without the preset: the layout of two columns without names is seen, and the usual names are found.
    assert fetch(tmp_path / "cc3m.tsv", tmp_path / "own")["samples"] == 2
    assert fetch(tmp_path / "laion.parquet", tmp_path / "own2", keep_columns=("punsafe",))["samples"] == 1
    assert "pwatermark" not in records(tmp_path / "own2")[0]


def test_what_is_asked_wrongly(web: Web, here, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.csv", web, ["1.jpg"])
    out = tmp_path / "out"
    for options, says in [
        ({"threads": 0}, r"--threads must be above 0, got 0"),
        ({"limit": 0}, r"--limit must be at least 1 row"),
        ({"host_rate": -1.0}, r"--host-rate is in requests a second"),
        ({"retry_causes": ("timeout",)}, r"add --retry-failed"),
        ({"url_column": "link"}, r"no column 'link': it has url, caption"),
        ({"verify_hash": "yes"}, r"--verify-hash yes needs a column sha256"),
        ({"table": ("x",)}, r"--table goes with a published list"),
    ]:
        with pytest.raises(ValueError, match=says):
            fetch(listed, out, **options)
    with pytest.raises(ValueError, match=r"cc3m needs --table: .*3.3 million rows.*https://ai.google.com"):
        fetch("cc3m", out)
    with pytest.raises(FileNotFoundError, match=r"no list of URLs at cc3n: .*did you mean 'cc3m'"):
        fetch("cc3n", out)
    (tmp_path / "list.xls").write_text("x")
    with pytest.raises(ValueError, match=r"list.xls: expected one of .parquet, .csv"):
        fetch(tmp_path / "list.xls", out)
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"which column holds the URLs\? It has a, b; name one with --url-column"
    ):
        fetch(tmp_path / "odd.csv", out)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"empty.csv is empty"):
        fetch(tmp_path / "empty.csv", out)
    (tmp_path / "heads.csv").write_text("url,caption\n")
    with pytest.raises(ValueError, match=r"heads.csv: no row in the list"):
        fetch(tmp_path / "heads.csv", out)
    (tmp_path / "cc12m.tsv").write_text(
        f"{web.url('1.jpg')}\tfirst\n\nbroken\n"
    )  # its columns the other way round
    with pytest.raises(
        ValueError, match=r"none of its first 2 rows has a URL in the column 'url' \(it holds 'first'"
    ):
        fetch("cc3m", out, table=(str(tmp_path / "cc12m.tsv"),))
    with pytest.raises(FileExistsError, match=r"--out .*list.csv is a file: expected a folder"):
        fetch(listed, listed)
    with pytest.raises(ValueError, match=r"--out .*list.csv/out: no file can be written in .*list.csv"):
        fetch(listed, listed / "out")
    assert not out.exists()
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(FileExistsError, match=r"holds holiday.jpg ... and no download"):
        fetch(listed, out)
    fetch(listed, tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds a download with samples_per_shard = 10, and now it is 7"):
        fetch(listed, tmp_path / "other", samples_per_shard=7)


def test_a_part_that_fails_is_named_and_the_rest_is_kept(web: Web, here, tmp_path: Path, monkeypatch) -> None:
    from data.download import worker

    real = worker.PartDownloader.finish

    def finish(self: Any, name: str, *rest: Any) -> None:
        if name == "00001":
            raise OSError(28, "No space left on device")
        real(self, name, *rest)

    listed = write_list(tmp_path / "list.csv", web, ["1.jpg", "2.jpg", "3.jpg"])
    with monkeypatch.context() as patch:
        patch.setattr(worker.PartDownloader, "finish", finish)
        with pytest.raises(ValueError, match=r"1 of 3 parts could not be finished.*No space left on device"):
            fetch(listed, tmp_path / "out", samples_per_shard=1)
    with pytest.raises(ValueError, match=r"is not finished \(2 of 3 parts\)"):
        fetch(listed, tmp_path / "out", samples_per_shard=1, retry_failed=True)
    assert fetch(listed, tmp_path / "out", samples_per_shard=1)["samples"] == 3
    assert web.asked["/2.jpg"] == 1, "its picture was in the journal"


def test_clusters_are_asked_for_rightly(monkeypatch) -> None:
    from data.download import distribute as module

    with pytest.raises(ValueError, match="--cluster is the address of a Ray or Spark cluster"):
        module.distribute("multiprocessing", None, [], 1, "auto")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(ImportError, match=r"--distributor ray needs .* pip install 'pairstream\[ray\]'"):
            module.distribute("ray", None, [], 1, None)
        patch.setitem(sys.modules, "pyspark.sql", None)
        with pytest.raises(
            ImportError, match=r"--distributor pyspark needs .* pip install 'pairstream\[spark\]'"
        ):
            module.distribute("pyspark", None, [], 1, None)

    @contextlib.contextmanager
    def broken(processes: int, cluster: str | None):
        raise RuntimeError("no route to the head node")
        yield

    monkeypatch.setattr(module, "ray_session", broken)
    with pytest.raises(
        ValueError, match=r"--distributor ray: no route to the head node\. Can every worker import"
    ):
        module.distribute("ray", None, [], 1, None)


def test_a_new_python_is_told_so(monkeypatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(
        command,
        "sys",
        type("Sys", (), {"version_info": type("V", (tuple,), {"major": 3, "minor": 13})((3, 13))}),
    )
    with pytest.raises(
        ImportError, match=r"img2dataset, which stops below Python 3.13 .*this is Python 3.13"
    ):
        command.require_img2dataset()


def run_command(source: Path, out: Path, *words: str) -> subprocess.Popen:
    line = [
        sys.executable,
        "-m",
        "pairstream",
        "data",
        "download",
        str(source),
        "--out",
        str(out),
        "--timeout",
        "10",
    ]
    environment = {**os.environ, "RAY_worker_niceness": "0"}  # Ray's own 15 starves on a machine that is busy
    return subprocess.Popen(
        [*line, "--host-rate", "0", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Its exit code and what it said; nothing of it is left behind."""
    try:
        _, said = process.communicate(timeout=500)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.dist
def test_killed_processes_and_a_resume_fetch_nothing_twice(web: Web, tmp_path: Path) -> None:
    """Real worker processes, killed in the middle of their parts by SIGKILL of the whole group."""
    listed = write_list(tmp_path / "list.csv", web, [f"{number}.jpg" for number in range(60)])
    words = ("--samples-per-shard", "30", "--processes", "2", "--threads", "2", "--host-rate", "10")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pairstream",
            "data",
            "download",
            str(listed),
            "--out",
            str(tmp_path / "out"),
            *words,
        ],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while web.asked.total() < 20 and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    before = web.asked.total()
    assert 20 <= before < 60
    code, said = finish(run_command(listed, tmp_path / "out", *words[:-2]))
    assert code == 0, said
    assert "60 of 60 pictures (100.0%) in 2 shards" in said
    twice = {path for path, count in web.asked.items() if count > 1 and path != "/robots.txt"}
    assert len(twice) <= 4, "but for the requests that were under way: two threads in two processes"
    assert check_shards(tmp_path / "out")["faults"] == {}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("distributor", ["ray", "pyspark"])
def test_clusters_on_this_machine(web: Web, tmp_path: Path, distributor: str) -> None:
    pytest.importorskip(distributor, reason=f"{distributor} is not installed")
    if distributor == "pyspark":
        import shutil

        if shutil.which("java") is None:
            pytest.skip("PySpark needs Java, and there is none on this machine")
    listed = write_list(tmp_path / "list.csv", web, [*(f"{number}.jpg" for number in range(30)), "gone.jpg"])
    words = ("--samples-per-shard", "10", "--processes", "2", "--threads", "2", "--distributor", distributor)
    code, said = finish(run_command(listed, tmp_path / "out", *words))
    assert code == 0, said
    assert "30 of 31 pictures (96.8%) in 3 shards" in said
    assert check_shards(tmp_path / "out")["faults"] == {}
    assert web.asked["/7.jpg"] == 1
