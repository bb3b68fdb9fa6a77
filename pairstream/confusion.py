"""The confusion matrix as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

MOST = 40  # labels; more cannot be read on a page


def confusion_picture(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> bytes:
    """A PNG: rows are the truth, columns what was said, the shade is the share of the row.

    Args:
        confusion: Counts `(labels, labels)`.
        labels: Their names; beyond 40 only the most frequent 40 of the truth are drawn.

    Raises:
        ValueError: The counts are not square, or not as many as labels.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.asarray(confusion, dtype=np.float64)
    if counts.shape != (len(labels), len(labels)) or not len(labels):
        raise ValueError(
            f"expected counts ({len(labels)}, {len(labels)}), one row a label, got {counts.shape}"
        )
    if len(labels) > MOST:
        kept = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:MOST])
        counts, labels = counts[np.ix_(kept, kept)], [labels[int(place)] for place in kept]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(2.5 + 0.55 * len(labels), 16)
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [label if len(label) <= 24 else label[:23] + "…" for label in labels]
    names = [name.replace("$", r"\$") for name in names]  # a pair of them would be set as a formula
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 5 else 30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="said", ylabel="truth")
    if len(labels) <= 20:
        for row, values in enumerate(counts):
            for column, value in enumerate(values):
                ink = "white" if shares[row, column] > 0.6 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
