"""The shape of the two embedding spaces: whether pairs meet, and how the rows spread."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from retrieval.checks import checked_owner
from retrieval.rows import GRID, Rows, same_width

SAMPLE = 4000  # rows of a side whose pairs are all compared for uniformity: 8 million pairs


def diagnostics(
    image_embeddings: Any,
    text_embeddings: Any,
    image_of_text: Any,
    *,
    sample: int = SAMPLE,
    block: int = 1024,
) -> dict[str, float]:
    """Alignment, uniformity, modality gap, anisotropy and effective rank of unit rows.

    They describe a pretraining run beside its recall: a collapse shows as an effective rank near 1 and an
    anisotropy near 1, a space that is not used as a uniformity near 0. None of them ranks models by itself.

    Args:
        image_embeddings: `(images, dim)` floats; normalised here.
        text_embeddings: `(texts, dim)` floats.
        image_of_text: `(texts,)` integers.
        sample: Uniformity compares all pairs among at most so many rows, evenly spaced; the rest is over all.
        block: Rows at a time.

    Returns:
        - `alignment`: mean squared distance of a text and its picture, 0 to 4; lower is closer.
        - `uniformity_images`, `uniformity_texts`: log of the mean of `exp(-2 * squared distance)` over pairs of
          different rows, -4 to 0 or so; lower is more even.
        - `modality_gap`: distance of the mean picture and the mean text.
        - `anisotropy_images`, `anisotropy_texts`: mean cosine of two different rows; 0 when they point
          everywhere.
        - `effective_rank_images`, `effective_rank_texts`: exponential of the entropy of the normalised
          singular values; between 1 and `dim`.

    Raises:
        ValueError: As `retrieval_metrics`, or a side with a single row.
        TypeError: As `retrieval_metrics`.

    Reference:
        Wang and Isola 2020 (alignment, uniformity; alpha = 2, t = 2); Liang et al. 2022 (modality gap); Roy
        and Vetterli 2007 (effective rank, of the rows as they are, not centred); Ethayarajh 2019 (anisotropy).

    Example:
        >>> diagnostics(np.eye(3), np.eye(3), [0, 1, 2])["alignment"]
        0.0
    """
    sides = {
        "images": Rows(image_embeddings, "image_embeddings", block),
        "texts": Rows(text_embeddings, "text_embeddings", block),
    }
    images, texts = sides["images"], sides["texts"]
    same_width(images, texts)
    owner = checked_owner(image_of_text, len(images), len(texts)).to(images.device)
    for name, rows in sides.items():
        if len(rows) < 2:
            raise ValueError(f"{name}: expected two or more rows to compare, got one")
    distance = torch.zeros((), dtype=torch.float64, device=images.device)
    for part in texts.parts():
        distance += (unit(texts, part) - unit(images, owner[part])).square().sum()
    result = {"alignment": float(distance / len(texts))}
    means = {}
    for name, rows in sides.items():
        total = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
        moments = torch.zeros((rows.dim, rows.dim), dtype=torch.float64, device=rows.device)
        for part in rows.parts():
            block_rows = unit(rows, part)
            total += block_rows.sum(0)
            moments += block_rows.T @ block_rows
        means[name] = total / len(rows)
        n = len(rows)
        result[f"uniformity_{name}"] = uniformity(rows, sample)
        result[f"anisotropy_{name}"] = float((total.square().sum() - n) / (n * (n - 1)))
        result[f"effective_rank_{name}"] = effective_rank(moments)
    result["modality_gap"] = float((means["images"] - means["texts"]).norm())
    return result


def unit(rows: Rows, which: slice | torch.Tensor) -> torch.Tensor:
    """Unit rows, float64."""
    return rows.take(which) / GRID


def uniformity(rows: Rows, sample: int) -> float:
    """Uniformity over all pairs among evenly spaced rows."""
    number = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), sample)).round().astype(np.int64))
    chosen = unit(rows, torch.from_numpy(number).to(rows.device)).float()
    total = 0.0
    for start in range(0, len(chosen), rows.block):
        squared = (2 - 2 * chosen[start : start + rows.block] @ chosen.T).clamp(min=0)  # unit rows
        total += float(torch.exp(-2 * squared).double().sum())
    pairs = len(chosen) * (len(chosen) - 1)
    return float(np.log((total - len(chosen)) / pairs))  # without each row's distance 0 to itself


def effective_rank(moments: torch.Tensor) -> float:
    """Effective rank from the second moments `(dim, dim)`: singular values are roots of its eigenvalues."""
    values = torch.linalg.eigvalsh(moments).clamp(min=0).sqrt()
    # Below this they are rounding: thousands of such values would add up to a rank of their own.
    values = values[values > values.max() * 1e-7]
    share = values / values.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def clip_score(
    image_embeddings: Any, text_embeddings: Any, *, weight: float = 2.5, block: int = 1024
) -> torch.Tensor:
    """CLIPScore of each picture and its candidate caption: `2.5 * max(cos, 0)`.

    The score of the paper puts "A photo depicts " before every caption and uses ViT-B/32: another model's
    scores are not comparable with published ones.

    Args:
        image_embeddings: `(n, dim)` floats.
        text_embeddings: `(n, dim)` floats: the candidate caption of each picture.
        weight: The paper's w.
        block: Rows at a time.

    Returns:
        float64 `(n,)`.

    Raises:
        ValueError: Lengths or widths that differ, and as `retrieval_metrics`.
        TypeError: As `retrieval_metrics`.

    Reference:
        Hessel et al. 2021, section 3.
    """
    return weight * cosines(image_embeddings, text_embeddings, "image", "text", block).clamp(min=0)


def ref_clip_score(
    image_embeddings: Any,
    text_embeddings: Any,
    reference_embeddings: Any,
    text_of_reference: Any,
    *,
    weight: float = 2.5,
    block: int = 1024,
) -> torch.Tensor:
    """RefCLIPScore: harmonic mean of CLIPScore and the best cosine of candidate and reference.

    Args:
        image_embeddings: `(n, dim)` floats.
        text_embeddings: `(n, dim)` floats: candidate captions.
        reference_embeddings: `(references, dim)` floats.
        text_of_reference: `(references,)` integers: the candidate that each reference is for; every candidate
            has one or more.
        weight: The paper's w.
        block: Rows at a time.

    Returns:
        float64 `(n,)`; 0 where either part is not above 0, as the paper writes it.

    Raises:
        ValueError: As `clip_score`, or a candidate without a reference.
        TypeError: As `clip_score`.

    Reference:
        Hessel et al. 2021, section 3 (both parts clipped at 0; the authors' code leaves the second as it is).
    """
    score = clip_score(image_embeddings, text_embeddings, weight=weight, block=block)
    candidates = Rows(text_embeddings, "text_embeddings", block)
    references = Rows(reference_embeddings, "reference_embeddings", block)
    same_width(candidates, references)
    owner = checked_owner(text_of_reference, len(candidates), len(references)).to(candidates.device)
    best = torch.full((len(candidates),), -torch.inf, dtype=torch.float64, device=candidates.device)
    for part in references.parts():
        found = (unit(references, part) * unit(candidates, owner[part])).sum(1)
        best.scatter_reduce_(0, owner[part], found, "amax")
    best = best.clamp(min=0)
    both = score + best
    return torch.where(both > 0, 2 * score * best / both.clamp(min=1e-30), 0.0)


def cosines(first: Any, second: Any, first_name: str, second_name: str, block: int) -> torch.Tensor:
    """Cosine of each row of one side and the same row of the other; float64 `(n,)`."""
    one, other = (
        Rows(first, f"{first_name}_embeddings", block),
        Rows(second, f"{second_name}_embeddings", block),
    )
    same_width(one, other)
    if len(one) != len(other):
        raise ValueError(f"expected one {second_name} for each {first_name}, got {len(other)} for {len(one)}")
    return torch.cat([(unit(one, part) * unit(other, part)).sum(1) for part in one.parts()])
