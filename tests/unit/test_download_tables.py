"""Lists of URLs as they come: in odd formats, damaged, and with columns that are not what they should be."""

import gzip
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from data.download.files import list_files
from data.download.tables import choose_columns, count_rows, join_tables, read_parts

URL = "http://a/1.jpg"
PAIR = f"url,caption\n{URL},one\n"


def write(path: Path, content: Any) -> Path:
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(*paths: Path, **options: Any) -> list[dict[str, Any]]:
    """What the parts of a list hold, without the numbers of the rows."""
    files = list_files([str(path) for path in paths])
    columns = choose_columns(files[0], None, **options)
    parts = [
        row for part in read_parts(files, columns, 10, count_rows(files, columns)) for row in part.to_pylist()
    ]
    assert [row.pop("source_row") for row in parts] == list(range(len(parts)))
    return parts


ONE = [{"url": URL, "caption": "one"}]
NONE = {"url": None, "caption": None}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bom.csv", b"\xef\xbb\xbf" + PAIR.encode(), ONE),
        ("crlf.csv", PAIR.replace("\n", "\r\n"), ONE),
        ("zeros.csv", PAIR.replace("one", "o\0ne"), ONE),
        ("blank_lines_first.csv", "\n\n" + PAIR, ONE),
        ("case.csv", PAIR.replace("url", "URL").replace("caption", "Caption"), ONE),
        ("tabs.csv", PAIR.replace(",", "\t"), ONE),
        ("commas.tsv", PAIR, ONE),
        ("semicolons.csv", f"url;caption\n{URL};one, two\n", [{"url": URL, "caption": "one, two"}]),
        ("lines.csv", f'url,caption\n{URL},"one\nand two"\n', [{"url": URL, "caption": "one\nand two"}]),
        ("row_numbers.csv", f",url,caption\n0,{URL},one\n", ONE),
        ("missing.csv", f"url,caption\n,one\n{URL}\n", [{"url": "", "caption": "one"}, NONE]),
        ("twice.csv", PAIR + f"{URL},one\n", ONE * 2),
        ("latin.csv", PAIR.encode() + f"{URL},caf\xe9\n".encode("latin-1"), [*ONE, NONE]),
        ("latin_url.csv", PAIR.encode() + "http://a/\xe9.jpg,two\n".encode("latin-1"), [*ONE, NONE]),
        (
            "latin_value.csv",
            f"url,caption,by\n{URL},one,Andr\xe9\n".encode("latin-1"),
            [{**ONE[0], "by": "Andr\ufffd"}],
        ),
        (
            "half.jsonl",
            f'{{"url": "{URL}", "caption": "one", "by": "\\ud800"}}\n{{"url": "{URL}", "caption": "\\ud800"}}\n',
            [{**ONE[0], "by": "\ufffd"}, {**NONE, "by": None}],
        ),
        ("odd.jsonl", f'[1]\n3\n{{"url": "{URL}", "caption": "one"}}\n{{', [NONE, NONE, *ONE, NONE]),
        (
            "numbers.jsonl",
            f'{{"url": {{"a": 1}}, "caption": "one"}}\n{{"url": "{URL}", "caption": 3}}\n',
            None,
        ),
        ("lists_beside.parquet", {"url": [URL], "caption": ["one"], "tags": [["a", "b"]]}, ONE),
        ("number.parquet", {"url": [URL], "caption": [3]}, [{"url": URL, "caption": "3"}]),
        (
            "bytes.parquet",
            {"url": [URL.encode()] * 2, "caption": [b"one", b"caf\xe9"]},
            [*ONE, {"url": URL, "caption": None}],
        ),
        (
            "bytes_beside.parquet",
            {"url": [URL], "caption": ["one"], "by": [b"Andr\xe9"]},
            [{**ONE[0], "by": "Andr\ufffd"}],
        ),
        ("missing.parquet", {"url": [URL, None], "caption": ["one", None]}, [*ONE, NONE]),
        (
            "later.jsonl",
            f'{{"url": null, "caption": "none", "tags": null}}\n'
            f'{{"url": "{URL}", "caption": "one", "tags": ["a"], "by": "me"}}\n'
            f'{{"url": ["{URL}"], "caption": "a list"}}\n',
            [
                {"url": None, "caption": "none", "by": None},
                {**ONE[0], "by": "me"},
                {"url": None, "caption": "a list", "by": None},
            ],
        ),
    ],
)
def test_odd_lists_are_read_and_bad_rows_counted(tmp_path: Path, name: str, content: Any, expected) -> None:
    path = write(tmp_path / name, content)
    if expected is None:
        with pytest.raises(ValueError, match="the column 'url' holds lists, expected one URL a row"):
            rows(path)
    else:
        assert rows(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("empty.csv", "\n\n", {}, r"empty\.csv is empty: expected a line of column names"),
        ("no_caption.csv", f"url,words\n{URL},one\n", {}, r"which column holds the captions\? It has url, words"),
        ("wrong.csv", PAIR, {"url": "urll"}, r"no column 'urll': it has url, caption; did you mean 'url'"),
        ("one.csv", PAIR, {"caption": "url"}, r"'url' cannot hold the URLs and the captions.*--caption-column"),
        ("twice.csv", f"url,caption,caption\n{URL},a,b\n", {}, r"'caption' and 'caption' would have one name"),
        ("hashes.csv", f"url,caption,sha256,source_sha256\n{URL},a,1,2\n", {}, "'sha256' and 'source_sha256' would"),
        ("wide.csv", ",".join(f"column{n}" for n in range(99)) + "\n", {}, r"It has column0, .* \.\.\.; name one"),
        ("utf16.csv", PAIR.encode("utf-16"), {}, r"expected UTF-8 text and found what looks like UTF-16"),
        ("utf16.tsv", PAIR.encode("utf-16-le"), {}, r"expected UTF-8 text and found what looks like UTF-16"),
        ("really.csv", b"PAR1" + bytes(99), {}, r"what looks like parquet: convert it, or give it the suffix"),
        ("not.csv.gz", PAIR, {}, r"not\.csv\.gz: not a whole gzip file \(Not a gzipped"),
        ("cut.csv.gz", gzip.compress(PAIR.encode())[:-9], {}, r"cut\.csv\.gz: not a whole gzip file"),
        ("text.parquet", PAIR, {}, r"text\.parquet: not a whole parquet file"),
        ("none.parquet", {}, {}, r"which column holds the URLs\? It has no columns"),
        ("lists.parquet", {"url": [[URL]], "caption": ["a"]}, {}, "'url' holds lists, expected one URL a row"),
        ("many.parquet", {"url": [URL], "caption": [["a"]]}, {}, "'caption' holds lists, expected one caption a row"),
        ("number.json", "3", {}, "expected a list of objects or an object of lists, got int"),
        ("cut.json", '{"a": ', {}, r"cut\.json: not a JSON file"),
        ("nothing.json", "[]", {}, "no row to be found in it"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_used(tmp_path: Path, name: str, content: Any, options, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rows(write(tmp_path / name, content), **options)


def test_hidden_files_are_no_part_of_a_list(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", PAIR)
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache/b.json", "{}")
    write(tmp_path / ".c.csv", "")
    assert list_files([str(tmp_path)]) == [tmp_path / "a.csv"]


def test_files_of_one_list_that_differ(tmp_path: Path) -> None:
    first = write(tmp_path / "1.csv", PAIR)
    with pytest.raises(ValueError, match=r"2\.csv: no column 'url', which .*1\.csv has; it has link, text"):
        rows(first, write(tmp_path / "2.csv", f"link,text\n{URL},two\n"))
    one = write(tmp_path / "1.parquet", {"url": [URL], "caption": ["one"], "size": [3]})
    with pytest.raises(ValueError, match=r"2\.parquet: no column 'size', which .*1\.parquet has"):
        rows(one, write(tmp_path / "2.parquet", {"url": [URL], "caption": ["two"]}))
    other = write(tmp_path / "3.parquet", {"url": [URL], "caption": ["two"], "size": ["large"]})
    assert [row["size"] for row in rows(one, other)] == ["3", "large"]
    with pytest.raises(ValueError, match=r"differ in the column 'size' \(int64, list<.*leave it out"):
        join_tables(pa, [pa.table({"size": [3]}), pa.table({"size": [[3]]})])


def test_addresses_that_no_server_can_be_asked_for() -> None:
    pytest.importorskip("img2dataset")
    from data.download.worker import usable

    links = [f" {URL} ", "HTTP://A/x", "http://a/\nb", "ftp://a/b", "", None]
    table = pa.table({"source_row": range(6), "url": links, "caption": ["x"] * 6})
    good, skipped = usable(table)
    assert good["url"].to_pylist() == [URL, "HTTP://A/x"]
    assert [(row["source_row"], row["cause"]) for row in skipped] == [(n, "bad_url") for n in range(2, 6)]
