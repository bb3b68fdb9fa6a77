"""True recall, MRR, mAP@R, R-precision and nDCG: hand cases, all orders of ties, folds, judged pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import counting
from retrieval.metrics import fold_metrics, relevance_metrics, retrieval_metrics, retrieval_ranks
from retrieval.ranking import Ranking


def numbers_of(rel, ks):
    """Every number of one query from its list of right (1) and wrong (0) candidates, best first."""
    places = [place for place, right in enumerate(rel, 1) if right]
    r = len(places)
    precision = {place: sum(rel[:place]) / place for place in places}
    result = {
        "rank": places[0],
        "reciprocal_rank": 1 / places[0],
        "r_precision": sum(rel[:r]) / r,
        "map@r": sum(precision[place] for place in places if place <= r) / r,
        "ap": sum(precision.values()) / r,
    }
    for k in ks:
        ideal = sum(1 / math.log2(place + 1) for place in range(1, min(r, k) + 1))
        result[f"recall@{k}"] = float(places[0] <= k)
        result[f"true_recall@{k}"] = sum(rel[:k]) / r
        result[f"ndcg@{k}"] = sum(1 / math.log2(place + 1) for place in places if place <= k) / ideal
    return result


def ranking_of(scores, right):
    """One query's Ranking from whole-number scores."""
    levels = sorted({s for s, r in zip(scores, right, strict=True) if r}, reverse=True)
    wrong = [s for s, r in zip(scores, right, strict=True) if not r]
    return Ranking(
        query=torch.zeros(len(levels), dtype=torch.int64),
        above=torch.tensor([sum(s > level for s in wrong) for level in levels]),
        level=torch.tensor([sum(s == level for s in wrong) for level in levels]),
        right=torch.tensor(
            [sum(s == level and r for s, r in zip(scores, right, strict=True)) for level in levels]
        ),
        queries=1,
        gallery=len(scores),
    )


def test_map_at_r_by_hand():
    found = ranking_of([3, 2, 1, 0], [True, False, True, False]).per_query((2,))
    assert float(found["r_precision"]) == 0.5
    three = ranking_of([5, 4, 3, 2, 1, 0], [True, False, True, False, False, True]).per_query((3,))
    assert float(three["r_precision"]) == pytest.approx(2 / 3)
    assert float(three["map@r"]) == pytest.approx(5 / 9)  # divided by R, not by the hits
    assert float(three["ap"]) == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), st.data())
@settings(max_examples=150, deadline=None)
def test_ties_are_the_mean_over_all_orders(candidates, data):
    scores, right = [s for s, _ in candidates], [r for _, r in candidates]
    right[data.draw(st.integers(0, len(right) - 1))] = True
    ks = (1, 2, 4, 9)
    orders = [
        numbers_of([right[i] for i in order], ks)
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    found = ranking_of(scores, right).per_query(ks)
    assert set(found) == set(orders[0])
    for name, value in found.items():
        assert float(value) == pytest.approx(np.mean([order[name] for order in orders]), abs=1e-12), name
    best = ranking_of(scores, right).resolved(optimistic=True).per_query(ks)
    worst = ranking_of(scores, right).resolved(optimistic=False).per_query(ks)
    for name in found:
        pick_best, pick_worst = (min, max) if name == "rank" else (max, min)
        assert float(best[name]) == pytest.approx(pick_best(order[name] for order in orders), abs=1e-12)
        assert float(worst[name]) == pytest.approx(pick_worst(order[name] for order in orders), abs=1e-12)


def draw(seed, images=40, texts=150, dim=12):
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(images), rng.integers(0, images, texts - images)])
    image = rng.standard_normal((images, dim)).astype(np.float32)
    return image, (0.6 * image[owner] + rng.standard_normal((texts, dim))).astype(np.float32), owner


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("block", [5, 64, 1000])
def test_equals_the_sorted_lists(block):
    image, text, owner = draw(0)
    scores = unit(image.astype(np.float64)) @ unit(text.astype(np.float64)).T
    right = owner[None] == np.arange(len(image))[:, None]
    ks = (1, 3, 10, 500)
    got = retrieval_metrics(image, text, owner, ks, block=block)
    for direction, s, good in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
        each = [numbers_of(list(r[np.argsort(-row)]), ks) for row, r in zip(s, good, strict=True)]
        renamed = {"mean_rank": "rank", "mrr": "reciprocal_rank"}
        for name in ("mean_rank", "mrr", "map@r", "r_precision", "true_recall@3", "ndcg@10", "ndcg@500"):
            expected = np.mean([numbers[renamed.get(name, name)] for numbers in each])
            assert got[direction][name] == pytest.approx(expected, abs=1e-12), (direction, name)
            assert got[direction].get(f"optimistic_{name}", got[direction][name]) == got[direction][name]


