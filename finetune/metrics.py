"""Caption metrics, equal to coco-caption's: BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D.

All functions are pure and take *tokenised* texts (tokens joined by single spaces); `caption_metrics` tokenises raw
captions first and says how. Rows belong to images: `candidates[i]` is judged by `references[i]`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune import ptb

Ngrams = Counter[tuple[str, ...]]


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
    tiny, small = 1e-15, 1e-9
    guessed, correct = [0] * most, [0] * most
    candidate_length = reference_length = 0
    for candidate, row in zip(candidates, references, strict=True):
        length = len(candidate.split())
        candidate_length += length
        lengths = [len(reference.split()) for reference in row]
        reference_length += min((abs(other - length), other) for other in lengths)[1]
        allowed: Ngrams = Counter()
        for reference in row:
            allowed |= ngrams(reference, most)
        for n in range(most):
            guessed[n] += max(0, length - n)
        for gram, count in ngrams(candidate, most).items():
            correct[len(gram) - 1] += min(allowed.get(gram, 0), count)
    scores, product = [], 1.0
    for n in range(most):
        product *= (correct[n] + tiny) / (guessed[n] + small)
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
    check_rows(candidates, references)
    beta2 = 1.2**2
    total = 0.0
    for candidate, row in zip(candidates, references, strict=True):
        words = candidate.split(" ")  # an empty caption counts as one (empty) token, as in coco-caption
        precision = recall = 0.0
        for reference in row:
            others = reference.split(" ")
            common = longest_common(words, others)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(others))
        if precision and recall:
            total += (1 + beta2) * precision * recall / (recall + beta2 * precision)
    return total / len(candidates)


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, 1):
            above = best[column]
            best[column] = diagonal + 1 if word == other else max(above, best[column - 1])
            diagonal = above
    return best[-1]


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
    source: str = "references of this evaluation"

    @classmethod
    def of(
        cls, references: Sequence[Sequence[str]], source: str = "references of this evaluation"
    ) -> DocumentFrequencies:
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
    frequencies = frequencies or DocumentFrequencies.of(references)
    log_images = math.log(frequencies.images)
    idf: dict[tuple[str, ...], float] = {}

    def vector(text: str) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{}, {}, {}, {}]
        bigrams = 0
        for gram, count in ngrams(text).items():
            if gram not in idf:
                idf[gram] = log_images - math.log(max(1.0, frequencies.counts.get(gram, 0)))
            weights[len(gram) - 1][gram] = count * idf[gram]
            bigrams += count if len(gram) == 2 else 0
        norms = [math.sqrt(sum(weight * weight for weight in part.values())) for part in weights]
        return weights, norms, bigrams

    scores = []
    for candidate, row in zip(candidates, references, strict=True):
        mine, my_norms, my_bigrams = vector(candidate)
        total = 0.0
        for reference in row:
            theirs, their_norms, their_bigrams = vector(reference)
            penalty = math.exp(-((my_bigrams - their_bigrams) ** 2) / (2 * 6.0**2))
            for part, other, my_norm, their_norm in zip(mine, theirs, my_norms, their_norms, strict=True):
                product = sum(
                    min(weight, other[gram]) * other[gram] for gram, weight in part.items() if gram in other
                )
                if my_norm and their_norm:
                    product /= my_norm * their_norm
                total += penalty * product
        scores.append(10 * total / (4 * len(row)))
    return sum(scores) / len(scores), scores


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
    expected = [[ptb.tokenize(reference) for reference in row] for row in references]
    scores = bleu(written, expected)
    return {
        **{f"bleu{n}": score for n, score in enumerate(scores, 1)},
        "rouge_l": rouge_l(written, expected),
        "cider": cider(written, expected)[0],
    }
