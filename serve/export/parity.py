"""The gate: an export that does not say what its model says is not written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.encoder import Encoder
from retrieval.embed import Embeddings, embed_shards
from retrieval.metrics import DIRECTIONS, retrieval_metrics
from serve.export.runtime import EdgeEncoder

BATCHES = (1, 3, 8)
FLOAT_TOLERANCE = 1e-5  # largest difference of an element of a unit row
INT8_COSINE = 0.99  # mean cosine
RECALL_DROP = 0.005
AGREEMENT = 0.97
TEXTS = (
    "",
    "a",
    "a photo of a cat",
    "two dogs on a beach, one of them jumping after a red ball",
    "naïve café 日本 🙂 — 1234567890",
    "word " * 200,
    "the same, the same, the same, the same, the same",
    "A RED CAR!!!",
)


def probes(encoder: Encoder) -> list[tuple[Tensor, Tensor]]:
    """Pictures and tokens of several batch sizes: noise, smooth, black, white, and texts from nothing to too much."""
    generator = torch.Generator().manual_seed(0)
    size, found = encoder.image_size, []
    for batch in BATCHES:
        coarse = torch.rand(batch, 3, 4, 4, generator=generator) * 255
        pixels = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").to(torch.uint8)
        pixels[batch // 2] = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        if batch > 3:
            pixels[-1], pixels[-2] = 0, 255
        texts = [TEXTS[(batch + place) % len(TEXTS)] for place in range(batch)]
        found.append((pixels, encoder.tokenize(texts)))
    return found


def compare(encoder: Encoder, edge: EdgeEncoder) -> dict[str, dict[str, float]]:
    """Largest difference and cosines of both towers over the probes.

    Returns:
        For `image` and `text`: `max_abs`, `cosine_mean`, `cosine_min`.
    """
    rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"image": [], "text": []}
    for pixels, tokens in probes(encoder):
        rows["image"].append((encoder.encode_images(pixels).numpy(), edge.encode_images(pixels.numpy())))
        rows["text"].append((encoder.encode_texts(tokens).numpy(), edge.encode_texts(tokens.numpy())))
    report = {}
    for name, pairs in rows.items():
        expected, found = (np.concatenate(side) for side in zip(*pairs, strict=True))
        cosines = (expected * found).sum(axis=1)
        report[name] = {
            "max_abs": float(np.abs(expected - found).max()),
            "cosine_mean": float(cosines.mean()),
            "cosine_min": float(cosines.min()),
        }
    return report


def check_float(report: dict[str, dict[str, float]]) -> None:
    """The gate of float32 exports.

    Raises:
        ValueError: A tower is further from the model than rounding explains.
    """
    for name, numbers in report.items():
        if not numbers["max_abs"] <= FLOAT_TOLERANCE:
            raise ValueError(
                f"the export is refused: rows of the {name} tower differ from the model's by {numbers['max_abs']:.2e}, "
                f"more than {FLOAT_TOLERANCE:g}; nothing was written"
            )


@dataclass
class AsEncoder:
    """An export in the Encoder's clothes, for `embed_shards`: the same pixels and tokens, the other towers."""

    edge: EdgeEncoder
    encoder: Encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self.edge.encode_images(pixels.numpy()))

    def encode_texts(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self.edge.encode_texts(tokens.numpy()))


def compare_on_data(
    encoder: Encoder, edge: EdgeEncoder, data: Sequence[str], *, limit: int | None = None
) -> dict[str, Any]:
    """What the export costs where it matters: recall@1 and the first result, both ways, on real pairs.

    Args:
        encoder: The model.
        edge: Its export.
        data: Shards with captions.
        limit: Only the first so many samples.

    Returns:
        `samples`, `texts`; for each direction `recall@1` of the model, `recall@1_export`, `drop`, `agreement`
        and `same_picture`; see `agreements`.
    """
    ours = embed_shards(encoder, data, limit=limit)
    theirs = embed_shards(AsEncoder(edge, encoder), data, limit=limit)  # pyright: ignore
    report: dict[str, Any] = {"samples": len(ours.images), "texts": len(ours.texts)}
    before, after = (
        retrieval_metrics(each.images, each.texts, each.image_of_text, ks=(1,)) for each in (ours, theirs)
    )
    for direction in DIRECTIONS:
        recall, exported = (numbers[direction]["recall@1"] for numbers in (before, after))
        report[direction] = {
            "recall@1": recall,
            "recall@1_export": exported,
            "drop": recall - exported,
            **agreements(ours, theirs, direction),
        }
    return report


def agreements(ours: Embeddings, theirs: Embeddings, direction: str) -> dict[str, float]:
    """Shares of queries for which two models have the same first result.

    Returns:
        `agreement`: the very same result, for pictures among all texts; what the gate takes. `same_picture`: one of the
        same picture, which is more where several texts of a picture say the same in other words.
    """
    rows = []
    for each in (ours, theirs):
        scores = each.images @ each.texts.T  # (pictures, texts)
        rows.append(scores.argmax(axis=1 if direction == "image_to_text" else 0))
    pictures = [ours.image_of_text[each] if direction == "image_to_text" else each for each in rows]
    return {
        name: float((one == other).mean())
        for name, (one, other) in {"agreement": rows, "same_picture": pictures}.items()
    }


def check_int8(report: dict[str, dict[str, float]], on_data: dict[str, Any] | None) -> None:
    """The gate of int8 exports: by recall and first results where there are data, by cosine alone where not.

    Raises:
        ValueError: The export costs too much.
    """
    for name, numbers in report.items():
        if not numbers["cosine_mean"] >= INT8_COSINE:
            raise ValueError(
                f"the export is refused: rows of the int8 {name} tower have a mean cosine of "
                f"{numbers['cosine_mean']:.4f} with the model's, expected at least {INT8_COSINE}; nothing was written. "
                "Try --reduce-range on a CPU without VNNI, or export without --int8"
            )
    for direction in DIRECTIONS if on_data else ():
        assert on_data is not None
        numbers = on_data[direction]
        if numbers["drop"] > RECALL_DROP + 1e-9 or numbers["agreement"] < AGREEMENT:
            raise ValueError(
                f"the export is refused: {direction.replace('_', ' ')}, int8 loses {100 * numbers['drop']:.2f} "
                f"points of recall@1 (at most {100 * RECALL_DROP:g}) and has the same first result for "
                f"{numbers['agreement']:.1%} of the queries (at least {AGREEMENT:.0%}), over {on_data['samples']:,} "
                "pictures; nothing was written. Try --reduce-range on a CPU without VNNI, or export without --int8"
            )
