"""Bootstrap intervals and the paired test, against theory and plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.intervals import bootstrap_interval, mean_of, paired_test, per_image, resample
from finetune.metrics import bleu, bleu_of, bleu_sums
from finetune.ngrams import read_corpus


def test_the_interval_of_a_mean_is_that_of_theory():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, 400)
    low, high = bootstrap_interval(per_image(values.tolist()), resamples=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap_interval(per_image(values.tolist()), resamples=50) == bootstrap_interval(
        per_image(values.tolist()), resamples=50
    )


def test_questions_of_one_picture_stay_together():
    """Forty equal answers about each of ten pictures are ten observations, not four hundred."""
    scores = [float(image % 2) for image in range(10) for _ in range(40)]
    images = [image for image in range(10) for _ in range(40)]
    together = bootstrap_interval(per_image(scores, images), resamples=2000)
    apart = bootstrap_interval(per_image(scores), resamples=2000)
    assert together[1] - together[0] > 4 * (apart[1] - apart[0])


def test_a_corpus_metric_is_resampled_as_if_its_texts_were():
    candidates = ["a dog on a beach", "two cats", "the red car"]
    references = [["a dog on the beach"], ["two cats sit", "cats"], ["a car that is red"]]
    sums = bleu_sums(read_corpus(candidates, references))
    assert bleu_of(sums.sum(axis=0)) == bleu(candidates, references)
    chosen = [0, 0, 2]
    assert bleu_of(sums[chosen].sum(axis=0)) == bleu(
        [candidates[image] for image in chosen], [references[image] for image in chosen]
    )
    assert set(resample(np.eye(3), 200, 0).sum(axis=1)) == {3.0}  # as many images as there are


def test_the_paired_test_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 3, 300)  # pictures differ far more than models do
    first, second = hard + rng.normal(0.3, 0.5, 300), hard + rng.normal(0, 0.5, 300)
    better = paired_test(per_image(first.tolist()), per_image(second.tolist()))
    assert better["p_value"] < 0.01
    assert 0 < better["low"] < better["difference"] < better["high"]
    assert better["difference"] == pytest.approx(first.mean() - second.mean())
    same = paired_test(per_image((hard + rng.normal(0, 0.5, 300)).tolist()), per_image(second.tolist()))
    assert same["p_value"] > 0.05
    equal = paired_test(per_image(first.tolist()), per_image(first.tolist()))
    assert (equal["difference"], equal["p_value"]) == (0, 1)


def test_bad_input():
    with pytest.raises(ValueError, match="3 scores for 2 images"):
        per_image([1.0, 2.0, 3.0], ["a", "b"])
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap_interval(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="level 95"):
        bootstrap_interval(np.ones((3, 2)), level=95)
    with pytest.raises(ValueError, match="same images"):
        paired_test(np.ones((3, 2)), np.ones((4, 2)), mean_of)
