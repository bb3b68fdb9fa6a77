"""Per-query places of an evaluation, kept beside its JSON, and the comparison of two checkpoints on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_bytes

from pairstream.atomic import write_bytes
from retrieval.bootstrap import RESAMPLES, Difference, bootstrap_intervals, paired_difference
from retrieval.checks import checked_cutoffs
from retrieval.metrics import DIRECTIONS
from retrieval.ranking import Ranking

KIND = "pairstream-queries"
FIELDS = ("query", "above", "level", "right")


def queries_path(result: str | Path) -> Path:
    """The file of places beside a result: `NAME.queries.safetensors` beside `NAME.json`."""
    return Path(result).with_suffix(".queries.safetensors")


def pack_queries(rankings: Sequence[Ranking], image_of_text: np.ndarray, data_hash: str) -> bytes:
    """Places of all right answers of all queries as one safetensors file; equal places give equal bytes.

    Args:
        rankings: Both directions.
        image_of_text: int64 `(texts,)`.
        data_hash: Of the pairs.
    """
    tensors = {"image_of_text": np.ascontiguousarray(image_of_text, dtype=np.int64)}
    about: dict[str, Any] = {"format": KIND, "data_hash": data_hash}
    for direction, ranking in zip(DIRECTIONS, rankings, strict=True):
        tensors |= {f"{direction}.{name}": getattr(ranking, name).numpy().astype(np.int32) for name in FIELDS}
        about[direction] = [ranking.queries, ranking.gallery]
    # One entry: safetensors writes several in an order that changes from run to run.
    return save_bytes(tensors, metadata={"about": json.dumps(about)})


def write_queries(result: str | Path, packed: bytes) -> Path:
    """Write packed places beside a result's JSON."""
    path = queries_path(result)
    write_bytes(path, packed)
    return path


def read_queries(result: str | Path) -> tuple[dict[str, Any], dict[str, Ranking], np.ndarray]:
    """A result with its places.

    Args:
        result: The JSON that `retrieval eval` wrote.

    Returns:
        Its content, the ranking of each direction, and `image_of_text`.

    Raises:
        FileNotFoundError: It, or the file of places beside it, is absent.
        ValueError: It is no such JSON, or its places are damaged or of another run.
    """
    path, beside = Path(result), queries_path(result)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected the JSON of `pairstream retrieval eval`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        expected = content["queries_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the JSON of `pairstream retrieval eval` with queries_sha256 ({error!r})"
        ) from error
    if not beside.is_file():
        raise FileNotFoundError(
            f"{beside} is missing: keep it beside {path.name}, or run the evaluation again"
        )
    if hashlib.sha256(beside.read_bytes()).hexdigest() != expected:
        raise ValueError(f"{beside} is damaged or of another run than {path.name}: run the evaluation again")
    try:
        with safe_open(beside, "numpy") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{beside}: no safetensors file ({error}): run the evaluation again") from error
    rankings = {}
    for direction in DIRECTIONS:
        fields = [torch.from_numpy(tensors[f"{direction}.{name}"].astype(np.int64)) for name in FIELDS]
        queries, gallery = about[direction]
        rankings[direction] = Ranking(*fields, queries=queries, gallery=gallery)
    return content, rankings, tensors["image_of_text"]


def clusters(direction: str, image_of_text: np.ndarray) -> np.ndarray:
    """The image that each query of a direction belongs to."""
    images = int(image_of_text.max()) + 1
    return np.arange(images) if direction == DIRECTIONS[0] else image_of_text


def query_values(ranking: Ranking, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Numbers of every query, under the names of their means in a summary."""
    values = {name: each.numpy() for name, each in ranking.per_query(ks).items() if name != "ap"}
    rank, reciprocal = values.pop("rank"), values.pop("reciprocal_rank")
    return {**values, "mean_rank": rank, "mrr": reciprocal}


def result_intervals(
    rankings: Sequence[Ranking],
    image_of_text: np.ndarray,
    ks: Sequence[int],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> dict[str, Any]:
    """Intervals of every number of both directions.

    Returns:
        `level`, `resamples`, `unit`, and for each direction `[low, high]` by the number's name.
    """
    found: dict[str, Any] = {"level": level, "resamples": resamples, "unit": "image with its captions"}
    for direction, ranking in zip(DIRECTIONS, rankings, strict=True):
        values = query_values(ranking, ks)
        each = bootstrap_intervals(
            {**values, "median_rank": values["mean_rank"]},
            clusters(direction, image_of_text),
            resamples=resamples,
            level=level,
        )
        found[direction] = {name: [interval.low, interval.high] for name, interval in each.items()}
    return found


def compare_results(
    first: str | Path,
    second: str | Path,
    ks: Sequence[int] = (1, 5, 10),
    *,
    resamples: int = 10000,
    level: float = 0.95,
) -> dict[str, Any]:
    """Paired test of two evaluations over the same pairs.

    Args:
        first: JSON of `retrieval eval`.
        second: The same of another checkpoint.
        ks: Cut-offs.
        resamples: Bootstrap samples and random exchanges.
        level: Of the interval of the difference.

    Returns:
        Plain data: `first` and `second` (what they are), and for each direction, by the number's name,
        `first`, `second`, `difference` (second - first), `low`, `high` and `p`.

    Raises:
        FileNotFoundError: A file is absent.
        ValueError: A damaged file, or evaluations of different pairs.
    """
    ks = checked_cutoffs(ks)
    (one, one_rankings, owner), (two, two_rankings, other) = read_queries(first), read_queries(second)
    if one["data_hash"] != two["data_hash"] or not np.array_equal(owner, other):
        raise ValueError(
            f"{first} and {second} were measured on different pairs (data_hash {one['data_hash']} and "
            f"{two['data_hash']}; {one['images']:,} and {two['images']:,} pictures): a paired test needs the same "
            "queries and gallery. Evaluate both on the same --data with the same --limit."
        )
    return {
        "first": describe(one, first),
        "second": describe(two, second),
        "data_hash": one["data_hash"],
        "images": one["images"],
        "texts": one["texts"],
        "level": level,
        "resamples": resamples,
        "test": "sign flips over images, two-sided; interval: paired bootstrap over images",
        **{
            direction: {
                name: asdict(each)
                for name, each in differences(
                    direction,
                    one_rankings[direction],
                    two_rankings[direction],
                    owner,
                    ks,
                    resamples=resamples,
                    level=level,
                ).items()
            }
            for direction in DIRECTIONS
        },
    }


def differences(
    direction: str,
    first: Ranking,
    second: Ranking,
    image_of_text: np.ndarray,
    ks: Sequence[int],
    *,
    resamples: int = 10000,
    level: float = 0.95,
) -> dict[str, Difference]:
    """Paired test of two rankings of the same pairs, by the number's name."""
    return paired_difference(
        query_values(first, ks),
        query_values(second, ks),
        clusters(direction, image_of_text),
        resamples=resamples,
        level=level,
    )


def describe(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    return {"file": str(path), "model": content["model"], "fingerprint": content["fingerprint"]}
