"""`pairstream explain consistency`: do encoder, captioner and VQA model say the same of the same pictures?

Each check has a value and what it would be by chance; where chance has no formula, a control with captions shuffled
among the pictures stands for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.samples import index_shards, read_sample
from data.scenes.language import article
from data.scenes.vocabulary import BACKGROUNDS, alike, kinds
from data.tar import ShardReader
from explain.edits import deny, mirror, swap_colours, swap_sides
from explain.tasks import load
from pairstream.progress import ProgressBar
from pairstream.report import Card
from pretrain.encoder import Encoder, load_encoder
from retrieval.metrics import retrieval_ranks

NEIGHBOURS = 10
WORST = 12  # cases of each check that are shown


@dataclass(frozen=True)
class Pair:
    """One picture with what is known of it."""

    key: str
    file: bytes
    captions: list[str]
    objects: list[str] | None


@dataclass
class Consistency:
    """What was found.

    Attributes:
        numbers: For JSON: `checks` by name (`value`, `chance`, `count`, `says`), `left_out` (check: reason),
            `controls`, `chair`, and what was compared.
        worst: The worst cases by heading, worst first.
    """

    numbers: dict[str, Any]
    worst: dict[str, list[Card]] = field(default_factory=dict)

    def add(
        self, name: str, values: Sequence[float] | Tensor, says: str, chance: float | None = None
    ) -> None:
        """One check: the mean of values over its cases."""
        row = torch.as_tensor(values, dtype=torch.float64)
        if len(row) == 0:
            self.leave_out(name, "no picture or caption that it could be asked of")
            return
        self.numbers["checks"][name] = {
            "value": float(row.mean()),
            "chance": chance,
            "count": len(row),
            "says": says,
        }

    def leave_out(self, name: str, reason: str) -> None:
        self.numbers["left_out"][name] = reason


def check_consistency(
    model: str | Encoder,
    data: str | Sequence[str],
    *,
    captioner: Path | Any | None = None,
    vqa: Path | Any | None = None,
    limit: int = 200,
    batch_size: int = 32,
    pretrained: str | None = None,
    seed: int = 0,
    device: str = "auto",
    show: bool = False,
) -> Consistency:
    """Run all checks that the given models and data allow; the others are listed with the reason.

    Args:
        model: The dual encoder, or what `load_encoder` takes.
        data: Shards of pictures with captions.
        captioner: A captioner or its folder.
        vqa: A VQA model or its folder.
        limit: Only the first so many pictures.
        batch_size: Pictures at a time.
        pretrained: open_clip's tag of weights, for a name.
        seed: Of shuffles and probes.
        device: auto, cpu, cuda or cuda:N.
        show: Print progress.

    Returns:
        The numbers and the worst cases.

    Raises:
        ValueError: Fewer than two pictures with captions, or a model for another task.
        FileNotFoundError: No task model in a folder.
    """
    pairs = read_pairs(data, limit)
    encoder = load_encoder(model, pretrained=pretrained, device=device) if isinstance(model, str) else model
    writer = None if captioner is None else load(captioner, device, "caption")
    asked = None if vqa is None else load(vqa, device, "vqa")
    result = Consistency(
        {
            "model": encoder.name,
            "captioner": None if captioner is None else str(getattr(captioner, "name", captioner)),
            "vqa": None if vqa is None else str(getattr(vqa, "name", vqa)),
            "pictures": len(pairs),
            "seed": seed,
            "checks": {},
            "controls": {},
            "left_out": {},
            "chair": None,
        }
    )
    rng = random.Random(seed)
    pixels = torch.stack([encoder.preprocess(pair.file) for pair in pairs])
    with ProgressBar("consistency", 3, show=show) as bar:
        images = in_batches(encoder.encode_images, pixels, batch_size)
        mirrored = in_batches(encoder.encode_images, pixels.flip(-1), batch_size)
        encoder_checks(result, encoder, pairs, images, mirrored, rng)
        bar.advance(note="encoder")
        written = None
        if writer is None:
            for name in ("caption_finds_picture@1", "caption_gain", "caption_mirror_cosine", "chair"):
                result.leave_out(name, "no --captioner was given")
        else:
            written = caption_checks(result, encoder, writer, pairs, images, batch_size, rng)
        bar.advance(note="captioner")
        if asked is None:
            result.leave_out("vqa", "no --vqa was given")
        else:
            vqa_checks(result, asked, pairs, written, batch_size, rng)
        bar.advance(note="vqa")
    return result


def read_pairs(data: str | Sequence[str], limit: int) -> list[Pair]:
    """The first pictures with captions.

    Raises:
        ValueError: Fewer than two.
    """
    reader, pairs, number = ShardReader(), [], 0
    for index in index_shards(data):
        for place in range(len(index)):
            if len(pairs) == limit:
                return pairs
            sample = read_sample(index, place, number, reader)
            number += 1
            captions = sample.captions()
            names = shown_objects(sample.record)
            if captions:
                pairs.append(Pair(sample.key, sample.image, captions, names))
    if len(pairs) < 2:
        raise ValueError(f"{data}: {len(pairs)} pictures with captions, expected at least two to compare")
    return pairs


def shown_objects(record: dict[str, Any]) -> list[str] | None:
    """What a record says there is, with what its background shows; None where it says nothing of objects."""
    if record.get("objects") is None:
        return None
    background = (record.get("background") or {}).get("name")
    behind = [name for each in BACKGROUNDS if each.name == background for name in each.shows]
    return [item["name"] for item in record["objects"]] + behind


def object_tokens(text: str, names: dict[str, str]) -> str:
    """A tokenised caption in which an object's name that serves as a colour (`an orange heart`) is left out."""
    from finetune import ptb

    words = ptb.tokenize(text).split()
    doubtful = {colour for kind in kinds().values() for colour in kind.looks} & set(names)
    heads = {name.split()[0] for name in names}
    kept = [
        word
        for word, after in zip(words, [*words[1:], ""], strict=True)
        if not (word in doubtful and (after in heads or after.removesuffix("s") in heads))
    ]
    return " ".join(kept)


