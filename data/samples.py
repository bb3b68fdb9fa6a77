"""From shards to raw samples: the index of a set, and one sample's picture, JSON and text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from data.faults import Fault
from data.fetch import local_shard
from data.shards import IMAGE_EXTENSIONS, MANIFEST, expand_shards
from data.tar import ShardIndex, ShardReader, scan_shard

Shards: TypeAlias = str | Path | Iterable[str | Path]  # what `data.shards.expand_shards` understands


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in its shard.

    Attributes:
        key: Its name within the shard.
        shard: Path or URL of the shard.
        index: Position in the whole set, counted through the shards in their given order; stable across
            epochs.
        image: The encoded picture.
        extension: `jpg`, `jpeg`, `png` or `webp`.
        record: The sample's JSON; empty when it has none. `KEY.cls` is its `label` where the JSON has none.
        text: Content of `KEY.txt`; None when there is none.
    """

    key: str
    shard: str
    index: int
    image: bytes
    extension: str
    record: dict[str, Any] = field(default_factory=dict)
    text: str | None = None

    def captions(self) -> list[str]:
        """The texts of the picture: `captions` of the JSON, else its `caption`, else `KEY.txt`; blanks left
        out.

        Raises:
            Fault: `bad_json` when the JSON's captions are not text.
        """
        captions = self.record.get("captions") or self.record.get("caption") or self.text or []
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise Fault("bad_json", f"captions should be a list of texts, got {captions!r}"[:200])
        return [caption.strip() for caption in captions if caption.strip()]


def read_sample(index: ShardIndex, sample: int, number: int, reader: ShardReader) -> RawSample:
    """Read one sample's picture, JSON and text.

    Args:
        index: Its shard.
        sample: Number within the shard.
        number: Global index.
        reader: Keeps shards open.

    Raises:
        Fault: `missing_image`, `bad_json`, `bad_text`, or what `ShardReader.read` raises.
    """
    members = index.members(sample)
    extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
    if extension is None:
        found = ", ".join(members) or "nothing"
        raise Fault("missing_image", f"none of {', '.join(IMAGE_EXTENSIONS)} (it has {found})")
    record: Any = {}
    if "json" in members:
        try:
            record = json.loads(reader.read(index, *members["json"]))
        except ValueError as error:  # also text that is not UTF-8
            raise Fault("bad_json", str(error)) from error
        if not isinstance(record, dict):
            raise Fault("bad_json", f"expected an object, got {type(record).__name__}")
    text = None
    if "txt" in members:
        try:
            text = reader.read(index, *members["txt"]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Fault("bad_text", f"KEY.txt is not UTF-8: {error}") from error
    if "cls" in members and "label" not in record:  # WebDataset's own way to say it
        written = reader.read(index, *members["cls"]).decode("utf-8", "replace").strip()
        record["label"] = int(written) if written.isdecimal() else written
    image = reader.read(index, *members[extension])
    return RawSample(index.key(sample), index.name, number, image, extension, record, text)


def index_shards(shards: Shards, *, cache_dir: str | Path | None = None) -> list[ShardIndex]:
    """Index all shards of a specification, fetching those that are URLs; see `PairStream` for the
    arguments."""
    promised: dict[Path, dict[str, Any]] = {}
    indices = []
    for name in expand_shards(shards):
        path = local_shard(name, cache_dir)
        if path.parent not in promised:
            promised[path.parent] = read_manifest(path.parent / MANIFEST)
        expected = promised[path.parent].get(path.name, {}).get("samples")
        indices.append(scan_shard(path, name, expected if isinstance(expected, int) else None))
    return indices


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of each shard, by file name; empty when there is no readable manifest of ours."""
    try:
        shards = json.loads(path.read_text(encoding="utf-8")).get("shards")
        return {name: entry for name, entry in shards.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError):
        return {}
