"""Consistency of captioner and VQA model with the encoder, with each other, and with what is known to be there."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.scenes.language import article
from data.scenes.vocabulary import alike, kinds
from explain.edits import mirror
from explain.findings import WORST, Consistency, Pair, at_chance, card, in_batches, own_ranks
from pretrain.encoder import Encoder


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
