"""Reports: a list of plain blocks, written as `report.json` and one self-contained `report.html`.

The blocks are data, so that a later stage loads the report of an earlier one and goes on with it.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pairstream.atomic import write_text
from pairstream.plot import plot
from pairstream.run import finite

Cell = str | int | float | None
KINDS = ("numbers", "heading", "text", "table", "curves", "picture", "cards", "results")
MARKS = {"right": "✓ right", "wrong": "✗ wrong"}  # words and a sign: colour alone would not reach everybody
NUMBER = re.compile(r"[-+−]?[\d.,]+ ?%?")
PICTURES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}


@dataclass(frozen=True)
class Card:
    """One picture, or one text, with what is said about it.

    Attributes:
        image: An encoded picture (JPEG, PNG or WebP bytes), shown as it is; None for a card of text.
        title: The main line, also the picture's alternative text.
        lines: Further lines below it.
        mark: `right` or `wrong` puts a badge on the card.
    """

    image: bytes | None = None
    title: str = ""
    lines: Sequence[str] = field(default_factory=list)
    mark: Literal["right", "wrong"] | None = None

    def block(self) -> dict[str, Any]:
        """The card as plain data."""
        if self.mark not in (None, *MARKS):
            raise ValueError(f"card {self.title!r}: mark {self.mark!r}, expected 'right', 'wrong' or None")
        return {
            "image": None if self.image is None else data_uri(self.image),
            "title": clean(self.title),
            "lines": [clean(line) for line in self.lines],
            "mark": self.mark,
        }


class Report:
    """A page made of blocks, in the order in which they are added.

    All pictures lie inside the page, so its size is about 4/3 of their bytes: shrink them before.

    Args:
        title: The page's title.
        subtitle: One line below it: model, data, date.

    Example:
        >>> report = Report("Retrieval", "a small model on 1,000 pictures")
        >>> report.numbers([("recall@1", 0.214, "chance 0.001")])
        >>> report.write("runs/demo")                                              # doctest: +SKIP
    """

    def __init__(self, title: str, subtitle: str = ""):
        self.title, self.subtitle = clean(title), clean(subtitle)
        self.blocks: list[dict[str, Any]] = []

    def add(self, kind: str, **content: Any) -> None:
        self.blocks.append({"kind": kind, **finite(content)})

    def numbers(self, entries: Iterable[tuple[str, Cell, str]]) -> None:
        """A row of large figures, each `(label, value, note)`."""
        rows = [[clean(label), clean_cell(value), clean(note)] for label, value, note in entries]
        self.add("numbers", entries=rows)

    def heading(self, text: str) -> None:
        """The start of a new part; three or more give the page a list of contents."""
        self.add("heading", text=clean(text))

    def text(self, text: str) -> None:
        """Prose; an empty line starts a new paragraph. It is shown literally: no markup is read."""
        self.add("text", text=clean(text))

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Cell]], caption: str = "") -> None:
        """A table; columns of numbers are set flush right.

        Raises:
            ValueError: A row is longer or shorter than the header.
        """
        body = [[clean_cell(cell) for cell in row] for row in rows]
        for number, row in enumerate(body):
            if len(row) != len(header):
                raise ValueError(
                    f"table row {number} has {len(row)} cells, the header has {len(header)}: {row}"
                )
        self.add("table", header=[clean(name) for name in header], rows=body, caption=clean(caption))

    def curves(
        self,
        title: str,
        curves: Mapping[str, Iterable[tuple[float, float]]],
        x: str = "step",
        y: str = "",
        lines: Mapping[str, float] | None = None,
    ) -> None:
        """A plot of one or several curves; plots that follow each other stand side by side.

        Args:
            title: What is shown.
            curves: Points `(x, y)` by name; points that are not finite are left out.
            x: Name of the horizontal axis.
            y: Name of the vertical axis.
            lines: Horizontal levels by label, such as chance.
        """
        points = {
            clean(name): [
                [float(a), float(b)] for a, b in curve if math.isfinite(float(a)) and math.isfinite(float(b))
            ]
            for name, curve in curves.items()
        }
        levels = {clean(label): float(level) for label, level in (lines or {}).items()}
        if not all(map(math.isfinite, levels.values())):
            raise ValueError(f"curves {title!r}: lines must be finite, got {levels}")
        self.add("curves", title=clean(title), curves=points, x=clean(x), y=clean(y), lines=levels)

    def picture(self, title: str, image: bytes, words: str) -> None:
        """One large picture, such as a plot.

        Args:
            title: What is shown.
            image: JPEG, PNG or WebP bytes.
            words: The line below it, also its alternative text.
        """
        self.add("picture", title=clean(title), image=data_uri(image), words=clean(words))

    def cards(self, title: str, cards: Iterable[Card]) -> None:
        """A wall of cards."""
        self.add("cards", title=clean(title), cards=[card.block() for card in cards])

    def results(self, title: str, entries: Iterable[tuple[Card, Iterable[Card]]]) -> None:
        """A wall of queries, each beside its ranked results, best first."""
        rows = [
            {"query": query.block(), "results": [card.block() for card in found]} for query, found in entries
        ]
        self.add("results", title=clean(title), entries=rows)

    def extend(self, other: Report) -> None:
        """Append the blocks of another report; its title is not taken over."""
        self.blocks += other.blocks

    def write(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.html`.

        Args:
            folder: Where; made when absent.

        Returns:
            The page's path.
        """
        folder = Path(folder)
        content = {"title": self.title, "subtitle": self.subtitle, "blocks": self.blocks}
        write_text(folder / "report.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        write_text(folder / "report.html", self.html())
        return folder / "report.html"

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read a `report.json` back.

        Args:
            folder: The folder that `write` filled.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged or has blocks of an unknown kind.
        """
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: expected the folder of a written report")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            report = cls(content["title"], content["subtitle"])
            report.blocks = list(content["blocks"])
            kinds = [block["kind"] for block in report.blocks]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a whole report ({error!r}): write it again") from error
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"{path}: block of kind {kind!r}, expected one of {', '.join(KINDS)}")
        return report

    def html(self) -> str:
        """The page; it loads nothing from anywhere, and its content policy forbids it to."""
        headings = [block["text"] for block in self.blocks if block["kind"] == "heading"]
        contents = "".join(f'<a href="#part-{i}">{escape(text)}</a>' for i, text in enumerate(headings, 1))
        body, part = [], 0
        for kind, group in groupby(self.blocks, key=lambda block: block["kind"]):
            for block in [{"kind": kind, "plots": list(group)}] if kind == "curves" else group:
                part += kind == "heading"
                body.append(RENDER[kind](block, part))
        css = (files("pairstream") / "report.css").read_text(encoding="utf-8")
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        return "\n".join(
            [
                '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                f"<title>{escape(self.title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>",
                f"<header>\n<h1>{escape(self.title)}</h1>",
                f"<p>{escape(self.subtitle)}</p>" if self.subtitle else "",
                f'<nav aria-label="Contents">{contents}</nav>' if len(headings) >= 3 else "",
                "</header>",
                *body,
                "</main>\n</body>\n</html>\n",
            ]
        )


def clean(text: str) -> str:
    """Text that UTF-8 and HTML can hold: lone surrogates and control characters become U+FFFD."""
    text = str(text).encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c in "\n\t" or ord(c) >= 32 else "\ufffd" for c in text)


def clean_cell(value: Cell) -> Cell:
    if value is None or isinstance(value, str):
        return None if value is None else clean(value)
    return int(value) if isinstance(value, int) else float(value)


def data_uri(image: bytes) -> str:
    """A picture as a `data:` address.

    Raises:
        ValueError: The bytes are not a JPEG, PNG or WebP picture.
    """
    kind = next((kind for magic, kind in PICTURES.items() if image.startswith(magic)), None)
    if kind is None:
        raise ValueError(
            f"card picture: expected the bytes of a JPEG, PNG or WebP file, got {bytes(image[:8])!r}"
        )
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def show(value: Cell) -> str:
    """A number as a reader wants it: 6,000, 0.2142, 12.3; a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (value == round(value) and abs(value) >= 1000):
        return f"{round(value):,}"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.4g}"  # shares of 1 stand under other shares


