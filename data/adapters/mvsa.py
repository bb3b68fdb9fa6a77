"""MVSA: tweets with a picture, judged positive, neutral or negative by text and by picture."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

from data.adapters.common import Counted, Row, Skipped, need_file, need_split, read_lines, read_rows

LABELS = ("positive", "neutral", "negative")
SPLITS = ("train", "val", "test", "all")


def single(root: Path, split: str = "train") -> Counted:
    """MVSA-Single: 5,129 tweets, one annotator; 4,511 with labels that agree. See `samples`."""
    return samples("mvsa_single", Path(root), split)


def multiple(root: Path, split: str = "train") -> Counted:
    """MVSA-Multiple: 19,600 tweets, three annotators; 17,024 with labels that agree. See `samples`."""
    return samples("mvsa_multiple", Path(root), split)


def samples(name: str, root: Path, split: str) -> Counted:
    """Tweets with one label each.

    Labels are merged as the literature does: the majority of the annotators for the text and for the picture (a tweet
    without one is left out); then equal labels stand, neutral gives way to the other, and positive against negative is
    left out. What is left out so is no fault and is not counted. The JSON has `label`, `text`, `text_label` and
    `image_label`; the tweet is also the caption.

    The set has no splits of its own. These are drawn by the tweet's number, 8:1:1, the same everywhere.

    Args:
        name: Of the set, for messages.
        root: Holds `labelResultAll.txt` and `data/` with `1.jpg`, `1.txt`, ...
        split: `train`, `val`, `test` or `all`.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split.

    Reference:
        Xu and Mao, MultiSentiNet, CIKM 2017.
    """
    need_split(name, split, SPLITS)
    path = need_file(root, "labelResultAll.txt", what=f"labels of {name}")
    folder = path.parent / "data"
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of tweets {folder}: expected data/ beside {path.name}")
    rows: list[Row] = []
    faults: list[Skipped] = []
    for number, line in read_lines(path):
        where = f"{path.name}:{number}"
        head, *judged = line.strip().split("\t")
        if head == "ID":
            continue
        pairs = [tuple(part.strip() for part in entry.split(",")) for entry in judged]
        if not pairs or not head.isdecimal() or any(len(p) != 2 or not {*p} <= {*LABELS} for p in pairs):
            faults.append(Skipped("bad_row", where, f"expected ID<TAB>text,image labels, got {line[:60]!r}"))
            continue
        if split not in ("all", split_of(head)):
            continue
        by_text, by_image = (majority([pair[side] for pair in pairs]) for side in (0, 1))
        label = merge(by_text, by_image)
        if label is None:
            continue
        tweet = folder / f"{head}.txt"
        if not tweet.is_file():
            faults.append(Skipped("missing_caption", where, f"no tweet {tweet}"))
            continue
        text = " ".join(read_tweet(tweet).split())
        meta = {"label": label, "text": text, "text_label": by_text, "image_label": by_image}
        rows.append(Row(f"{head}.jpg", folder / f"{head}.jpg", where, [text], meta))
    return read_rows(rows, faults)


def read_tweet(path: Path) -> str:
    """A tweet's text; most files are Latin-1, some are UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def majority(labels: list[str]) -> str | None:
    """The label of more than half of the annotators; None when there is none."""
    label, count = Counter(labels).most_common(1)[0]
    return label if 2 * count > len(labels) else None


def merge(text: str | None, image: str | None) -> str | None:
    """One label of a tweet; None when text and picture contradict each other, or one has no label."""
    if text is None or image is None or {text, image} == {"positive", "negative"}:
        return None
    return image if text == "neutral" else text


def split_of(number: str) -> str:
    """The split of a tweet: 8 of 10 to train on, 1 for val, 1 for test."""
    drawn = zlib.crc32(number.encode()) % 10
    return "test" if drawn == 9 else "val" if drawn == 8 else "train"
