"""Export an index to Qdrant, for a served, replicated one when a single machine is outgrown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pairstream.errors import require
from retrieval.index import Index

BATCH = 1000  # points a request


def connect(where: str) -> Any:
    """A client for a server's URL, or for a folder in Qdrant's local mode.

    Raises:
        ImportError: `qdrant-client` is not installed.
    """
    qdrant = require("qdrant_client", "qdrant", "exporting to Qdrant")
    return qdrant.QdrantClient(url=where) if "://" in where else qdrant.QdrantClient(path=str(Path(where)))


def export_to_qdrant(index: Index, client: Any, collection: str, *, side: str = "images") -> int:
    """Write the rows of one side as points: the number of the row is the id, its record the payload.

    The collection compares by inner product, as the index does, and its metadata holds model and fingerprint. It is
    an error to write into one that exists.

    Args:
        index: What is exported; deleted rows are not.
        client: What `connect` gave, or any `QdrantClient`.
        collection: Name of the new collection.
        side: `images` or `texts`.

    Returns:
        Points written.

    Raises:
        ImportError: `qdrant-client` is not installed.
        ValueError: The collection exists, or the server has not as many points afterwards.
    """
    models: Any = require("qdrant_client.models", "qdrant", "exporting to Qdrant")
    source = index.side(side)
    if client.collection_exists(collection):
        raise ValueError(
            f"the Qdrant collection {collection!r} exists: delete it there, or choose another name"
        )
    client.create_collection(
        collection,
        vectors_config=models.VectorParams(size=index.dim, distance=models.Distance.DOT),
        metadata={"model": index.model, "fingerprint": index.fingerprint, "side": side},
    )
    rows = np.arange(source.ntotal) if source.deleted is None else np.flatnonzero(~source.deleted)
    for start in range(0, len(rows), BATCH):
        mine = rows[start : start + BATCH]
        client.upsert(
            collection,
            models.Batch(
                ids=mine.tolist(),
                vectors=source.vectors(mine).tolist(),
                payloads=[source.records[row] for row in mine.tolist()],
            ),
            wait=True,
        )
    written = client.count(collection).count
    if written != len(rows):
        raise ValueError(
            f"Qdrant holds {written:,} points of {len(rows):,}: look at its log, and export again"
        )
    return written
