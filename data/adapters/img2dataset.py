"""Folders that img2dataset has written: Conceptual Captions, LAION, SBU, or any other set of URLs, fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.adapters.common import (
    Counted,
    Row,
    Skipped,
    find_file,
    load_json,
    near,
    plain,
    read_json,
    read_lines,
    read_row,
    read_rows,
)
from data.adapters.csv import read_csv
from data.faults import Fault
from data.samples import read_sample
from data.shards import Sample
from data.tar import ShardIndex, ShardReader, scan_shard
from pairstream.errors import require

LIST_NAMES = ("Train-GCC-training_output.csv", "train.tsv", "train.csv", "validation.tsv", "val.csv")
RESULTS = (
    "key",
    "status",
    "error_message",
    "url",
    "caption",
    "exif",
)  # in the JSON already, or of no use in it


def laion(root: Path) -> Counted:
    """LAION-400M, LAION-2B, Re-LAION or DataComp as img2dataset has fetched them.

    Args:
        root: Holds `00000.tar`, ... and, beside each, `00000.parquet`, whose columns (`similarity`, `punsafe`,
            `pwatermark`, ...) are added to the JSON of the samples where they are not in it yet.

    Raises:
        FileNotFoundError: No tar file.
    """
    return shards(Path(root), "laion")


def conceptual_captions(root: Path) -> Counted:
    """Conceptual Captions (3M or 12M), fetched.

    Args:
        root: What img2dataset wrote, as tar files or as folders of files; or pictures with a list of `title` and
            `filepath` (`Train-GCC-training_output.csv`, as the script that came with CLIP makes it) or of captions
            and paths.

    Raises:
        FileNotFoundError: None of these is there.
    """
    root = Path(root)
    if any(root.glob("*.tar")):
        return shards(root, "conceptual_captions")
    listed = find_file(root, *LIST_NAMES)
    if listed is not None:
        return from_list(listed)
    return files(root, "conceptual_captions")


def sbu(root: Path) -> Counted:
    """SBU captioned photographs, fetched.

    Args:
        root: What img2dataset wrote, as tar files or as folders of files; or pictures under their Flickr names with
            `sbu-captions-all.json` or with `SBU_captioned_photo_dataset_urls.txt` and `..._captions.txt`.

    Raises:
        FileNotFoundError: None of these is there.
        ValueError: The two text files differ in length.
    """
    root = Path(root)
    if any(root.glob("*.tar")):
        return shards(root, "sbu")
    listed = find_file(root, "sbu-captions-all.json")
    if listed is not None:
        content = load_json(listed)
        urls, captions = (
            content.get(key) if isinstance(content, dict) else None for key in ("image_urls", "captions")
        )
        if not isinstance(urls, list) or not isinstance(captions, list):
            raise ValueError(f"{listed}: expected an object with the lists image_urls and captions")
        pairs = [(f"{listed.name}[{place}]", url) for place, url in enumerate(urls)]
    else:
        listed = find_file(root, "SBU_captioned_photo_dataset_urls.txt")
        if listed is None:
            return files(root, "sbu")
        pairs = [(f"{listed.name}:{number}", url.strip()) for number, url in read_lines(listed)]
        texts = find_file(root, "SBU_captioned_photo_dataset_captions.txt")
        captions = [text for _, text in read_lines(texts)] if texts else []
    if len(pairs) != len(captions):
        raise ValueError(f"{listed}: {len(pairs):,} URLs and {len(captions):,} captions: expected as many")
    there = {path.name: path for path in root.rglob("*.jpg")}
    rows = []
    for (where, url), caption in zip(pairs, captions, strict=True):
        name = str(url).rsplit("/", 1)[-1]
        rows.append(Row(name, there.get(name, root / name), where, [str(caption)], {"url": url}))
    return read_rows(rows)


def from_list(path: Path) -> Counted:
    """Samples of a delimited list of captions and local files."""
    columns, content = read_csv(path, unnamed=False)
    by_name = {column.lower(): column for column in columns}
    picture = next((by_name[name] for name in ("filepath", "file", "path", "image") if name in by_name), None)
    text = next((by_name[name] for name in ("title", "caption", "text") if name in by_name), None)
    if picture is None or text is None:
        raise ValueError(
            f"{path}: expected the columns filepath and title (or caption), it has {', '.join(columns)}"
        )
    rows: list[Row] = []
    faults: list[Skipped] = []
    for line, row in content:
        where = f"{path.name}:{line}"
        if isinstance(row, str):
            faults.append(Skipped("bad_row", where, row))
        else:
            rows.append(Row(row[picture], path.parent / row[picture], where, [row[text]]))
    return read_rows(rows, faults)


def files(root: Path, name: str) -> Counted:
    """img2dataset's output format `files`: folders of KEY.jpg, KEY.txt and KEY.json."""
    pictures = [path for path in near(root) if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
    if not pictures:
        raise FileNotFoundError(
            f"no pictures of {name} in {root}: expected what img2dataset wrote (00000.tar ... or 00000/ ...); "
            "`pairstream data download` fetches them"
        )

    def read(path: Path) -> Sample | Skipped:
        meta: dict[str, Any] = {}
        where = f"{path.parent.name}/{path.name}"
        if path.with_suffix(".json").is_file():
            try:
                meta = read_json(path.with_suffix(".json"))
            except ValueError as error:
                return Skipped("bad_row", where, str(error))
        caption = meta.pop("caption", None)
        if caption is None and path.with_suffix(".txt").is_file():
            caption = path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
        if not isinstance(caption, str | None):
            return Skipped("bad_row", where, f"expected a text as caption, got {caption!r}"[:200])
        meta = {key: value for key, value in meta.items() if key not in RESULTS or key == "url"}
        return read_row(Row(path.name, path, where, [caption or ""], meta))

    return Counted(len(pictures), map(read, pictures))


def shards(root: Path, name: str) -> Counted:
    """img2dataset's output format `webdataset`: tar files with a parquet file beside each."""
    tars = sorted(root.glob("*.tar"))
    if not tars:
        raise FileNotFoundError(
            f"no tar file of {name} in {root}: expected what img2dataset wrote (00000.tar, 00000.parquet, ...); "
            "`pairstream data download` fetches it"
        )
    indices: list[ShardIndex] = []
    unread: list[Skipped] = []
    for tar in tars:
        try:
            indices.append(scan_shard(tar, tar.name, None))
        except OSError as error:  # a folder, a dead link, no right to it
            unread.append(Skipped("unreadable_shard", tar.name, f"cannot be read: {error}"))
    total = len(unread) + sum(len(index) + len(index.faults) for index in indices)

    def read() -> Iterator[Sample | Skipped]:
        yield from unread
        with ShardReader() as reader:
            for index in indices:
                columns = read_parquet(Path(index.path).with_suffix(".parquet"))
                for fault in index.faults:
                    yield Skipped(fault.cause, index.name, fault.detail)
                for number in range(len(index)):
                    key = index.key(number)
                    yield one(index, number, key, columns.pop(key, {}), reader)
                for key in columns:  # the list says that it was fetched
                    yield Skipped(
                        "missing_image", f"{index.name}: {key}", "is in the parquet file but not in the shard"
                    )

    return Counted(total, read())


def one(
    index: ShardIndex, number: int, key: str, extra: dict[str, Any], reader: ShardReader
) -> Sample | Skipped:
    """One sample of a shard, with what its parquet row adds."""
    where = f"{index.name}: {key}"
    try:
        raw = read_sample(index, number, number, reader)
        captions = raw.captions()
    except Fault as fault:
        return Skipped(fault.cause, where, fault.detail)
    if not captions:
        return Skipped("missing_caption", where, f"{key} has no caption")
    meta = {k: v for k, v in raw.record.items() if k not in (*RESULTS, "captions") or k == "url"}
    meta |= {k: v for k, v in extra.items() if k not in (*RESULTS, *meta) and v is not None}
    # No NaN and no bytes, which JSON cannot hold; a time becomes text.
    meta = {k: v if plain(v) else str(v) for k, v in meta.items() if v == v and not isinstance(v, bytes)}
    for lower in ("similarity", "punsafe", "pwatermark"):
        for upper in (lower.upper(), lower.capitalize()):
            if upper in meta:
                meta.setdefault(lower, meta.pop(upper))
    return Sample(re.sub(r"[^\w-]", "_", key), raw.image, raw.extension, captions, meta)


def read_parquet(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a parquet file that were fetched, by key; empty when there is no such file."""
    if not path.is_file():
        return {}
    table = require("pyarrow.parquet", "download", "reading img2dataset's parquet files").read_table(path)
    if "key" not in table.column_names:
        return {}
    return {row["key"]: row for row in table.to_pylist() if row.get("status", "success") == "success"}
