"""The adapter `csv`: columns, several captions, bad rows, and pictures by URL from a server on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.adapters.common import Skipped
from data.adapters.csv import samples
from data.adapters.web import fetch, map_threads
from data.faults import Fault
from data.prepare import prepare
from data.shards import Sample


def split_up(items) -> tuple[list[Sample], list[Skipped]]:
    rows = list(items)
    return [row for row in rows if isinstance(row, Sample)], [row for row in rows if isinstance(row, Skipped)]


@pytest.fixture
def folder(tmp_path: Path, make_picture) -> Path:
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate("abc"):
        (tmp_path / "pictures" / f"{name}.jpg").write_bytes(make_picture(number))
    return tmp_path


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_delimiters_and_usual_columns(folder: Path, delimiter: str) -> None:
    rows = [
        ("id", "FilePath", "title"),
        ("1", "pictures/a.jpg", '"a dog; a cat, and | a\ttab"'),
        ("2", "pictures/b.jpg", "b"),
    ]
    table = write(folder, "t.csv", "\ufeff" + "".join(delimiter.join(row) + "\r\n" for row in rows))
    found, faults = split_up(samples(table))
    assert [(sample.key, sample.captions) for sample in found] == [
        ("000000000", ["a dog; a cat, and | a\ttab"]),
        ("000000001", ["b"]),
    ]
    assert found[0].meta == {"name": "pictures/a.jpg"}
    assert faults == []


def test_rows_of_one_picture_become_one_sample(folder: Path) -> None:
    lines = [
        "image,caption,alt",
        *[f"pictures/{name}.jpg,{text},{text} alt" for name, text in ("ax", "by", "az", "ax")],
    ]
    table = write(folder, "t.csv", "\n".join(lines))
    found, _ = split_up(samples(table))
    assert [(sample.meta["name"], sample.captions) for sample in found] == [
        ("pictures/a.jpg", ["x", "z"]),
        ("pictures/b.jpg", ["y"]),
    ]
    found, _ = split_up(samples(table, caption_columns=["alt", "caption"]))
    assert found[0].captions == ["x alt", "x", "z alt", "z"]


def test_a_file_without_column_names(folder: Path) -> None:
    table = write(
        folder,
        "cc3m.tsv",
        "a very typical bus station\tpictures/a.jpg\nsierra looked stunning\tpictures/b.jpg\n",
    )
    found, _ = split_up(samples(table, image_column="2", caption_columns=("1",)))
    assert [sample.captions for sample in found] == [
        ["a very typical bus station"],
        ["sierra looked stunning"],
    ]


def test_jsonl_with_lists_of_captions_and_kept_columns(folder: Path) -> None:
    rows = [
        {"path": "pictures/a.jpg", "caption": ["one", " ", "two"], "label": "good", "similarity": "0.31"},
        {"path": "pictures/b.jpg", "caption": "three", "label": None},
        ["a", "list"],
        {"path": "pictures/c.jpg", "caption": 7},
        {"path": "pictures/c.jpg", "caption": "c", "similarity": "high"},
    ]
    table = write(folder, "t.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n{broken\n")
    found, faults = split_up(samples(table, keep_columns=["label", "similarity"]))
    assert found[0].captions == ["one", "two"]
    assert found[0].meta == {"name": "pictures/a.jpg", "label": "good", "similarity": 0.31}
    assert found[1].meta == {"name": "pictures/b.jpg"}
    assert [fault.where for fault in faults] == ["t.jsonl:3", "t.jsonl:4", "t.jsonl:5", "t.jsonl:6"]
    assert "expected a JSON object: ['a', 'list']" in faults[0].why
    assert "expected text in the column 'caption', got 7" in faults[1].why
    assert "expected a number in the column 'similarity', got 'high'" in faults[2].why


def test_keys_that_only_later_objects_have_and_numbers_that_json_cannot_hold(folder: Path) -> None:
    rows = [
        {"path": "pictures/a.jpg", "caption": "a", "similarity": float("nan")},
        {"path": "pictures/b.jpg", "caption": "b", "label": "good", "by": [1.0, float("inf")]},
        {"path": "pictures/c.jpg", "caption": float("nan")},
    ]
    table = write(folder, "t.JSONL", "\n".join(map(json.dumps, rows)) + "\n" + "[" * 100_000)
    found, faults = split_up(samples(table, keep_columns=["label", "similarity", "by"]))
    assert [sample.meta for sample in found] == [
        {"name": "pictures/a.jpg"},
        {"name": "pictures/b.jpg", "label": "good"},
    ]
    assert [fault.where for fault in faults] == ["t.JSONL:3", "t.JSONL:4"]


def test_a_tsv_whose_names_have_commas(folder: Path) -> None:
    table = write(folder, "t.tsv", "image\tcaption\tlabel, one, or, more\npictures/a.jpg\ta\tgood\n")
    assert split_up(samples(table))[0][0].captions == ["a"]


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".xlsx", ".csv.gz"])
def test_tables_of_another_format_are_told(folder: Path, suffix: str) -> None:
    last = suffix[suffix.rindex(".") :]
    with pytest.raises(
        ValueError, match=rf"expected a .csv, .tsv or .jsonl table, got \{last}: convert or unp"
    ):
        samples(write(folder, f"t{suffix}", "image,caption\npictures/a.jpg,a\n"))


def test_half_a_character_costs_its_caption_and_no_more(folder: Path) -> None:
    rows = [
        {"path": "pictures/a.jpg", "caption": "half \ud800 a character", "by": None},
        {"path": "pictures/b.jpg", "caption": "whole", "by": "\udfff"},
    ]
    table = write(folder, "t.jsonl", "\n".join(json.dumps(row) for row in rows))
    (sample,), (fault,) = split_up(samples(table, keep_columns=["by"]))
    assert (fault.cause, fault.where) == ("bad_text", "t.jsonl:1")
    assert json.loads(sample.members()["json"]) == {
        "caption": "whole", "captions": ["whole"], "name": "pictures/b.jpg", "by": "\udfff"
    }  # fmt: skip


def test_bad_rows_are_named_by_their_line(folder: Path) -> None:
    content = (
        "image,caption\n"
        'pictures/a.jpg,"over\ntwo lines"\n'
        "pictures/b.jpg\n"
        ",nothing\n"
        "\n"
        "pictures/gone.jpg,gone\n"
        "pictures/c.jpg,  \n"
        "pictures,a folder\n"
    )
    found, faults = split_up(samples(write(folder, "t.csv", content)))
    assert [sample.captions for sample in found] == [["over\ntwo lines"]]
    assert [(fault.cause, fault.where) for fault in faults] == [
        ("bad_row", "t.csv:4"),
        ("bad_row", "t.csv:5"),
        ("missing_image", "t.csv:7"),
        ("missing_caption", "t.csv:8"),
        ("missing_image", "t.csv:9"),
    ]
    assert faults[0].why == "expected 2 values, got 1"
    assert faults[1].why == "no picture in the column 'image'"


def test_paths_start_at_root(folder: Path) -> None:
    table = write(folder, "t.csv", f"image,caption\na.jpg,a\n{folder / 'pictures' / 'b.jpg'},b\n")
    found, faults = split_up(samples(table, folder / "pictures"))
    assert [sample.captions for sample in found] == [["a"], ["b"]]
    assert faults == []


def test_errors(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no table .*gone.csv: expected a .csv, .tsv or .jsonl file"):
        samples(folder / "gone.csv")
    with pytest.raises(ValueError, match=r"empty.csv is empty"):
        samples(write(folder, "empty.csv", "\n\n"))
    with pytest.raises(ValueError, match=r"expected one JSON object a line, found none"):
        samples(write(folder, "empty.jsonl", "[1]\n"))
    table = write(folder, "t.csv", "picture_file,caption,image_alt\npictures/a.jpg,a,b\n")
    with pytest.raises(
        ValueError, match=r"which column holds the pictures\? It has picture_file, .*--image-column"
    ):
        samples(table)
    with pytest.raises(ValueError, match=r"no column 'picture': it has .*did you mean 'picture_file'"):
        samples(table, image_column="picture")
    with pytest.raises(ValueError, match=r"no column 'labels'"):
        samples(table, image_column="picture_file", keep_columns=["labels"])
    with pytest.raises(ValueError, match=r"which column holds the captions\?.*--caption-columns"):
        samples(write(folder, "u.csv", "image,words\na.jpg,a\n"))
    (folder / "latin.csv").write_bytes(b"image,caption\npictures/a.jpg,caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin.csv, line 2: expected UTF-8 text, got byte 0xe9"):
        samples(folder / "latin.csv")
    open_quote = 'image,caption\npictures/a.jpg,a\npictures/b.jpg,"b\n' + "pictures/c.jpg,c\n" * 10_000
    with pytest.raises(ValueError, match=r"quote.csv, row from line 3 on: field larger.*left open"):
        samples(write(folder, "quote.csv", open_quote))


class Answers(BaseHTTPRequestHandler):
    """A web that misbehaves in the usual ways."""

    picture = b""

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name.startswith("gone"):
            self.send_error(404)
            return
        self.send_response(200)
        if name != "untyped":
            self.send_header("Content-Type", "text/html" if name == "page" else "image/jpeg; charset=x")
        self.end_headers()
        try:
            if name == "slow":
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            elif name == "endless":
                for _ in range(400):
                    self.wfile.write(bytes(1 << 16))
            else:
                self.wfile.write(self.picture)
        except OSError:
            pass  # the client has had enough

    def log_message(self, format: str, *args: object) -> None:
        pass


class Web(ThreadingHTTPServer):
    request_queue_size = 64


@pytest.fixture
def web(make_picture) -> Iterator[str]:
    Answers.picture = make_picture(0)
    with Web(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_fetch_gets_a_picture(web: str, make_picture) -> None:
    assert fetch(f"{web}/a.jpg") == make_picture(0)
    assert fetch(f"{web}/untyped") == make_picture(0)
    assert fetch(f"{web}/ü b.jpg") == make_picture(0), "characters that a URL may not hold are quoted"


@pytest.mark.parametrize(
    ("name", "cause", "message", "limits"),
    [
        ("gone.jpg", "unreachable_url", "404", {}),
        ("page", "not_an_image", "content type is text/html, expected image", {}),
        ("slow", "unreachable_url", "not complete after 0.3 s", {"timeout": 0.3}),
        ("endless", "too_large_file", "more than 100,000 bytes", {"max_bytes": 100_000}),
    ],
)
def test_fetch_faults(web: str, name: str, cause: str, message: str, limits: dict) -> None:
    with pytest.raises(Fault, match=message) as caught:
        fetch(f"{web}/{name}", **limits)
    assert caught.value.cause == cause
    assert f"{web}/{name}" in caught.value.detail


def test_fetch_without_a_server() -> None:
    with pytest.raises(Fault, match="refused"):
        fetch("http://127.0.0.1:9/a.jpg")
    with pytest.raises(Fault, match="http://"):
        fetch("http://[bad/a.jpg")


def test_a_table_of_urls(web: str, folder: Path, make_picture) -> None:
    lines = ["url,caption", *[f"{web}/{number}.jpg,text {number}" for number in range(100)]]
    lines[50:50] = [f"{web}/gone.jpg,gone", f"{web}/page,page", "pictures/a.jpg,a file"]
    table = write(folder, "urls.csv", "\n".join(lines))
    found, faults = split_up(samples(table))
    texts = [sample.captions[0] for sample in found]
    assert texts == [*[f"text {n}" for n in range(49)], "a file", *[f"text {n}" for n in range(49, 100)]]
    assert found[0].meta == {"url": f"{web}/0.jpg"}
    assert found[49].meta == {"name": "pictures/a.jpg"}
    assert found[0].image == make_picture(0)
    assert [(fault.cause, fault.where) for fault in faults] == [
        ("unreachable_url", "urls.csv:51"),
        ("not_an_image", "urls.csv:52"),
    ]
    summary = prepare("csv", table=table, out=folder / "out", limit=60, quiet=True)
    assert (summary.samples, summary.faults) == (60, 2)


def test_map_threads_keeps_the_order_and_runs_a_little_ahead() -> None:
    started: list[int] = []

    def arguments() -> Iterator[int]:
        for number in range(1000):
            started.append(number)
            yield number

    results = map_threads(lambda number: number * number, arguments(), threads=3)
    assert [next(results) for _ in range(20)] == [number * number for number in range(20)]
    assert len(started) < 40
    results.close()  # type: ignore[attr-defined]
