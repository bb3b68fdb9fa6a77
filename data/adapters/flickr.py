"""Flickr8k and Flickr30k: photographs with five captions each, in the layouts they are handed around in."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from data.adapters.common import (
    Counted,
    Row,
    Skipped,
    find_file,
    need_file,
    need_folder,
    read_lines,
    read_rows,
)
from data.adapters.karpathy import karpathy_samples

SPLIT_LISTS = {"train": "trainImages", "val": "devImages", "dev": "devImages", "test": "testImages"}


def flickr8k(root: Path, split: str = "train") -> Counted:
    """Flickr8k: 8,000 photographs, splits of 6,000, 1,000 and 1,000.

    Args:
        root: Holds `Flickr8k_Dataset/` (or `Flicker8k_Dataset/`, `Images/`) and either
            `Flickr8k.token.txt` with the `Flickr_8k.*Images.txt` split lists or `dataset_flickr8k.json`.
            The set's own files are taken when both are there; the splits are the same.
        split: `train`, `val` (= `dev`) or `test`.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, or an annotation file that cannot be read.
    """
    root = Path(root)
    karpathy = find_file(root, "dataset_flickr8k.json")
    pictures = need_folder(root, "Flickr8k_Dataset", "Flicker8k_Dataset", "Images", "Flickr8k_images")
    if karpathy and not find_file(root, "Flickr8k.token.txt"):
        return karpathy_samples(karpathy, split, lambda _: pictures)
    if split not in SPLIT_LISTS:
        raise ValueError(f"flickr8k has no split {split!r}: expected one of {', '.join(SPLIT_LISTS)}")
    tokens = need_file(root, "Flickr8k.token.txt", "dataset_flickr8k.json", what="captions of flickr8k")
    names = need_file(root, f"Flickr_8k.{SPLIT_LISTS[split]}.txt", what=f"list of the {split} split")
    return from_token_file(tokens, pictures, names)


def flickr30k(root: Path, split: str = "train") -> Counted:
    """Flickr30k: 31,783 photographs; papers use Karpathy's splits of 29,000, 1,014 and 1,000.

    Args:
        root: Holds `flickr30k_images/` (or `flickr30k-images/`, `Images/`) and one of
            `dataset_flickr30k.json` (with splits), `results_20130124.token` or `results.csv`; the last two
            know no splits, unless `train.txt`, `val.txt` and `test.txt` (one picture a line) lie there too.
        split: `train`, `val` (= `dev`) or `test`; `all` for the files without splits.

    Raises:
        FileNotFoundError: A file or folder of that layout is missing.
        ValueError: Another split, or an annotation file that cannot be read.
    """
    root = Path(root)
    pictures = need_folder(root, "flickr30k_images", "flickr30k-images", "Images")
    karpathy = find_file(root, "dataset_flickr30k.json")
    if karpathy and split != "all":
        return karpathy_samples(karpathy, split, lambda _: pictures)
    tokens = need_file(
        root, "results_20130124.token", "results.csv", "dataset_flickr30k.json", what="captions of flickr30k"
    )
    if tokens.suffix == ".json":
        return karpathy_samples(tokens, "train+val+test", lambda _: pictures)
    if split == "all":
        return from_token_file(tokens, pictures, None)
    split = "val" if split == "dev" else split
    names = find_file(root, f"{split}.txt")
    if names is None:
        raise FileNotFoundError(
            f"{tokens} knows no splits: for the split {split!r} put dataset_flickr30k.json or {split}.txt "
            f"into {root}, or take every picture with --split all"
        )
    return from_token_file(tokens, pictures, names)


def from_token_file(tokens: Path, pictures: Path, names: Path | None) -> Counted:
    """Samples from `name.jpg#0<TAB>caption` lines (or `name.jpg| 0| caption`, as in `results.csv`).

    Only lines about pictures of the split are judged: the published files have odd lines about others.

    Args:
        tokens: The caption file.
        pictures: The folder of pictures.
        names: The split's list, one picture a line, with or without `.jpg`; None takes every picture.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    first_line: dict[str, str] = {}
    if names is not None:
        for number, line in read_lines(names):
            name = line.strip() if Path(line.strip()).suffix else f"{line.strip()}.jpg"
            first_line.setdefault(name, f"{names.name}:{number}")
    faults: list[Skipped] = []
    for number, line in read_lines(tokens):
        where = f"{tokens.name}:{number}"
        parsed = parse_bar(line) if tokens.suffix == ".csv" else parse_token(line)
        if tokens.suffix == ".csv" and number == 1 and line.lower().startswith("image"):
            continue
        name, caption = parsed
        if names is not None and name not in first_line:
            continue
        if caption is None:
            form = "name.jpg| 0| caption" if tokens.suffix == ".csv" else "name.jpg#0<TAB>caption"
            faults.append(Skipped("bad_row", where, f"expected {form}, got {line[:60]!r}"))
        elif not caption:
            faults.append(Skipped("missing_caption", where, f"{name}: the caption is empty"))
        else:
            captions[name].append(caption)
        first_line.setdefault(name, where)
    rows = [Row(name, pictures / name, where, captions.get(name, ())) for name, where in first_line.items()]
    return read_rows(rows, faults)


def parse_token(line: str) -> tuple[str, str | None]:
    """Name and caption of a `name.jpg#0<TAB>caption` line; caption None when the line has another form."""
    head, tab, caption = line.partition("\t")
    name, mark, number = head.partition("#")
    return name.strip(), caption.strip() if tab and mark and number.strip().isdigit() else None


def parse_bar(line: str) -> tuple[str, str | None]:
    """Name and caption of a `name.jpg| 0| caption` line; caption None when the line has another form."""
    parts = line.split("|", 2)
    return parts[0].strip(), parts[2].strip() if len(parts) == 3 and parts[1].strip().isdigit() else None