def test_optimistic_and_pessimistic_bracket_a_constant_model():
    owner = np.arange(6).repeat(2)
    got = retrieval_metrics(np.ones((6, 3)), np.ones((12, 3)), owner)
    assert got["image_to_text"]["optimistic_recall@1"] == 1.0
    assert got["image_to_text"]["pessimistic_recall@10"] == 0.0
    assert got["image_to_text"]["pessimistic_mean_rank"] == 11.0
    assert got["text_to_image"]["pessimistic_mean_rank"] == 6.0
    assert got["text_to_image"]["optimistic_median_rank"] == 1.0
    assert got["text_to_image"]["tied_queries"] == 12


def test_folds_are_the_mean_of_the_parts():
    image, text, owner = draw(1)
    order = np.random.default_rng(0).permutation(len(text))
    text, owner = text[order], owner[order]
    got = fold_metrics(image, text, owner, folds=5, ks=(1, 5))
    parts = []
    for fold in range(5):
        mine = np.flatnonzero(owner // 8 == fold)
        parts.append(
            retrieval_metrics(image[8 * fold : 8 * fold + 8], text[mine], owner[mine] - 8 * fold, (1, 5))
        )
    for direction, numbers in got.items():
        for name in ("recall@1", "recall@5", "mean_rank", "mrr"):
            assert numbers[name] == pytest.approx(np.mean([part[direction][name] for part in parts]))
    image[1], image[9] = image[0], image[8]  # the texts of both pictures tie, in two of the folds
    counted = fold_metrics(image, text, owner, folds=5)["text_to_image"]["tied_queries"]
    assert counted == np.isin(owner, (0, 1, 8, 9)).sum() > 0
    image, text, owner = draw(1)
    text, owner = text[order], owner[order]
    whole = retrieval_metrics(image, text, owner, ks=(1, 5))
    assert got["text_to_image"]["recall@1"] > whole["text_to_image"]["recall@1"]
    as_torch = fold_metrics(torch.from_numpy(image), torch.from_numpy(text), owner, folds=5, ks=(1, 5))
    assert as_torch == got
    with pytest.raises(ValueError, match="a number that divides the 40 images, got 7"):
        fold_metrics(image, text, owner, folds=7)


def test_judged_pairs_with_several_answers_and_a_larger_gallery():
    rng = np.random.default_rng(3)
    queries, gallery = rng.standard_normal((20, 8)), rng.standard_normal((90, 8))
    right = rng.random((20, 50)) < 0.2  # candidates 50 to 89 answer nothing
    right[:, 0] = True
    ks = (1, 5)
    got = relevance_metrics(queries, gallery, np.argwhere(right), ks, block=16)
    scores = unit(queries) @ unit(gallery).T
    wide = np.pad(right, ((0, 0), (0, 40)))
    each = [numbers_of(list(r[np.argsort(-s)]), ks) for s, r in zip(scores, wide, strict=True)]
    for name in ("map@r", "r_precision", "recall@1", "true_recall@5", "ndcg@5"):
        assert got[name] == pytest.approx(np.mean([numbers[name] for numbers in each]), abs=1e-12)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([[0, 0], [0, 0], [1, 0]], ValueError, r"the pair \[0, 0\] is given twice"),
        (
            [[0, 3], [1, 9]],
            ValueError,
            r"pair 1 is \[1, 9\], expected a query below 2 and a candidate below 4",
        ),
        ([[0, 3]], ValueError, r"query 1 has no right answer \(1 of 2 queries"),
        ([0, 1], ValueError, r"expected \(pairs, 2\) of query and candidate, got shape \(2,\)"),
        ([[0.0, 1.0], [1.0, 1.0]], TypeError, "relevant: expected integers, got float64"),
    ],
)
def test_bad_pairs_are_refused(pairs, error, message):
    with pytest.raises(error, match=message):
        relevance_metrics(np.eye(4)[:2], np.eye(4), pairs)


