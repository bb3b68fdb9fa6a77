"""From shards to raw samples: the index of a set, and one sample's picture, JSON and text."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from data.faults import Fault, FaultRecord
from data.fetch import ShardCache, cache_folder, is_remote
from data.index import fetched_index, index_shard
from data.shards import IMAGE_EXTENSIONS, MANIFEST, expand_shards
from data.tar import ShardIndex, ShardReader

FETCHES = 8  # shards that are fetched at a time while a set is indexed
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
        members: Content of the further files that were asked for, by extension.
    """

    key: str
    shard: str
    index: int
    image: bytes
    extension: str
    record: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    members: dict[str, bytes] = field(default_factory=dict)

    def captions(self, key: str | None = None) -> list[str]:
        """The texts of the picture: `captions` of the JSON, else its `caption`, else `KEY.txt`; blanks left
        out.

        Args:
            key: Another JSON key to take them from, instead.

        Raises:
            Fault: `bad_json` when the JSON's captions are not text, `bad_text` when UTF-8 cannot hold one.
        """
        if key is None:
            captions = self.record.get("captions") or self.record.get("caption") or self.text or []
        else:
            captions = self.record.get(key) or []
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise Fault("bad_json", f"captions should be a list of texts, got {captions!r}"[:200])
        if not all(map(is_text, captions)):  # tokenizers refuse it, in the middle of a run
            raise Fault("bad_text", "a caption holds half a character (a lone surrogate)")
        return [caption.strip() for caption in captions if caption.strip()]


def is_text(value: Any) -> bool:
    """False for a text that no UTF-8 can hold: bytes of another encoding, or half a character of JSON's."""
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_sample(
    index: ShardIndex, sample: int, number: int, reader: ShardReader, more: Iterable[str] = ()
) -> RawSample:
    """Read one sample's picture, JSON and text.

    Args:
        index: Its shard.
        sample: Number within the shard.
        number: Global index.
        reader: Keeps shards open.
        more: Extensions of further files to read, where the sample has them.

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
        except (ValueError, RecursionError) as error:  # also text that is not UTF-8; brackets without end
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
    further = {name: reader.read(index, *members[name]) for name in more if name in members}
    return RawSample(index.key(sample), index.name, number, image, extension, record, text, further)


def index_shards(
    shards: Shards,
    *,
    cache_dir: str | Path | None = None,
    cache: ShardCache | None = None,
    tolerant: bool = False,
) -> list[ShardIndex]:
    """Index all shards of a specification, fetching those that come from elsewhere and have no index yet.

    Args:
        shards: What `data.shards.expand_shards` takes.
        cache_dir: Where fetched shards are kept; `data.fetch.cache_folder()` when None.
        cache: The same with its limit, in its place.
        tolerant: Give a shard that cannot be had an empty index with an `unreadable_shard` fault, whose count is
            what the manifest promises or what the others hold on average.

    Raises:
        ValueError: No shards.
        FileNotFoundError: A shard cannot be fetched, unless `tolerant`.
        OSError: A local shard cannot be read, unless `tolerant`.
    """
    names = expand_shards(shards)
    cache = cache or ShardCache(Path(cache_dir or cache_folder()))
    promises = {
        folder: read_manifest(folder / MANIFEST) for folder in {cache.path(name).parent for name in names}
    }

    def look(name: str) -> ShardIndex | FaultRecord:
        path = cache.path(name)
        promised = promises[path.parent].get(path.name, {}).get("samples")
        expected = promised if isinstance(promised, int) else None
        try:
            known = (
                fetched_index(path, name, expected)
                if is_remote(name) and (tolerant or path.is_file())
                else None
            )
            if known is None and tolerant and is_remote(name) and not path.is_file():
                known = cache.index_from_afar(name, expected)
            if known is not None:
                return known
            path, tag = cache.local(name)
            try:
                return index_shard(path, name, expected, tag=tag)
            except FileNotFoundError:  # it had to make room for another shard in between
                path, tag = cache.local(name)
                return index_shard(path, name, expected, tag=tag)
        except OSError as error:
            if not tolerant or error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            return FaultRecord("unreadable_shard", name, "", str(error), expected or 0)

    if any(map(is_remote, names)):
        cache.prepare()
        with ThreadPoolExecutor(FETCHES) as pool:
            found = list(pool.map(look, names))
        cache.make_room(0, "")  # of those that came at the same time none could make room for the others
    else:
        found = list(map(look, names))
    sizes = [len(index) for index in found if isinstance(index, ShardIndex)]
    usual = max(1, round(sum(sizes) / len(sizes))) if sizes else 1
    return [
        index
        if isinstance(index, ShardIndex)
        else empty_index(replace(index, count=index.count or usual), cache)
        for index in found
    ]


def empty_index(fault: FaultRecord, cache: ShardCache) -> ShardIndex:
    """The index of a shard that cannot be read."""
    none = np.zeros(0, dtype=np.int64)
    return ShardIndex(
        path=str(cache.path(fault.shard)),
        name=fault.shard,
        keys=np.zeros(0, dtype="S1"),
        starts=np.zeros(1, dtype=np.int64),
        extensions=none.astype(np.uint16),
        offsets=none,
        sizes=none,
        names=(),
        faults=(fault,),
    )


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of each shard, by file name; empty when there is no readable manifest of ours."""
    try:
        shards = json.loads(path.read_text(encoding="utf-8")).get("shards")
        return {
            name: {key: value for key, value in entry.items() if promises(key, value)}
            for name, entry in shards.items()
            if isinstance(entry, dict)
        }
    except (OSError, ValueError, AttributeError):
        return {}


def promises(key: str, value: Any) -> bool:
    """Whether an entry of a manifest says something that can be held against its shard."""
    if key in ("samples", "bytes"):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, str) if key == "sha256" else True