def in_batches(encode: Callable[[Any], Tensor], rows: Any, size: int) -> Tensor:
    """Rows of a model, some at a time, on the CPU."""
    return torch.cat([encode(rows[start : start + size]).cpu() for start in range(0, len(rows), size)])


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


def caption_checks(
    result: Consistency,
    encoder: Encoder,
    writer: Any,
    pairs: Sequence[Pair],
    images: Tensor,
    batch_size: int,
    rng: random.Random,
) -> list[str]:
    """Picture to caption and back, mirrored captions, and invented objects.

    Returns:
        The captions.
    """
    n = len(pairs)
    seen = torch.stack([writer.encoder.preprocess(pair.file) for pair in pairs])
    written = write(writer, seen, batch_size)
    rows = in_batches(encoder.encode_texts, written, 256)
    ranks = own_ranks(images, rows, torch.arange(n))
    result.add(
        "caption_finds_picture@1", (ranks < 1).double(), "a picture is first for its own caption", 1 / n
    )
    mean_inverse = float((1 / torch.arange(1, n + 1, dtype=torch.float64)).mean())
    result.add(
        "caption_finds_picture_mrr", 1 / (1 + ranks), "mean of 1 / rank of the own picture", mean_inverse
    )
    shuffled = torch.tensor(rng.sample(range(n), n))
    result.numbers["controls"]["shuffled_captions"] = at_chance(own_ranks(images, rows, shuffled))
    own = (images * rows).sum(1)
    gain = own - (images[shuffled] * rows).sum(1)
    result.add("caption_gain", gain, "cosine with the own caption minus that with another's", 0.0)
    order = ranks.argsort(descending=True)[:WORST].tolist()
    nearest = (rows @ images.T).argmax(1).tolist()
    result.worst["Captions that do not find their picture"] = [
        card(
            pairs[i],
            written[i],
            [f"rank {ranks[i] + 1:.0f} of {n}", f"finds: {pairs[nearest[i]].captions[0]}"],
        )
        for i in order
        if ranks[i] >= 1
    ]
    turned = write(writer, seen.flip(-1), batch_size)
    expected = in_batches(encoder.encode_texts, [mirror(text) for text in written], 256)
    cosine = (in_batches(encoder.encode_texts, turned, 256) * expected).sum(1)
    result.add(
        "caption_mirror_cosine", cosine, "cosine of the mirrored picture's caption with the mirrored caption"
    )
    if all(pair.objects is None for pair in pairs):
        result.leave_out("chair", "the data do not say which objects there are")
    else:
        chair_check(result, pairs, written)
    return written


def write(writer: Any, images: Tensor, batch_size: int) -> list[str]:
    """Captions of pictures, a batch at a time."""
    return [text for part in images.split(batch_size) for text in writer.caption(list(part))]


def own_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """Expected rank from 0 of each text's picture, ties shared, float64 `(n,)`."""
    return retrieval_ranks(images, texts, owner)[1].best().expected().double() - 1


def at_chance(ranks: Tensor) -> dict[str, Any]:
    """Whether ranks are those of a random order: the mean rank within four standard errors of the middle."""
    n = len(ranks)
    middle, error = (n - 1) / 2, float(np.sqrt((n**2 - 1) / 12 / n))
    mean = float(ranks.mean())
    return {
        "recall@1": float((ranks < 1).double().mean()),
        "mean_rank": mean + 1,
        "expected_mean_rank": middle + 1,
        "at_chance": abs(mean - middle) <= 4 * error,
    }


