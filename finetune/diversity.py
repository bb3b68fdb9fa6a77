"""What BLEU and CIDEr do not see: whether all captions are the same, and whether they name what is not there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune.ngrams import read_corpus


def diversity(captions: Sequence[str]) -> dict[str, float | int]:
    """How varied a set of tokenised captions is.

    The shares fall with the number of captions: compare sets of equal size only.

    Args:
        captions: One tokenised caption for each image.

    Returns:
        `distinct_captions`, `vocabulary` (different words), `mean_length` (words), and `distinct_1`, `distinct_2`:
        different n-grams as a share of all n-grams.

    Raises:
        ValueError: No captions.

    Reference:
        Li et al. 2016 (distinct-n).

    Example:
        >>> diversity(["a dog", "a cat"])["distinct_1"]
        0.75
    """
    if not captions:
        raise ValueError("no captions: expected at least one")
    corpus = read_corpus(captions, [()] * len(captions), most=2)
    totals = [int(counts.count.sum()) for counts in corpus.counts]
    return {
        "distinct_captions": len(set(captions)),
        "vocabulary": len(corpus.vocabulary),
        "mean_length": float(corpus.lengths.mean()),
        **{
            f"distinct_{n}": counts.grams / total if total else 0.0
            for n, (counts, total) in enumerate(zip(corpus.counts, totals, strict=True), 1)
        },
    }


def chair(
    captions: Sequence[str],
    objects: Sequence[Iterable[str]],
    synonyms: Mapping[str, str] | Iterable[str],
) -> dict[str, Any]:
    """CHAIR: objects that a caption names and that the picture does not show.

    Words that `synonyms` does not list are no objects, whatever they mean: the number depends on that list, and only
    results with the same list can be compared. Plurals in -s and -es are understood; longer names win (`hot dog` is no
    dog).

    Args:
        captions: One tokenised caption for each image.
        objects: What is really there, for each image, as object names or synonyms of them.
        synonyms: Word to object name; or object names alone.

    Returns:
        `chair_i` (hallucinated mentions as a share of mentions), `chair_s` (share of captions with one), `recall`
        (mentioned objects as a share of those there), `mentions`, `images`, and `hallucinated` (object: times).

    Raises:
        ValueError: Numbers of rows differ, no rows, or no object names.

    Reference:
        Rohrbach et al. 2018.

    Example:
        >>> chair(["a dog and two cats"], [["dog"]], ["dog", "cat"])["chair_i"]
        0.5
    """
    names = dict(synonyms) if isinstance(synonyms, Mapping) else {name: name for name in synonyms}
    names = {word.lower(): name for word, name in names.items()}
    if len(captions) != len(objects):
        raise ValueError(f"got {len(captions)} captions for {len(objects)} images: each needs exactly one")
    if not captions or not names:
        raise ValueError("CHAIR needs at least one caption and one object name")
    forms = {form: name for word, name in names.items() for form in (f"{word}es", f"{word}s", word)}
    pattern = re.compile(
        r"(?<!\S)(?:"
        + "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
        + r")(?!\S)"
    )
    mentions = wrong = sentences = found = there = 0
    hallucinated: dict[str, int] = {}
    for caption, row in zip(captions, objects, strict=True):
        truth = {forms.get(name.lower(), name) for name in row}
        named = [forms[word] for word in pattern.findall(caption.lower())]
        bad = [name for name in named if name not in truth]
        for name in bad:
            hallucinated[name] = hallucinated.get(name, 0) + 1
        mentions, wrong, sentences = mentions + len(named), wrong + len(bad), sentences + bool(bad)
        found, there = found + len(truth & set(named)), there + len(truth)
    return {
        "chair_i": wrong / mentions if mentions else 0.0,
        "chair_s": sentences / len(captions),
        "recall": found / there if there else 0.0,
        "mentions": mentions,
        "images": len(captions),
        "hallucinated": dict(sorted(hallucinated.items(), key=lambda entry: (-entry[1], entry[0]))),
    }
