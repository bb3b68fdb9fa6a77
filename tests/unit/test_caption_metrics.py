"""Caption metrics on cases small enough to work out by hand."""

from __future__ import annotations

import math

import pytest

from finetune.metrics import DocumentFrequencies, bleu, caption_metrics, cider, ngrams, rouge_l


def test_bleu_by_hand():
    # 5 tokens, "a" clipped to one: 4 of 5 unigrams, 2 of 4 bigrams ("a dog", "dog on").
    scores = bleu(["a dog on a beach"], [["a dog on the beach"]], most=2)
    assert scores[0] == pytest.approx(4 / 5)
    assert scores[1] == pytest.approx(math.sqrt(4 / 5 * 2 / 4))


def test_bleu_takes_the_closest_length_and_the_shorter_of_two():
    # Length 3; references 2 and 4 are equally close, 2 is taken: no brevity penalty.
    assert bleu(["a b c"], [["a b", "a b c d"]], most=1)[0] == pytest.approx(1.0)
    assert bleu(["a b c"], [["a b c d"]], most=1)[0] == pytest.approx(math.exp(1 - 4 / 3))


def test_rouge_takes_precision_and_recall_from_different_references():
    # Precision 2/2 from the first, recall 1/1 from the second.
    assert rouge_l(["a b"], [["a b c d", "b"]]) == pytest.approx(1.0)
    # Longest common subsequence 2 ("a c"): P = 2/3, R = 2/2.
    p, r = 2 / 3, 1.0
    assert rouge_l(["a b c"], [["a c"]]) == pytest.approx((1 + 1.44) * p * r / (r + 1.44 * p))


def test_cider_of_one_image_is_zero_and_depends_on_the_set():
    assert cider(["a dog"], [["a dog"]])[0] == 0.0
    fixed = DocumentFrequencies.of([["a dog"], ["a cat"], ["two birds fly"]], "training captions")
    assert cider(["a dog"], [["a dog"]], fixed)[0] == pytest.approx(5.0)  # only n = 1 and 2 exist
    assert fixed.source == "training captions"


def test_cider_is_the_loop():
    """Words that are repeated are clipped to the reference's weight, and other lengths are punished."""
    candidates = ["a dog a dog a dog runs", "two cats", "a bird in the blue sky"]
    references = [
        ["a dog runs home", "the dog"],
        ["two cats sleep on the old red sofa"],
        ["a bird", "blue sky"],
    ]
    grams = [[ngrams(text) for text in row] for row in references]
    seen = [set().union(*row) for row in grams]

    def weights(counts, n):
        return {
            gram: count * (math.log(3) - math.log(max(1, sum(gram in one for one in seen))))
            for gram, count in counts.items()
            if len(gram) == n
        }

    for number, found in enumerate(cider(candidates, references)[1]):
        mine, total = ngrams(candidates[number]), 0.0
        for text, theirs in zip(references[number], grams[number], strict=True):
            gap = len(candidates[number].split()) - len(text.split())
            for n in range(1, 5):
                one, other = weights(mine, n), weights(theirs, n)
                length = math.dist(one.values(), [0] * len(one)) * math.dist(other.values(), [0] * len(other))
                product = sum(min(one.get(gram, 0), value) * value for gram, value in other.items())
                total += math.exp(-(gap**2) / 72) * product / length if length else 0.0
        assert found == pytest.approx(10 * total / 4 / len(references[number]))
        assert found > 0


def test_caption_metrics_tokenise():
    raw = caption_metrics(["A dog.", "Two cats!"], [["a dog"], ["two cats"]])
    assert raw["cider"] == pytest.approx(5.0)
    assert raw["bleu1"] == pytest.approx(1.0)
    assert set(raw) == {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"}


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider])
def test_bad_input(metric):
    with pytest.raises(ValueError, match="2 candidates for 1 images"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="image 1 has no reference"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="no captions to judge"):
        metric([], [])
    with pytest.raises(TypeError, match="plain string"):
        metric(["a"], ["a"])
