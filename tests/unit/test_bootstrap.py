"""Intervals cover as often as they say, captions stay with their image, and the paired test is calibrated."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval.bootstrap import bootstrap_intervals, draws, paired_difference, weighted_medians


def clustered(rng, images, captions=5, shift=0.0):
    """Hits of captions that agree within an image."""
    ease = rng.normal(shift, 1.5, images).repeat(captions)
    return (rng.logistic(size=images * captions) < ease).astype(float), np.arange(images).repeat(captions)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = clustered(rng, 400000)[0].mean()
    inside = {"clusters": 0, "queries": 0}
    for trial in range(400):
        hits, image = clustered(rng, 100)
        units = {"clusters": image, "queries": np.arange(len(image))} if trial < 200 else {"clusters": image}
        for name, unit in units.items():
            found = bootstrap_intervals({"hit": hits}, unit, resamples=200, seed=trial)["hit"]
            inside[name] += found.low <= truth <= found.high
    assert 0.92 < inside["clusters"] / 400 < 0.975
    assert inside["queries"] / 200 < 0.9  # captions taken as independent: far too sure of itself


def test_a_resample_keeps_the_captions_of_an_image_together():
    image = np.array([7, 7, 7, 9, 30, 30])  # any numbers name the images
    values = {"mean": np.array([1.0, 1, 1, 0, 0, 0])}
    rows = np.concatenate(list(draws(3, 300, seed=4)))
    assert (rows.sum(1) == 3).all()
    expected = rows @ [3, 0, 0] / (rows @ [3, 1, 2])
    found = bootstrap_intervals(values, image, resamples=300, seed=4)["mean"]
    assert found.value == 0.5
    assert (found.low, found.high) == tuple(np.quantile(expected, [0.025, 0.975]))


def test_medians_equal_numpy_on_repeated_queries():
    rng = np.random.default_rng(1)
    values, weights = np.sort(rng.integers(1, 30, 25).astype(float)), rng.integers(0, 4, (50, 25))
    expected = [np.median(values.repeat(row)) for row in weights]
    assert weighted_medians(values, weights.astype(float)).tolist() == expected
    found = bootstrap_intervals({"median_rank": values}, np.arange(25))["median_rank"]
    assert found.value == np.median(values)
    assert found.low <= found.value <= found.high


def test_the_paired_test_is_calibrated_and_sees_a_real_difference():
    rng = np.random.default_rng(2)
    small = 0
    for trial in range(200):
        hits, image = clustered(rng, 80)
        other = np.where(rng.random(len(hits)) < 0.3, rng.permutation(hits), hits)  # no better, no worse
        swap = rng.random(80)[image] < 0.5
        a, b = np.where(swap, hits, other), np.where(swap, other, hits)
        small += paired_difference({"hit": a}, {"hit": b}, image, resamples=200, seed=trial)["hit"].p < 0.1
    assert 0.04 < small / 200 < 0.16
    hits, image = clustered(rng, 200)
    better = np.maximum(hits, rng.random(len(hits)) < 0.1)
    found = paired_difference({"hit": hits}, {"hit": better}, image, resamples=2000)["hit"]
    assert found.p == pytest.approx(1 / 2001)
    assert found.low > 0
    assert found.difference == pytest.approx(better.mean() - hits.mean())
    back = paired_difference({"hit": better}, {"hit": hits}, image, resamples=2000)["hit"]
    assert (back.difference, back.high, back.p) == pytest.approx((-found.difference, -found.low, found.p))


def test_equal_models_do_not_differ():
    hits, image = clustered(np.random.default_rng(3), 50)
    found = paired_difference({"hit": hits}, {"hit": hits.copy()}, image, resamples=100)["hit"]
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, r"level is a share in \(0, 1\), got 1.0"),
        ({"resamples": 10}, "resamples must be at least 100, got 10"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals({"a": np.ones(3)}, np.arange(3), **options)


def test_lengths_and_names_must_fit():
    with pytest.raises(ValueError, match="a: expected one value for each of 4 queries"):
        bootstrap_intervals({"a": np.ones(3)}, np.arange(4))
    with pytest.raises(ValueError, match=r"expected the same numbers of both, got \['a'\] and \['b'\]"):
        paired_difference({"a": np.ones(3)}, {"b": np.ones(3)}, np.arange(3))
