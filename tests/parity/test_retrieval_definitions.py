"""The published definitions of the evaluation, one test each: by hand, and equal to the libraries that have them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    label_ranking_average_precision_score,
    ndcg_score,
)

from retrieval.classification import ClassificationCount, multilabel_map
from retrieval.classifier import build_classifier
from retrieval.compositional import accuracy, aro, sugarcrepe, winogavil, winoground
from retrieval.diagnostics import clip_score, ref_clip_score
from retrieval.metrics import fold_metrics, relevance_metrics, retrieval_metrics
from retrieval.ranking import Ranks

pytestmark = pytest.mark.parity


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(seed, images=60, captions=5, dim=24):
    rng = np.random.default_rng(seed)
    owner = np.arange(images).repeat(captions)
    image = rng.standard_normal((images, dim))
    return image, 0.5 * image[owner] + rng.standard_normal((len(owner), dim)), owner


def ordered(rel):
    """Unit rows whose scores with the first axis fall from candidate to candidate, and the pairs that are right."""
    angles = np.linspace(0.1, 1.4, len(rel))
    gallery = np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.array([[1.0, 0.0]]), gallery, [[0, place] for place, right in enumerate(rel) if right]


def test_recall_is_the_hit_rate_under_our_names_and_true_recall_is_not():
    image, text, owner = draw(0)
    got = retrieval_metrics(image, text, owner)
    scores = unit(image) @ unit(text).T
    rows = torch.from_numpy(scores)
    right = torch.from_numpy(owner[None] == np.arange(len(image))[:, None])
    for k in (1, 5, 10):
        # Theirs calls the search for texts `text_retrieval`: our image_to_text.
        found = zeroshot_retrieval.recall_at_k(rows, right, k)
        assert got["image_to_text"][f"recall@{k}"] == pytest.approx((found > 0).double().mean().item())
        assert got["image_to_text"][f"true_recall@{k}"] == pytest.approx(found.double().mean().item())
    assert got["image_to_text"]["true_recall@1"] <= 0.2  # five captions, one place
    one_caption = retrieval_metrics(image, text[::5], owner[::5])
    assert one_caption["image_to_text"]["recall@1"] < got["image_to_text"]["recall@1"]


def test_a_cutoff_above_the_gallery_is_the_whole_gallery_where_the_peer_fails():
    image, text, owner = draw(1, images=4, captions=1)
    assert retrieval_metrics(image, text, owner, (10,))["text_to_image"]["recall@10"] == 1.0
    with pytest.raises(RuntimeError):
        zeroshot_retrieval.recall_at_k(torch.rand(4, 4), torch.eye(4, dtype=torch.bool), 10)


@pytest.mark.parametrize(
    ("g", "t", "p", "k", "expected"), [(0, 50, 5, 5, 0.4234), (2, 10, 1, 5, 0.3), (4, 6, 2, 5, 1 / 3)]
)
def test_ties_by_expectation(g, t, p, k, expected):
    ranks = Ranks(torch.tensor([g]), torch.tensor([t]), torch.tensor([p]), gallery=100)
    assert float(ranks.hits(k)) == pytest.approx(1 - math.comb(t - p, k - g) / math.comb(t, k - g))
    assert float(ranks.hits(k)) == pytest.approx(expected, abs=5e-5)
    # And from rows: g texts above, p right ones and t - p wrong ones of the same score.
    rows = np.array([[1.0, 0.1]] * g + [[1.0, 1.0]] * t + [[1.0, 9.0]] * (100 - g - t))
    found = relevance_metrics([[1.0, 0.0]], rows, [[0, g + n] for n in range(p)], (k,))
    assert found[f"recall@{k}"] == pytest.approx(expected, abs=5e-5)
    assert found["mean_rank"] == pytest.approx(1 + g + (t - p) / (p + 1))
    assert found["optimistic_mean_rank"] == 1 + g
    assert found["pessimistic_mean_rank"] == 1 + g + t - p
    assert found["tied_queries"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("side", [0, 1])
def test_rows_without_a_direction_are_errors_and_not_rank_one(bad, side):
    rows = [*draw(2)[:2]]
    rows[side] = np.full_like(rows[side], bad)
    with pytest.raises(ValueError, match=r"row 0 (has NaN or infinite values|is all zeros)"):
        retrieval_metrics(*rows, draw(2)[2])


def test_ranks_count_from_one_and_an_even_median_is_the_mean_of_two():
    query, gallery, _ = ordered([0] * 6)
    four = [[n, place] for n, place in enumerate((0, 1, 4, 5))]  # ranks 1, 2, 5, 6
    found = relevance_metrics(np.repeat(query, 4, 0), gallery, four)
    assert (found["median_rank"], found["mean_rank"]) == (3.5, 3.5)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 6) / 4)


def test_map_at_r_divides_by_r_and_not_by_the_hits():
    query, gallery, pairs = ordered([1, 0, 1, 0, 0, 1])
    found = relevance_metrics(query, gallery, pairs)
    assert found["r_precision"] == pytest.approx(2 / 3)
    assert found["map@r"] == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_ndcg_and_average_precision_are_scikit_learns():
    image, text, owner = draw(3, images=30, captions=4)
    scores, right = unit(image) @ unit(text).T, owner[None] == np.arange(30)[:, None]
    for k in (1, 5, 50):
        got = retrieval_metrics(image, text, owner, (k,))
        assert got["image_to_text"][f"ndcg@{k}"] == pytest.approx(ndcg_score(right, scores, k=k), abs=1e-9)
    # Every picture has as many captions as another: mean average precision ranks pictures for each class.
    labels = [[row] for row in owner]
    found = multilabel_map(text, image, labels)
    precisions = [average_precision_score(right[row], scores[row]) for row in range(30)]
    assert found["average_precision"] == pytest.approx(precisions, abs=1e-9)
    assert found["mean_average_precision"] == pytest.approx(
        label_ranking_average_precision_score(right, scores), abs=1e-9
    )


def test_folds_of_a_thousand_are_the_mean_of_galleries_of_their_own():
    image, text, owner = draw(4, images=50)
    folds = [
        retrieval_metrics(image[n : n + 10], text[5 * n : 5 * n + 50], owner[:50]) for n in range(0, 50, 10)
    ]
    got = fold_metrics(image.tolist(), text.tolist(), owner.tolist(), 5)
    for direction, numbers in got.items():
        for name in ("recall@1", "recall@10", "median_rank", "map@r"):
            assert numbers[name] == pytest.approx(np.mean([fold[direction][name] for fold in folds])), name
        assert numbers["recall@1"] > retrieval_metrics(image, text, owner)[direction]["recall@1"]


def test_nothing_depends_on_the_order_of_the_gallery_or_the_block():
    image, text, owner = draw(5)
    text[7:40] = text[7]  # an order would decide among these
    expected = retrieval_metrics(image, text, owner)
    mixed = np.random.default_rng(0).permutation(len(text))
    for block in (1, 17, 4096):
        got = retrieval_metrics(image, text[mixed], owner[mixed], block=block)
        for direction, numbers in expected.items():
            assert got[direction] == pytest.approx(numbers, abs=1e-12)


def test_winoground_compares_strictly_in_all_four_ways():
    rng = np.random.default_rng(6)
    scores = rng.standard_normal((200, 2, 2))  # caption by image
    text = [s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1] for s in scores]
    image = [s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0] for s in scores]
    got = winoground(scores)
    assert (got["text"], got["image"]) == (np.mean(text), np.mean(image))
    assert got["group"] == np.mean(np.logical_and(text, image))
    constant = winoground(np.ones((9, 2, 2)))
    assert [constant[name] for name in ("text", "image", "group")] == pytest.approx([1 / 4, 1 / 4, 1 / 6])


def test_a_constant_model_does_not_win_by_standing_first():
    for constant in (sugarcrepe(np.ones((4, 2)), ["add_att"] * 4), aro(np.ones((4, 2)), list("aabb"))):
        assert (constant["accuracy"], constant["strict_accuracy"]) == (0.5, 0.0)  # argmax would give it 1
    assert accuracy(np.ones((4, 5)))["accuracy"] == pytest.approx(1 / 5)  # ARO's order sets
    rare = aro([[1, 0]] * 25 + [[0, 1]] * 24, ["often"] * 25 + ["rare"] * 24, least=25)
    assert (rare["macro_accuracy"], rare["groups_left_out"]) == (1.0, 1)
    pairs = list(itertools.combinations(range(4), 2))
    expected = np.mean([len({0, 1} & set(pair)) / len({0, 1} | set(pair)) for pair in pairs])
    assert winogavil([np.ones(4)], [[0, 1]])["jaccard"] == pytest.approx(expected)
    assert winogavil([[0.9, 0.1, 0.8]], [[0, 1]])["jaccard"] == pytest.approx(1 / 3)


def test_sugarcrepes_three_averages_differ():
    kinds = ["add_att"] * 4 + ["add_obj"] * 2 + ["swap_att"]
    scores = [[1, 0]] * 4 + [[0, 1], [1, 0]] + [[0, 1]]
    got = sugarcrepe(scores, kinds)
    assert got["accuracy"] == pytest.approx(5 / 7)
    assert got["mean_of_kinds"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert got["mean_of_groups"] == pytest.approx((3 / 4 + 0) / 2)


def test_classes_are_normalised_where_the_model_does_not(small_encoder, monkeypatch):
    names, templates = ["cat", "dog", "red bus"], ["a {}", "a photo of a {}, which is a kind of thing", "{}"]
    encoder = small_encoder(0)
    rows = {name: encoder.encode_texts([t.format(name) for t in templates]) for name in names}
    expected = np.stack([unit(each.mean(0, keepdim=True).numpy())[0] for each in rows.values()])
    got = build_classifier(encoder, names, templates).weights
    np.testing.assert_allclose(got, expected, atol=1e-6)
    # A wrapper whose texts have lengths of their own: without a normalisation of each the long ones would weigh more.
    whole = encoder.model.encode_text
    monkeypatch.setattr(
        encoder.model,
        "encode_text",
        lambda tokens, **more: whole(tokens, **more) * (1 + (tokens != 0).sum(1, keepdim=True)),
    )
    np.testing.assert_allclose(build_classifier(encoder, names, templates).weights, expected, atol=1e-6)


def test_mean_per_class_recall_is_balanced_accuracy():
    rng = np.random.default_rng(7)
    weights, rows = rng.standard_normal((6, 8)), rng.standard_normal((90, 8))
    labels = rng.integers(0, 5, 90)  # class 5 never occurs and is left out
    count = ClassificationCount(weights, [f"c{n}" for n in range(6)])
    count.add(rows[:37], labels[:37])
    count.add(rows[37:], labels[37:])
    got = count.result()
    taken = (unit(rows) @ unit(weights).T).argmax(1)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert got["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, taken))
    assert got["acc1"] == pytest.approx((taken == labels).mean())


def test_clip_scores():
    image, text = np.array([[1.0, 0.0]] * 3), np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    assert clip_score(image, text).tolist() == pytest.approx([2.5, 1.5, 0.0])
    references = np.array([[0.0, 1.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    got = ref_clip_score(image, text, references, [0, 1, 1, 2]).tolist()
    # Harmonic means of 2.5 and 0, of 1.5 and the better of 1 and 0.8, of 0 and 1.
    assert got == pytest.approx([0.0, 2 * 1.5 * 1 / 2.5, 0.0])