def numbers_html(block: dict[str, Any], part: int) -> str:
    tiles = [
        f'<div><dt>{escape(label)}</dt><dd class="value">{escape(show(value))}</dd>'
        f'<dd class="soft">{escape(note)}</dd></div>'
        for label, value, note in block["entries"]
    ]
    return f'<section><dl class="numbers">{"".join(tiles)}</dl></section>'


def heading_html(block: dict[str, Any], part: int) -> str:
    return f'<h2 id="part-{part}">{escape(block["text"])}</h2>'


def text_html(block: dict[str, Any], part: int) -> str:
    paragraphs = [paragraph for paragraph in block["text"].split("\n\n") if paragraph.strip()]
    return "".join(f'<p dir="auto">{escape(paragraph)}</p>' for paragraph in paragraphs)


def table_html(block: dict[str, Any], part: int) -> str:
    columns = list(zip(*block["rows"], strict=True))
    numeric = [
        all(not isinstance(cell, str) or NUMBER.fullmatch(cell) for cell in column) for column in columns
    ]
    kinds = [' class="number"' if right else "" for right in numeric] or [""] * len(block["header"])
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for kind, name in zip(kinds, block["header"], strict=True)
    )
    rows = [
        "".join(f"<td{kind}>{escape(show(cell))}</td>" for kind, cell in zip(kinds, row, strict=True))
        for row in block["rows"]
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    caption = f"<caption>{escape(block['caption'])}</caption>" if block["caption"] else ""
    return (
        f'<section class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></section>"
    )


def curves_html(block: dict[str, Any], part: int) -> str:
    plots = [
        plot(each["title"], each["curves"], each["x"], each["y"], each["lines"]) for each in block["plots"]
    ]
    return f'<div class="plots">{"".join(plots)}</div>'


def figure_html(block: dict[str, Any], part: int) -> str:
    words = escape(block["words"])
    return (
        f'<section><h3>{escape(block["title"])}</h3><figure class="picture">'
        f'<img src="{escape(block["image"])}" alt="{words}"><figcaption class="soft">{words}</figcaption>'
        "</figure></section>"
    )


def picture_html(card: dict[str, Any]) -> str:
    if card["image"] is None:
        return ""
    words = card["title"] or " ".join(card["lines"]) or "picture without a description"
    return f'<img src="{escape(card["image"])}" alt="{escape(words)}">'


def words_html(card: dict[str, Any], rank: int | None = None) -> str:
    tag = "" if rank is None else f'<span class="rank">{rank}</span>'
    badge = f'<span class="mark {card["mark"]}">{MARKS[card["mark"]]}</span>' if card["mark"] else ""
    first = f"<p>{tag}{badge}</p>" if tag or badge else ""
    title = f'<p class="title" dir="auto">{escape(card["title"])}</p>' if card["title"] else ""
    lines = "".join(f'<p class="soft" dir="auto">{escape(line)}</p>' for line in card["lines"])
    return f'<div class="words">{first}{title}{lines}</div>' if first or title or lines else ""


def cards_html(block: dict[str, Any], part: int) -> str:
    cards = [
        f'<article class="card {card["mark"] or ""}">{picture_html(card)}{words_html(card)}</article>'
        for card in block["cards"]
    ]
    return f'<section><h3>{escape(block["title"])}</h3><div class="cards">{"".join(cards)}</div></section>'


def results_html(block: dict[str, Any], part: int) -> str:
    rows = []
    for entry in block["entries"]:
        query, found = entry["query"], entry["results"]
        kind = "pictures" if any(card["image"] for card in found) else "texts"
        cards = "".join(
            f'<li class="card {card["mark"] or ""}">{picture_html(card)}{words_html(card, rank)}</li>'
            for rank, card in enumerate(found, 1)
        )
        rows.append(
            f'<div class="result"><div class="query {"" if query["image"] else "text"}">'
            f'{picture_html(query)}{words_html(query)}</div><ol class="{kind}">{cards}</ol></div>'
        )
    return f"<section><h3>{escape(block['title'])}</h3>{''.join(rows)}</section>"


RENDER = {
    "numbers": numbers_html,
    "heading": heading_html,
    "text": text_html,
    "table": table_html,
    "curves": curves_html,
    "picture": figure_html,
    "cards": cards_html,
    "results": results_html,
}
