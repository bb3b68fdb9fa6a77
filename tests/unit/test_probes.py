"""Probes against scikit-learn on its digits, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from pretrain.encoder import build_encoder
from pretrain.recipe_model import TowersModel
from retrieval.probes import (
    COARSE,
    few_shot_probe,
    fit_probe,
    image_features,
    knn_probe,
    linear_probe,
    search_weight,
)


@pytest.fixture(scope="module")
def digits():
    rows, labels = load_digits(return_X_y=True)
    rows = (rows / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(rows))
    rows, labels = rows[order], labels[order]
    return rows[:500], labels[:500], rows[500:1000], labels[500:1000]


@pytest.mark.parametrize("l2", [0.1, 10.0])
def test_the_fit_is_scikit_learns(digits, l2):
    x, y, test, target = digits
    ours = fit_probe(torch.from_numpy(x), torch.from_numpy(y), 10, l2)
    theirs = LogisticRegression(C=1 / l2, max_iter=1000, tol=1e-6).fit(x, y)
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=2e-2)
    accuracy = ours.accuracy(torch.from_numpy(test), torch.from_numpy(target))
    assert accuracy == pytest.approx(theirs.score(test, target), abs=0.0021)  # one picture of 500


def test_the_protocol_on_digits(digits):
    got = linear_probe(*digits, 10, iterations=40)
    assert got["accuracy"] > 0.92
    assert not got["at_edge"]
    assert got["val_accuracy"] == max(got["searched"].values())
    x, y, test, target = digits
    split = linear_probe(
        x[:400], y[:400], test, target, 10, val_rows=x[400:], val_labels=y[400:], iterations=40
    )
    refit = fit_probe(torch.from_numpy(x), torch.from_numpy(y), 10, split["l2"], iterations=40)
    assert split["accuracy"] == refit.accuracy(torch.from_numpy(test), torch.from_numpy(target))


def test_the_search_finds_a_peak_in_steps_of_an_eighth_decade():
    peak = 10 ** (-2 + 3 / 8)
    best, found = search_weight(lambda weight: -abs(np.log10(weight / peak)))
    assert np.log10(best / peak) == pytest.approx(0, abs=1e-6)
    assert len(found) < 20
    flat, _ = search_weight(lambda weight: 0.5)
    assert flat == max(COARSE)  # of equals the simplest probe


def test_neighbours_are_scikit_learns(digits):
    x, y, test, target = digits
    theirs = KNeighborsClassifier(1, metric="cosine").fit(x, y).score(test, target)
    assert knn_probe(x, y, test, target, 10, k=1)["accuracy"] == pytest.approx(theirs, abs=1e-9)
    assert knn_probe(x, y, test, target, 10, k=10, block=70) == knn_probe(x, y, test, target, 10, k=10)
    constant = np.ones((20, 3), dtype=np.float32)
    labels = np.arange(20) % 4
    got = knn_probe(constant, labels, constant, labels, 4, k=20, temperature=None)
    assert got["accuracy"] == pytest.approx(0.25)  # equal votes are shared


def test_more_shots_are_better(digits):
    got = few_shot_probe(*digits, 10, shots=(1, 8), draws=3)
    assert got["8"]["accuracy"] > got["1"]["accuracy"] + 0.1
    assert got == few_shot_probe(*digits, 10, shots=(1, 8), draws=3)
    assert got["1"]["std"] > 0


def test_features_before_the_projection(tiny_models):
    encoder = build_encoder(TowersModel.model_validate(tiny_models["vit"]), device="cpu")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features = image_features(encoder, images)
    projected = torch.nn.functional.normalize(features @ encoder.model.visual.proj, dim=-1)
    torch.testing.assert_close(projected, encoder.encode_images(images))
    resnet = build_encoder(TowersModel.model_validate(tiny_models["resnet"]), device="cpu")
    assert image_features(resnet, images).shape == (3, resnet.embed_dim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": [0, 1, 7]}, "label 7 is outside the 2 classes"),
        ({"train_rows": np.full((3, 2), np.nan)}, "train rows: row 0 has NaN or infinity"),
        ({"test_rows": np.ones((0, 2))}, "test rows: expected"),
        ({"test_rows": np.eye(3)[:2]}, "test rows have 3 dimensions, the training rows 2"),
        ({"val_rows": np.ones((2, 2))}, "val_rows and val_labels together"),
        ({"train_rows": np.ones((1, 2)), "train_labels": [0]}, "two or more training rows, got 1"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "train_rows": np.eye(3)[:, :2],
        "train_labels": [0, 1, 0],
        "test_rows": np.eye(2),
        "test_labels": [0, 1],
        "classes": 2,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_probe(**arguments)


def test_bad_options_are_refused():
    rows, labels = np.eye(3), [0, 1, 0]
    with pytest.raises(TypeError, match="labels: expected whole numbers of classes, got float64"):
        knn_probe(rows, [0.0, 1.0, 0.5], rows, labels, 2, k=1)
    with pytest.raises(ValueError, match="k must lie between 1 and the 3 training rows, got 4"):
        knn_probe(rows, labels, rows, labels, 2, k=4)
    with pytest.raises(ValueError, match="class 1 has 1 training rows, 2 shots need more"):
        few_shot_probe(rows, labels, rows, labels, 2, shots=(2,))