def chair_check(result: Consistency, pairs: Sequence[Pair], written: Sequence[str]) -> None:
    """CHAIR over the kinds of scenes, or over the names that the data's objects have."""
    from finetune.diversity import chair

    names = object_names(pairs)
    known = [i for i, pair in enumerate(pairs) if pair.objects is not None]
    tokens = [object_tokens(written[i], names) for i in known]
    found = chair(tokens, [pairs[i].objects or [] for i in known], names)
    result.numbers["chair"] = found
    each = [chair([text], [pairs[i].objects or []], names) for text, i in zip(tokens, known, strict=True)]
    bad = sorted(range(len(each)), key=lambda j: -sum(each[j]["hallucinated"].values()))
    result.worst["Objects that are not there"] = [
        card(pairs[known[j]], written[known[j]], [f"not there: {', '.join(each[j]['hallucinated'])}"])
        for j in bad[:WORST]
        if each[j]["hallucinated"]
    ]


def object_names(pairs: Sequence[Pair]) -> dict[str, str]:
    """Word to object: all words for the kinds of scenes, where the objects are such, else their own names."""
    there = {name for pair in pairs for name in pair.objects or ()}
    table = kinds()
    if there <= set(table):
        return {word: kind.name for kind in table.values() for word in kind.names}
    return {name: name for name in there}


def vqa_checks(
    result: Consistency,
    asked: Any,
    pairs: Sequence[Pair],
    written: Sequence[str] | None,
    batch_size: int,
    rng: random.Random,
) -> None:
    """Yes/no questions about what captions name: agreement, paraphrases, mirrored pictures."""
    from finetune.diversity import chair

    names = object_names(pairs)
    if not names:
        result.leave_out("vqa", "the data do not say which objects there are, so no question could be made")
        return
    texts = written if written is not None else [pair.captions[0] for pair in pairs]
    source = "the captioner's captions" if written is not None else "the data's first captions"
    said = [  # what a caption names is what CHAIR finds wrong of it in a picture of nothing
        list(chair([object_tokens(text, names)], [[]], names)["hallucinated"]) for text in texts
    ]
    every = sorted(set(names.values()))
    cases: list[tuple[int, str, bool]] = []
    for i, here in enumerate(said):
        cases += [(i, name, True) for name in here]
        free = [name for name in every if not any(alike_names(name, other) for other in here)]
        cases += [(i, name, False) for name in rng.sample(free, min(len(here), len(free)))]
    if not any(named for _, _, named in cases):
        result.leave_out("vqa", f"{source} name no object")
        return
    seen = torch.stack([asked.encoder.preprocess(pair.file) for pair in pairs])

    def ask(form: str, images: Tensor, of: Callable[[int], int] = lambda i: i) -> list[str]:
        found = []
        for start in range(0, len(cases), batch_size):
            part = cases[start : start + batch_size]
            found += asked.answer(
                [images[of(i)] for i, _, _ in part], [form.format(article(name)) for _, name, _ in part]
            )
        return [answer.strip().lower() for answer in found]

    answers = ask("is there {} in the picture?", seen)
    again = ask("can you see {}?", seen)
    turned = ask("is there {} in the picture?", seen.flip(-1))
    order = rng.sample(range(len(pairs)), len(pairs))
    elsewhere = ask("is there {} in the picture?", seen, lambda i: order[i])
    named = [j for j, case in enumerate(cases) if case[2]]
    right = [float(answers[j] == ("yes" if cases[j][2] else "no")) for j in range(len(cases))]
    result.numbers["questions_from"] = source
    result.add(
        "vqa_agreement",
        right,
        "answers agree with the caption: yes to what it names, no to as much else",
        0.5,
    )
    denied = [float(answers[j] != "yes") for j in named]
    result.add("vqa_contradiction", denied, "answers deny what the caption names")
    control = [float(elsewhere[j] == ("yes" if cases[j][2] else "no")) for j in range(len(cases))]
    result.numbers["controls"]["vqa_agreement_shuffled_pictures"] = float(np.mean(control))
    same = [float(a == b) for a, b in zip(answers, again, strict=True)]
    result.add("vqa_paraphrase_same", same, "the same answer to the question in other words")
    result.add(
        "vqa_mirror_same",
        [float(a == b) for a, b in zip(answers, turned, strict=True)],
        "the same answer on the mirrored picture",
    )
    result.worst["Answers that deny the caption"] = [
        card(pairs[cases[j][0]], f"{article(cases[j][1])}? {answers[j]}", [f"caption: {texts[cases[j][0]]}"])
        for j in named
        if answers[j] != "yes"
    ][:WORST]


def alike_names(one: str, other: str) -> bool:
    """Whether two names could mean one thing."""
    return alike(one, other) if {one, other} <= set(kinds()) else one == other


def card(pair: Pair, title: str, lines: list[str]) -> Card:
    """A picture of the report."""
    from finetune.tasks import shrink

    return Card(shrink(pair.file), title, lines)