@pytest.mark.parametrize("pick", [0, 10**9])
@pytest.mark.parametrize("waiting", [1, 1 << 16])
def test_picking_out_and_sweeping_count_alike(monkeypatch, pick, waiting):
    # Candidates picked out of a block, or counted level by level; doubts decided at once, or together at the end.
    rng = np.random.default_rng(11)
    image, text, owner = draw(8, images=70, texts=400, dim=20)
    text[::7] = text[3]  # ties with right and wrong ones
    text[5::11] = text[5] + rng.integers(-2, 3, text[5::11].shape) * np.spacing(text[5])
    images, texts = ([int(v) for v in each] for each in (np.arange(70), np.arange(400)))
    grid = [np.round(unit(rows.astype(np.float64)) * 2.0**26).astype(int).tolist() for rows in (image, text)]
    scores = [
        [sum(a * b for a, b in zip(grid[0][i], grid[1][t], strict=True)) for t in texts] for i in images
    ]
    monkeypatch.setattr(counting, "PICK", pick)
    monkeypatch.setattr(counting, "WAITING", waiting)
    seen = {"pick": 0, "sweep": 0}
    for name in seen:
        real = getattr(counting.Side, name)
        monkeypatch.setattr(
            counting.Side,
            name,
            lambda *given, name=name, real=real: (seen.update({name: seen[name] + 1}), real(*given))[1],
        )
    by_image, by_text = retrieval_ranks(image, text, owner, block=64)
    assert seen["sweep"] == 0 if pick == 0 else seen["pick"] < seen["sweep"]
    for query, above, level, right in zip(
        *(each.tolist() for each in (by_image.query, by_image.above, by_image.level, by_image.right)),
        strict=True,
    ):
        mine = [scores[query][t] for t in texts if owner[t] == query]
        wrong = [scores[query][t] for t in texts if owner[t] != query]
        places = {(sum(s > one for s in wrong), wrong.count(one), mine.count(one)) for one in mine}
        assert (above, level, right) in places
    assert int(by_image.right.sum()) == 400
    for query in texts:
        own = scores[owner[query]][query]
        wrong = [scores[i][query] for i in images if i != owner[query]]
        assert int(by_text.above[query]) == sum(s > own for s in wrong)
        assert int(by_text.level[query]) == wrong.count(own)


def test_many_near_ties_take_the_exact_product_and_few_the_gathered_one():
    # Both ways of deciding doubtful pairs must agree with the exact scores.
    rng = np.random.default_rng(5)
    image = rng.standard_normal((60, 512)).astype(np.float32)
    owner = np.arange(60).repeat(4)
    text = image[owner] + 3 * rng.standard_normal((240, 512)).astype(np.float32)
    text[60:180:3] = text[0] + rng.integers(-1, 2, (40, 512)) * np.spacing(text[0])
    exact = [[int(v) for v in np.round(row * 2.0**26)] for row in unit(image.astype(np.float64))]
    other = [[int(v) for v in np.round(row * 2.0**26)] for row in unit(text.astype(np.float64))]
    scores = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in other] for x in exact]
    by_image, by_text = retrieval_ranks(image, text, owner, block=100)
    for query in range(60):
        best = max(scores[query][t] for t in np.flatnonzero(owner == query))
        wrong = [scores[query][t] for t in np.flatnonzero(owner != query)]
        assert int(by_image.best().above[query]) == sum(s > best for s in wrong)
    for query in range(240):
        level = scores[owner[query]][query]
        wrong = [scores[i][query] for i in range(60) if i != owner[query]]
        assert int(by_text.above[query]) == sum(s > level for s in wrong)
        assert int(by_text.level[query]) == sum(s == level for s in wrong)


def test_one_equal_row_among_many_is_a_tie_and_not_a_loss():
    # Few doubtful pairs in a wide block: each is decided by itself.
    rng = np.random.default_rng(6)
    image = rng.standard_normal((400, 32)).astype(np.float32)
    text = (image + 0.3 * rng.standard_normal((400, 32))).astype(np.float32)
    text[7] = text[300]
    by_image, by_text = retrieval_ranks(image, text, np.arange(400), block=1000)
    assert int(by_image.level[7]) == 1
    assert int(by_image.above[300]) == 0
    assert int(by_image.level[300]) == 1
    assert int((by_image.level > 0).sum()) == 2
    assert int(by_text.level.sum()) == 0
