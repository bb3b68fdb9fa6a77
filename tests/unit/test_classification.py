"""Numbers of classifiers beside plain float64 loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.classification import auroc, calibration_error, classification_metrics
from finetune.multilabel import average_precision, multilabel_metrics
from pairstream.confusion import confusion_picture


def predictions(seed: int, classes: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, classes)).round(1)  # rounded: ties occur
    labels = rng.integers(0, classes, count)
    logits[np.arange(count), labels] += 1
    weights = np.exp(logits)
    return weights / weights.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize(("seed", "classes"), [(0, 2), (1, 3), (2, 7)])
def test_beside_plain_loops(seed, classes):
    probabilities, labels = predictions(seed, classes)
    names = [f"class {number}" for number in range(classes)]
    ours = classification_metrics(probabilities, labels, names)
    guess = [max(range(classes), key=lambda number: row[number]) for row in probabilities]
    assert ours["accuracy"] == pytest.approx(sum(g == t for g, t in zip(guess, labels, strict=True)) / 200)
    f1s, weights, areas = [], [], []
    for number in range(classes):
        tp = sum(g == number == t for g, t in zip(guess, labels, strict=True))
        fp = sum(g == number != t for g, t in zip(guess, labels, strict=True))
        fn = sum(g != number == t for g, t in zip(guess, labels, strict=True))
        f1s.append(2 * tp / (2 * tp + fp + fn))
        weights.append(tp + fn)
        pairs = [
            (probabilities[i, number], probabilities[j, number])
            for i in range(200) if labels[i] == number
            for j in range(200) if labels[j] != number
        ]  # fmt: skip
        areas.append(sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs))
        assert ours["confusion"][number][number] == tp
    assert ours["macro_f1"] == pytest.approx(sum(f1s) / classes)
    assert ours["weighted_f1"] == pytest.approx(sum(f * w for f, w in zip(f1s, weights, strict=True)) / 200)
    assert ours["auroc"] == pytest.approx(sum(areas) / classes)
    assert [entry["samples"] for entry in ours["by_class"].values()] == weights

    error = 0.0
    for low in np.arange(15) / 15:
        chosen = [i for i in range(200) if low < probabilities[i].max() <= low + 1 / 15 + 1e-15]
        if chosen:
            sure = sum(probabilities[i].max() for i in chosen) / len(chosen)
            right = sum(guess[i] == labels[i] for i in chosen) / len(chosen)
            error += len(chosen) / 200 * abs(sure - right)
    assert ours["ece"] == pytest.approx(error)


@pytest.mark.parity
@pytest.mark.parametrize(("seed", "classes"), [(3, 2), (4, 4)])
def test_beside_scikit_learn(seed, classes):
    sklearn = pytest.importorskip("sklearn.metrics")
    probabilities, labels = predictions(seed, classes)
    ours = classification_metrics(probabilities, labels, [str(number) for number in range(classes)])
    guess = probabilities.argmax(axis=1)
    assert ours["macro_f1"] == pytest.approx(sklearn.f1_score(labels, guess, average="macro"), abs=1e-12)
    assert ours["weighted_f1"] == pytest.approx(
        sklearn.f1_score(labels, guess, average="weighted"), abs=1e-12
    )
    assert ours["confusion"] == sklearn.confusion_matrix(labels, guess).tolist()
    scores = [sklearn.roc_auc_score(labels == number, probabilities[:, number]) for number in range(classes)]
    assert ours["auroc"] == pytest.approx(sum(scores) / classes, abs=1e-12)


def test_classes_that_never_occur():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    ours = classification_metrics(probabilities, [0, 1], ["a", "b", "c"])
    assert (ours["accuracy"], ours["macro_f1"]) == (1.0, 1.0)  # "c" is neither there nor predicted
    assert ours["by_class"]["c"]["auroc"] is None
    assert auroc(np.array([0.1, 0.2]), np.array([True, True])) is None
    assert classification_metrics(np.array([[1.0, 0.0]]), [0], ["a", "b"])["auroc"] is None


def test_calibration():
    sure = np.array([[0.99, 0.01]] * 10)
    assert calibration_error(sure, np.array([0] * 5 + [1] * 5)) == pytest.approx(0.49)
    assert calibration_error(np.array([[1.0, 0.0]] * 4), np.zeros(4, int)) == 0.0


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[0.5, 0.5]], [0], r"expected probabilities \(n, 3\)"),
        ([[0.5, 0.5, 0.0]], [0, 1], "2 labels for 1 predictions"),
        (np.zeros((0, 3)), np.zeros(0, int), "no samples to judge"),
        ([[0.5, 0.5, 0.0]], [3], "0 to 2"),
        ([[np.nan, 0.5, 0.5]], [0], "must be finite"),
        ([[0.5, 0.1, 0.1]], [0], "must sum to 1"),
    ],
)
def test_bad_input(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(np.array(probabilities), np.array(labels), ["a", "b", "c"])


def test_several_labels_agree_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth = rng.random((60, 4)) < 0.4
    scores = np.round(np.clip(truth * 0.3 + rng.random((60, 4)) * 0.7, 0, 1), 1)  # many equal scores
    found = multilabel_metrics(scores, truth, list("abcd"))
    given = scores >= 0.5
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, given))
    assert found["micro_f1"] == pytest.approx(sklearn.f1_score(truth, given, average="micro"))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(truth, given, average="macro"))
    assert found["map"] == pytest.approx(sklearn.average_precision_score(truth, scores, average="macro"))
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(truth, scores, average="macro"))
    gap = sum(
        abs(truth[scores == value].sum() - scores[scores == value].sum()) for value in np.unique(scores)
    )  # values a tenth apart lie in bins of their own
    assert found["ece"] == pytest.approx(gap / truth.size)
    assert sum(number for _, _, number in found["reliability"]) == truth.size


def test_several_labels_refuse_what_is_none():
    good = np.full((2, 2), 0.5)
    with pytest.raises(ValueError, match=r"expected probabilities and truth \(n, 3\)"):
        multilabel_metrics(good, good > 0, list("abc"))
    with pytest.raises(ValueError, match="no samples to judge"):
        multilabel_metrics(np.zeros((0, 2)), np.zeros((0, 2), bool), list("ab"))
    with pytest.raises(ValueError, match="finite and from 0 to 1"):
        multilabel_metrics(good + 1, good > 0, list("ab"))
    assert average_precision(np.array([0.2, 0.1]), np.array([False, False])) is None


def test_the_confusion_matrix_is_a_picture():
    import io

    from PIL import Image

    def shade(counts):
        picture = Image.open(io.BytesIO(confusion_picture(counts, ["$a$", "b"]))).convert("RGB")
        return picture.getpixel((int(picture.width * 0.45), int(picture.height * 0.2)))

    assert confusion_picture([[9, 0], [0, 9]], ["a", "b"]).startswith(b"\x89PNG")
    assert shade([[9, 0], [0, 9]]) != shade([[0, 9], [0, 9]])
    many = np.eye(60, dtype=int).tolist()
    assert confusion_picture(many, [f"label {number}" for number in range(60)]).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"expected counts \(2, 2\)"):
        confusion_picture([[1]], ["a", "b"])
