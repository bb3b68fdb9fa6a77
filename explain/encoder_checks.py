"""Consistency of a dual encoder with itself: changed captions, paraphrases, mirrored pictures, neighbours."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from explain.edits import deny, swap_colours, swap_sides
from explain.findings import WORST, Consistency, Pair, at_chance, card, in_batches, own_ranks
from pretrain.encoder import Encoder

NEIGHBOURS = 10


def encoder_checks(
    result: Consistency,
    encoder: Encoder,
    pairs: Sequence[Pair],
    images: Tensor,
    mirrored: Tensor,
    rng: random.Random,
) -> None:
    """What the dual encoder says of changed captions, paraphrases, mirrored pictures and neighbours."""
    n = len(pairs)
    first = in_batches(encoder.encode_texts, [pair.captions[0] for pair in pairs], 256)
    own = (images * first).sum(1)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    result.numbers["controls"]["shuffled_data_captions"] = at_chance(own_ranks(images, first, shuffled))
    edits: dict[str, tuple[str, Callable[[str], str | None]]] = {
        "colours": (
            "prefers the caption to one with colours exchanged",
            lambda text: swap_colours(text, rng),
        ),
        "sides": ("prefers the caption to one with left and right exchanged", swap_sides),
        "negation": ("prefers the caption to one that denies the first thing", deny),
    }
    titles = {
        "colours": "Colours exchanged, and the model likes that better",
        "sides": "Left and right exchanged, and the model likes that better",
        "negation": "The first thing denied, and the model likes that better",
    }
    for name, (says, edit) in edits.items():
        title = titles[name]
        changed = [(i, text) for i, pair in enumerate(pairs) if (text := edit(pair.captions[0]))]
        if not changed:
            result.leave_out(f"{name}_right", "no caption could be changed that way")
            continue
        which = torch.tensor([i for i, _ in changed])
        rows = in_batches(encoder.encode_texts, [text for _, text in changed], 256)
        gap = own[which] - (images[which] * rows).sum(1)
        result.add(f"{name}_right", (gap > 0).double() + 0.5 * (gap == 0).double(), says, 0.5)
        result.add(f"{name}_gap", gap, "cosine of the caption minus that of the changed one", 0.0)
        result.worst[title] = [
            card(
                pairs[changed[j][0]],
                changed[j][1],
                [
                    f"true: {pairs[changed[j][0]].captions[0]}",
                    f"cosine of the true caption lower by {-gap[j]:.3f}",
                ],
            )
            for j in gap.argsort()[:WORST].tolist()
            if gap[j] <= 0
        ]
    several = torch.tensor([i for i, pair in enumerate(pairs) if len(pair.captions) > 1], dtype=torch.int64)
    if len(several) < 2:
        result.leave_out("paraphrase", "no picture has two captions")
    else:
        other = in_batches(encoder.encode_texts, [pairs[i].captions[1] for i in several.tolist()], 256)
        same = (first[several] @ images.T).argmax(1) == (other @ images.T).argmax(1)
        result.add("paraphrase_same_picture", same, "two captions of a picture find the same picture", 1 / n)
        change = (own[several] - (images[several] * other).sum(1)).abs()
        result.add("paraphrase_change", change, "difference of the two captions' cosines")
        overlap = neighbour_overlap(first[several], other)
        by_chance = overlap_by_chance(len(several))
        result.add(
            "text_text_neighbours", overlap, "shared nearest captions of two captions of a picture", by_chance
        )
    overlap = neighbour_overlap(images, first)
    result.add(
        "image_text_neighbours",
        overlap,
        "shared nearest neighbours of picture and caption",
        overlap_by_chance(n),
    )
    back = torch.tensor(
        [float(i == place) for i, place in enumerate((mirrored @ images.T).argmax(1).tolist())]
    )
    result.add("mirror_finds_picture", back, "the mirrored picture is nearest to the picture itself", 1 / n)
    cosine = (images * mirrored).sum(1)
    result.add("mirror_cosine", cosine, "cosine of a picture and its mirror image")
    result.worst["Changed most by mirroring"] = [
        card(pairs[i], pairs[i].captions[0], [f"cosine with its mirror image {cosine[i]:.3f}"])
        for i in cosine.argsort()[:WORST].tolist()
    ]


def neighbour_overlap(one: Tensor, other: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Share of the k nearest neighbours that two spaces have in common, for each row `(n,)`."""
    k = min(k, len(one) - 1)
    sets = []
    for rows in (one, other):
        scores = rows @ rows.T
        scores.fill_diagonal_(-torch.inf)
        sets.append(torch.zeros_like(scores).scatter_(1, scores.topk(k, dim=1).indices, 1.0))
    return (sets[0] * sets[1]).sum(1) / k


def overlap_by_chance(n: int, k: int = NEIGHBOURS) -> float:
    return min(k, n - 1) / (n - 1)
