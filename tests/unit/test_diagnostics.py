"""Diagnostics of embedding spaces and CLIPScore against their formulas written out."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval.diagnostics import clip_score, diagnostics, ref_clip_score


def draw(seed=0, images=30, dim=6):
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(images), rng.integers(0, images, images)])
    image = rng.standard_normal((images, dim)) + 1
    return image, image[owner] + rng.standard_normal((2 * images, dim)) - 0.5, owner


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_equal_to_the_formulas():
    image, text, owner = draw()
    got = diagnostics(image, text, owner, block=7)
    x, y = unit(image), unit(text)
    assert got["alignment"] == pytest.approx(((y - x[owner]) ** 2).sum(1).mean(), abs=1e-7)
    assert got["modality_gap"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), abs=1e-7)
    for name, rows in (("images", x), ("texts", y)):
        pairs = [(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        assert got[f"anisotropy_{name}"] == pytest.approx(np.mean([a @ b for a, b in pairs]), abs=1e-7)
        spread = np.mean([np.exp(-2 * ((a - b) ** 2).sum()) for a, b in pairs])
        assert got[f"uniformity_{name}"] == pytest.approx(np.log(spread), abs=1e-5)
        share = np.linalg.svd(rows, compute_uv=False)
        share /= share.sum()
        assert got[f"effective_rank_{name}"] == pytest.approx(
            np.exp(-(share * np.log(share)).sum()), abs=1e-5
        )


def test_a_collapsed_and_an_even_space():
    ones = diagnostics(np.ones((5, 4)), np.ones((5, 4)), np.arange(5))
    assert ones["anisotropy_images"] == pytest.approx(1)
    assert ones["effective_rank_texts"] == pytest.approx(1, abs=1e-5)
    assert ones["uniformity_images"] == pytest.approx(0, abs=1e-6)
    even = diagnostics(np.eye(4), -np.eye(4), np.arange(4))
    assert even["effective_rank_images"] == pytest.approx(4)
    assert even["anisotropy_images"] == 0
    assert even["alignment"] == 4
    assert even["modality_gap"] == pytest.approx(1)


def test_uniformity_of_a_sample_is_near_that_of_all():
    image, text, owner = draw(1, images=2000)
    some, all_ = (diagnostics(image, text, owner, sample=sample) for sample in (500, 10000))
    assert some["uniformity_texts"] == pytest.approx(all_["uniformity_texts"], abs=0.05)
    assert some["alignment"] == all_["alignment"]


def test_clip_scores_by_hand():
    image = np.array([[1.0, 0], [1, 0], [1, 0]])
    text = np.array([[3.0, 4], [0, 2], [-1, 0]])
    assert clip_score(image, text).tolist() == pytest.approx([2.5 * 0.6, 0, 0], abs=1e-7)
    references, owner = np.array([[0.0, 1], [1, 0], [0, 1], [1, 0.0]]), [0, 0, 1, 2]
    got = ref_clip_score(image, text, references, owner)
    assert got.tolist() == pytest.approx([2 * 1.5 * 0.8 / 2.3, 0, 0], abs=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagnostics(np.eye(1), np.eye(1), [0]), "images: expected two or more rows to compare"),
        (lambda: diagnostics(np.eye(3), np.ones((3, 2)), [0, 1, 2]), "have 3 dimensions, text_embeddings 2"),
        (lambda: clip_score(np.eye(3), np.eye(3)[:2]), "one text for each image, got 2 for 3"),
        (lambda: clip_score(np.eye(3), np.zeros((3, 3))), "text_embeddings: row 0 is all zeros"),
        (lambda: ref_clip_score(np.eye(2), np.eye(2), np.eye(2), [0, 0]), "image 1 has no text"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
