"""Caption metrics, equal to coco-caption's: BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D.

All functions are pure and take *tokenised* texts (tokens joined by single spaces); `caption_metrics` tokenises raw
captions first and says how. Rows belong to images: `candidates[i]` is judged by `references[i]`. Each metric exists
for single images too, as what it sums over images (`*_each`, `bleu_sums`): intervals and tests resample that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune import ptb
from finetune.ngrams import Corpus, document_frequency, find, look_up, read_corpus

Ngrams = Counter[tuple[str, ...]]
OWN_REFERENCES = "references of this evaluation"


def ngrams(text: str, most: int = 4) -> Ngrams:
    """Counts of all n-grams of 1 to `most` tokens."""
    words = text.split()
    return Counter(
        tuple(words[start : start + n]) for n in range(1, most + 1) for start in range(len(words) - n + 1)
    )


def check_rows(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(candidates, str) or any(isinstance(row, str) for row in references):
        raise TypeError(
            "expected a list of candidates and, for each, a list of references; got a plain string"
        )
    if len(candidates) != len(references):
        raise ValueError(
            f"got {len(candidates)} candidates for {len(references)} images: each image needs exactly one"
        )
    if not candidates:
        raise ValueError("no captions to judge: expected at least one image")
    for number, row in enumerate(references):
        if not row:
            raise ValueError(f"image {number} has no reference caption")


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], most: int = 4) -> tuple[float, ...]:
    """Corpus BLEU-1 to BLEU-`most`, without smoothing.

    Counts are summed over the whole set before they are divided, so the score of a set is not the mean of the scores
    of its images. The reference length of an image is the closest one, the shorter of two equally close.

    Args:
        candidates: One tokenised caption for each image.
        references: The tokenised references of each image.
        most: The longest n-gram.

    Returns:
        Scores from 0 to 1 for n = 1, ..., `most`.

    Raises:
        ValueError: Numbers of rows differ, no rows, or an image without a reference.

    Reference:
        Papineni et al. 2002; the constants 1e-15 and 1e-9 and the tie rule are coco-caption's.

    Example:
        >>> round(bleu(["a dog on a beach"], [["a dog on the beach", "a dog"]])[0], 6)
        0.8
    """
    check_rows(candidates, references)
    return bleu_of(bleu_sums(read_corpus(candidates, references, most, shared=True)).sum(axis=0))


def bleu_sums(corpus: Corpus) -> np.ndarray:
    """What BLEU adds up over images: int64 `(images, 2 + 2 * most)`.

    Columns: length of the caption, length of the closest reference, n-grams written for n = 1, ..., n-grams correct.
    """
    images, most = corpus.images, len(corpus.counts)
    mine, theirs = corpus.lengths[:images], corpus.lengths[images:]
    image = corpus.image[images:]
    # The closest reference length, the shorter of two equally close: the first one when sorted so.
    order = np.lexsort((theirs, np.abs(theirs - mine[image]), image))
    closest = theirs[order][np.searchsorted(image[order], np.arange(images))]
    columns = [mine, closest, *(np.maximum(0, mine - n) for n in range(most))]
    for counts in corpus.counts:
        keys = corpus.image[counts.text] * max(counts.grams, 1) + counts.gram
        own = counts.text < images
        allowed, number = np.unique(keys[~own], return_inverse=True)
        maxima = np.zeros(len(allowed), np.int64)
        np.maximum.at(maxima, number.reshape(-1), counts.count[~own])
        present, places = find(allowed, keys[own])
        clipped = np.minimum(counts.count[own][present], maxima[places])
        columns.append(np.bincount(counts.text[own][present], clipped, images).astype(np.int64))
    return np.stack(columns, axis=1)


def bleu_of(sums: np.ndarray) -> tuple[float, ...]:
    """BLEU-1, BLEU-2, ... from the sums of `bleu_sums` over a set."""
    tiny, small = 1e-15, 1e-9
    candidate_length, reference_length, *rest = sums.tolist()
    most = len(rest) // 2
    scores, product = [], 1.0
    for n in range(most):
        product *= (rest[most + n] + tiny) / (rest[n] + small)
        scores.append(product ** (1 / (n + 1)))
    ratio = (candidate_length + tiny) / (reference_length + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return tuple(score * brevity for score in scores)


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L over the images, with beta = 1.2.

    Precision and recall are each the best over the references, which may be two different ones: higher than the
    usual F of one reference.

    Args:
        candidates: One tokenised caption for each image.
        references: The tokenised references of each image.

    Returns:
        A score from 0 to 1.

    Raises:
        ValueError: As for `bleu`.

    Reference:
        Lin 2004, in coco-caption's variant.
    """
    each = rouge_l_each(candidates, references)
    return sum(each) / len(each)


