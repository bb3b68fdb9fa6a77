"""The report: what is written can be read back, shows everything, and escapes everything."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from pairstream.plot import plot, thin, tick_label, ticks
from pairstream.report import Card, Report, show

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=y>"


class Page(HTMLParser):
    """All elements, attributes and text of a page; fails on a close tag without its open tag."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def full_report(picture: bytes) -> Report:
    report = Report(f"Title {HOSTILE}", f"subtitle {HOSTILE}")
    report.numbers([(HOSTILE, 0.21423, HOSTILE), ("count", 6000, ""), ("nothing", None, "")])
    report.heading(HOSTILE)
    report.text(f"first {HOSTILE}\n\nsecond paragraph")
    report.table(
        [HOSTILE, "value"], [[HOSTILE, 0.5], ["empty", None], ["nan", float("nan")]], caption=HOSTILE
    )
    report.curves(HOSTILE, {HOSTILE: [(0, 2.0), (10, 1.0), (20, float("nan"))]}, lines={HOSTILE: 4.0})
    report.curves("none", {"empty": []})
    cards = [Card(picture, HOSTILE, [HOSTILE], "right"), Card(None, "only text", [], "wrong"), Card(picture)]
    report.picture(HOSTILE, picture, HOSTILE)
    report.cards(HOSTILE, cards)
    report.results(HOSTILE, [(Card(None, HOSTILE), cards), (Card(picture, "query"), [Card(None, HOSTILE)])])
    return report


def test_page_is_well_formed_escaped_and_self_contained(make_picture, tmp_path):
    path = full_report(make_picture(0)).write(tmp_path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("script") == []
    assert page.words.count("<script>alert('x')</script>") >= 15  # shown as words, nowhere read as markup
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in page.all("img"))
    assert all(picture["alt"].strip() for picture in page.all("img"))
    assert len(page.all("img")) == 1 + 2 + 2 + 1
    css = re.search(r"<style>(.*?)</style>", text, re.S)
    assert css is not None
    assert "url(" not in css.group(1)
    assert "@import" not in css.group(1)
    assert not any(tag in ("link", "iframe", "object") for tag, _ in page.tags)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
    assert "✓ right" in page.words
    assert "✗ wrong" in page.words


def test_a_loaded_report_equals_the_written_one_and_grows(make_picture, tmp_path):
    report = full_report(make_picture(1))
    report.write(tmp_path)
    again = Report.load(tmp_path)
    assert again.blocks == report.blocks
    assert again.html() == report.html()
    more = Report("more")
    more.heading("another part")
    again.extend(more)
    again.write(tmp_path)
    assert [block["kind"] for block in Report.load(tmp_path).blocks] == [
        *(block["kind"] for block in report.blocks),
        "heading",
    ]


def test_contents_link_to_their_headings():
    report = Report("t")
    for name in ("one", "two", "three"):
        report.heading(name)
    page = Page(report.html())
    assert [a["href"][1:] for a in page.all("a")] == [h["id"] for h in page.all("h2")]


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path):
    report = Report("lone \ud800 surrogate and \x00 zero")
    report.write(tmp_path)
    assert "\ufffd zero" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        ("as is", "as is"),
        (6000, "6,000"),
        (0, "0"),
        (0.0, "0.0000"),
        (0.21423, "0.2142"),
        (1.0, "1.0000"),
        (12.345, "12.35"),
        (500.5, "500.5"),
        (25010.0, "25,010"),
        (1e-6, "1e-06"),
    ],
)
def test_numbers_are_shown_for_readers(value, words):
    assert show(value) == words


def test_columns_of_numbers_are_flush_right():
    report = Report("t")
    report.table(["name", "n", "text"], [["a", 1, "1,234.5"], ["b", None, "-2 %"]])
    kinds = [cell.get("class") for cell in Page(report.html()).all("td")]
    assert kinds == [None, "number", "number"] * 2
    empty = Report("t")
    empty.table(["a", "b"], [])
    assert len(Page(empty.html()).all("th")) == 2


def test_ticks_cover_the_range_with_round_numbers():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.013, 0.57)[0] <= 0.013
    assert ticks(0.013, 0.57)[-1] >= 0.57
    assert len(set(ticks(3, 3))) > 1
    assert len(set(ticks(0, 0))) > 1
    assert [tick_label(v) for v in (0, 0.25, 8000, 20000, 1.5e6, 2e9)] == [
        "0",
        "0.25",
        "8000",
        "20k",
        "1.5M",
        "2B",
    ]


def test_points_of_a_plot_lie_where_the_axes_say():
    figure = plot("t", {"a": [(0, 0.0), (100, 1.0), (50, 0.5)]}, "step", "y", {})
    points = re.search(r'points="([^"]*)"', figure)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, pair.split(","))) for pair in points.group(1).split()]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x0 < x2
    assert y0 > y2  # SVG counts downwards


def test_thinning_keeps_the_peaks():
    points = [(i, float(i % 7)) for i in range(10_000)]
    points[6543] = (6543, 99.0)
    points[123] = (123, -99.0)
    kept = thin(points)
    assert len(kept) <= 600
    assert (6543, 99.0) in kept
    assert (123, -99.0) in kept
    assert [p[0] for p in kept] == sorted(p[0] for p in kept)


def test_wrong_blocks_are_refused(tmp_path):
    report = Report("t")
    with pytest.raises(ValueError, match="table row 1 has 1 cells, the header has 2"):
        report.table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="expected the bytes of a JPEG, PNG or WebP"):
        report.cards("c", [Card(b"<svg onload=x>")])
    with pytest.raises(ValueError, match="mark 'maybe', expected 'right', 'wrong' or None"):
        report.cards("c", [Card(None, "t", mark="maybe")])  # pyright: ignore
    with pytest.raises(ValueError, match="lines must be finite"):
        report.curves("c", {"a": [(0, 1)]}, lines={"chance": float("inf")})
    assert report.blocks == []


def test_damaged_reports_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder of a written report"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text('{"title": "cut')
    with pytest.raises(ValueError, match="is not a whole report"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text(
        json.dumps({"title": "", "subtitle": "", "blocks": [{"kind": "pie"}]})
    )
    with pytest.raises(ValueError, match="block of kind 'pie', expected one of numbers"):
        Report.load(tmp_path)
