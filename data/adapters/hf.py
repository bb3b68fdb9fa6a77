"""`hf:ID-or-folder`: any Hugging Face data set, or local folder of one, with a column of pictures and one of texts."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.adapters.common import Counted, Skipped, plain, safe_key
from data.adapters.csv import CAPTION_COLUMNS, captions_of
from data.shards import Sample
from pairstream.errors import nearest, require


def samples(
    source: str,
    split: str = "train",
    *,
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    keep_columns: Sequence[str] | None = None,
) -> Counted:
    """A set that the library `datasets` can open.

    Pictures are taken as they are stored, without decoding. A set on the hub is streamed; nothing of it is kept on
    the disk.

    Args:
        source: `OWNER/NAME` (or `OWNER/NAME:CONFIG`) on the hub, a folder that `save_to_disk` wrote, or a folder
            of parquet, JSON or CSV files, or of pictures with `metadata.csv` or `metadata.jsonl`.
        split: As the set calls it.
        image_column: By default the one whose type is Image.
        caption_columns: By default the first of caption, captions, title and text. A list of texts gives several
            captions.
        keep_columns: Copied into the samples' JSON; all plain ones by default.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: No such split or column.
    """
    datasets = require("datasets", "hf", "the data set hf:")
    rows = open_rows(datasets, source, split)
    features: Any = rows.features or {}
    if not features:  # a streamed set may not say before it is read
        features = dict.fromkeys(next(iter(rows), {}))
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = choose(source, features, image_column, images or [n for n in features if n in ("image", "img", "jpg")],
                   "pictures", "--image-column")  # fmt: skip
    texts = [
        choose(source, features, name, CAPTION_COLUMNS, "captions", "--caption-columns")
        for name in caption_columns or (None,)
    ]
    kept = [
        choose(source, features, name, (), "kept values", "--keep-columns") for name in keep_columns or ()
    ]
    if image in images:
        rows = rows.cast_column(image, datasets.Image(decode=False))
    columns = kept or [name for name in features if name not in (image, *texts)]
    total = len(rows) if hasattr(rows, "__len__") else 0
    labels = {
        name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)
    }
    return Counted(total, read(rows, split, image, texts, columns, labels))


def open_rows(datasets: Any, source: str, split: str) -> Any:
    """The rows of a split, streamed when they come from the hub."""
    folder = Path(source).expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        held = datasets.load_from_disk(str(folder))
        if not isinstance(held, dict):
            return held
        if split not in held:
            raise ValueError(
                f"hf:{source} has no split {split!r}: it has {', '.join(held)}{nearest(split, held)}"
            )
        return held[split]
    name, _, config = source.partition(":")
    local = folder.is_dir()
    if not local and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise FileNotFoundError(
            f"hf:{source}: no such folder, and no name on the hub looks like it (OWNER/NAME)"
        )
    try:
        return datasets.load_dataset(
            str(folder) if local else name, config or None, split=split, streaming=not local
        )
    except ValueError as error:  # its message lists the splits, or the configurations
        raise ValueError(f"hf:{source}, split {split!r}: {error}") from error


def choose(
    source: str, features: Any, given: str | None, usual: Sequence[str], what: str, option: str
) -> str:
    """A column by its given name, or the first usual one."""
    if given is not None:
        if given in features:
            return given
        raise ValueError(
            f"hf:{source}: no column {given!r}: it has {', '.join(features)}{nearest(given, features)}"
        )
    for name in usual:
        if name in features:
            return name
    raise ValueError(
        f"hf:{source}: which column holds the {what}? It has {', '.join(features)}; name one with {option}"
    )


def read(
    rows: Any, split: str, image: str, texts: Sequence[str], kept: Sequence[str], labels: dict[str, list[str]]
) -> Iterator[Sample | Skipped]:
    """Samples row by row."""
    for number, row in enumerate(rows):
        where = f"{split}[{number}]"
        try:
            content, name = encoded(row[image])
        except FileNotFoundError as error:
            yield Skipped("missing_image", where, f"no picture {error.filename}")
            continue
        except (TypeError, ValueError, KeyError) as error:
            yield Skipped("missing_image", where, str(error))
            continue
        try:
            captions = captions_of(row, texts)
        except ValueError as error:
            yield Skipped("bad_row", where, str(error))
            continue
        if not captions:
            yield Skipped("missing_caption", where, f"no text in {', '.join(texts)}")
            continue
        meta: dict[str, Any] = {"name": name} if name else {}
        for column in kept:
            value = row.get(column)
            if column in labels and isinstance(value, int):
                value = labels[column][value] if 0 <= value < len(labels[column]) else None
            if value is not None and plain(value):
                meta[column] = value
        yield Sample(f"{safe_key(split)}-{number:09d}", content, "jpg", captions, meta)


def encoded(value: Any) -> tuple[bytes, str]:
    """A picture's bytes and its file's name."""
    if isinstance(value, bytes):
        return value, ""
    if isinstance(value, dict):
        path = value.get("path") or ""
        if value.get("bytes"):
            return value["bytes"], os.path.basename(path)  # noqa: PTH119 - may be a URL
        if path:
            return Path(path).read_bytes(), Path(path).name
        raise ValueError("the row has no picture")
    if hasattr(value, "save"):  # a decoded one
        file = io.BytesIO()
        value.save(file, "PNG")
        return file.getvalue(), ""
    raise TypeError(f"expected a picture, got {type(value).__name__}")