def rouge_l_each(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of each image; see `rouge_l`."""
    check_rows(candidates, references)
    beta2 = 1.2**2
    scores = []
    for candidate, row in zip(candidates, references, strict=True):
        words = candidate.split(" ")  # an empty caption counts as one (empty) token, as in coco-caption
        precision = recall = 0.0
        places: dict[str, int] = {}
        for place, word in enumerate(words):
            places[word] = places.get(word, 0) | 1 << place
        for reference in row:
            others = reference.split(" ")
            common = longest_common(places, len(words), others)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(others))
        both = precision and recall
        scores.append((1 + beta2) * precision * recall / (recall + beta2 * precision) if both else 0.0)
    return scores


def longest_common(places: Mapping[str, int], length: int, others: Sequence[str]) -> int:
    """Length of the longest common subsequence of two texts, a whole column of the table in one integer.

    Args:
        places: Each word of the first text, with a bit for each place where it stands.
        length: Words of the first text.
        others: The second text.

    Reference:
        Hyyro 2004, "Bit-parallel LCS-length computation revisited".
    """
    free = (1 << length) - 1  # a bit is cleared where the table steps up by one
    for word in others:
        hit = free & places.get(word, 0)
        if hit:
            free = (free + hit) | (free - hit)
    return length - (free & ((1 << length) - 1)).bit_count()


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images' references each n-gram occurs.

    Attributes:
        counts: Images by n-gram.
        images: Images counted.
        source: Where they come from, for the result file.
    """

    counts: Mapping[tuple[str, ...], int]
    images: int
    source: str = OWN_REFERENCES

    @classmethod
    def of(cls, references: Sequence[Sequence[str]], source: str = OWN_REFERENCES) -> DocumentFrequencies:
        """Count over tokenised references, one row an image."""
        counts: Ngrams = Counter()
        for row in references:
            counts.update({gram for reference in row for gram in ngrams(reference)})
        return cls(counts, len(references), source)


def cider(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> tuple[float, list[float]]:
    """CIDEr-D: tf-idf weighted n-gram agreement with the references.

    The value depends on the set: with the document frequencies of the evaluation itself (the convention for
    published numbers), a subset of 100 images scores differently from all of them, and one image alone scores 0. A
    reward in training needs fixed frequencies instead, those of the training captions.

    Args:
        candidates: One tokenised caption for each image.
        references: The tokenised references of each image.
        frequencies: Document frequencies; those of `references` when None.

    Returns:
        The mean over the images (around 1 for human captions of COCO) and the score of each image.

    Raises:
        ValueError: As for `bleu`.

    Reference:
        Vedantam et al. 2015, as coco-caption computes it: raw counts, clipping, sigma = 6 on the difference of the
        numbers of bigrams, mean over n = 1 to 4 and over references, times 10.

    Example:
        >>> mean, each = cider(["a dog", "two cats"], [["a dog"], ["two cats"]])
        >>> round(mean, 3)
        5.0
    """
    check_rows(candidates, references)
    each = cider_each(read_corpus(candidates, references), frequencies)
    return float(each.mean()), each.tolist()


def cider_each(corpus: Corpus, frequencies: DocumentFrequencies | None = None) -> np.ndarray:
    """CIDEr-D of each image, float64 `(images,)`; see `cider`."""
    images, texts = corpus.images, len(corpus.lengths)
    log_images = math.log(images if frequencies is None else frequencies.images)
    bigrams = np.maximum(0, corpus.lengths - 1)
    gap = bigrams[images:] - bigrams[corpus.image[images:]]
    penalty = np.exp(-(gap**2) / (2 * 6.0**2))  # (references,)
    total = np.zeros(texts - images)
    for n, counts in enumerate(corpus.counts[:4], 1):
        found = (
            document_frequency(corpus, n) if frequencies is None else look_up(corpus, n, frequencies.counts)
        )
        idf = log_images - np.log(np.maximum(1, found))  # (grams,)
        weight = counts.count * idf[counts.gram]
        norm = np.sqrt(np.bincount(counts.text, weight**2, texts))
        keys = corpus.image[counts.text] * max(counts.grams, 1) + counts.gram
        own = counts.text < images  # a candidate's keys are sorted, since there is one for each image
        present, places = find(keys[own], keys[~own])
        theirs = weight[~own][present]
        product = np.bincount(
            counts.text[~own][present] - images, np.minimum(weight[own][places], theirs) * theirs, len(total)
        )
        lengths = norm[corpus.image[images:]] * norm[images:]  # where one is 0, so is the product
        total += penalty * product / np.where(lengths > 0, lengths, 1.0)
    rows = np.bincount(corpus.image[images:], minlength=images)
    return 10 * np.bincount(corpus.image[images:], total, images) / (4 * rows)


def caption_metrics(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of raw captions.

    Args:
        candidates: One caption for each image, as written.
        references: The references of each image, as written.

    Returns:
        `bleu1` ... `bleu4`, `rouge_l`, `cider`.

    Raises:
        ValueError: As for `bleu`.
    """
    check_rows(candidates, references)
    written = [ptb.tokenize(candidate) for candidate in candidates]
    return score_tokenised(written, [[ptb.tokenize(reference) for reference in row] for row in references])


def score_tokenised(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> dict[str, float]:
    """`caption_metrics` of texts that are tokenised already; the n-grams are counted once for all of them."""
    check_rows(candidates, references)
    corpus = read_corpus(candidates, references)
    scores = bleu_of(bleu_sums(corpus).sum(axis=0))
    return {
        **{f"bleu{n}": score for n, score in enumerate(scores, 1)},
        "rouge_l": rouge_l(candidates, references),
        "cider": float(cider_each(corpus, frequencies).mean()),
    }
