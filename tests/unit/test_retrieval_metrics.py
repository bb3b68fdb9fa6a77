"""Retrieval numbers against a float64 loop, hand-worked ties, and exact chance for a constant model."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.metrics import DIRECTIONS, Ranks, chance, retrieval_metrics, retrieval_ranks
from retrieval.rows import Rows, same_width


def draw(seed, images=30, captions=3, dim=16, signal=0.5):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((images, dim)).astype(np.float32)
    owner = np.concatenate([np.arange(images), rng.integers(0, images, images * (captions - 1))])
    rng.shuffle(owner)
    text = signal * image[owner] + rng.standard_normal((len(owner), dim)).astype(np.float32)
    return image, text.astype(np.float32), owner


def reference(image, text, owner, ks):
    """One query at a time, in float64, with the expectation over ties taken from exact fractions."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    scores = image @ text.T
    relevant = owner[None, :] == np.arange(len(image))[:, None]
    result = {}
    for name, s, good in (("image_to_text", scores, relevant), ("text_to_image", scores.T, relevant.T)):
        hits, ranks, open_queries = {k: [] for k in ks}, [], 0
        for row, right in zip(s, good, strict=True):
            best = row[right].max()
            g = int((row > best).sum())
            t = int((row == best).sum())
            p = int((row[right] == best).sum())
            open_queries += t > p
            ranks.append(1 + g + Fraction(t - p, p + 1))
            for k in ks:
                m = min(max(min(k, len(row)) - g, 0), t)
                hits[k].append(1 - Fraction(math.comb(t - p, m), math.comb(t, m)))
        result[name] = {
            **{f"recall@{k}": float(sum(hits[k]) / len(ranks)) for k in ks},
            "median_rank": float(np.median([float(rank) for rank in ranks])),
            "mean_rank": float(sum(ranks) / len(ranks)),
            "tied_queries": open_queries,
        }
    return result


def close(a, b, tolerance=1e-12):
    """Equal in every number of `b`."""
    assert a.keys() == b.keys()
    for direction in a:
        assert set(b[direction]) <= set(a[direction])
        found = {name: a[direction][name] for name in b[direction]}
        assert found == pytest.approx(b[direction], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", [3, 7, 64, 1000])
def test_equals_the_float64_loop(seed, block):
    image, text, owner = draw(seed)
    close(retrieval_metrics(image, text, owner, block=block), reference(image, text, owner, (1, 5, 10)))


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_float64_loop_on_rows_full_of_ties(seed):
    # Rows of the vectors (±1, ±1, ±1, ±1) / 2: every norm and product is exact in the reference, too.
    rng = np.random.default_rng(seed)
    vectors = np.array(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=np.float32)
    image, owner = vectors[rng.integers(0, 16, 40)], np.concatenate([np.arange(40), rng.integers(0, 40, 60)])
    text = np.where(rng.random((100, 1)) < 0.5, image[owner], vectors[rng.integers(0, 16, 100)])
    got = retrieval_metrics(image, text, owner, block=13)
    assert got["image_to_text"]["tied_queries"] > 10
    close(got, reference(image, text, owner, (1, 5, 10)))


@pytest.mark.parametrize(
    ("g", "t", "p", "k", "expected"),
    [(0, 50, 5, 5, 0.4234), (2, 10, 1, 5, 0.3), (4, 6, 2, 5, 1 / 3), (5, 3, 1, 5, 0.0), (0, 3, 1, 3, 1.0)],
)
def test_ties_by_hand(g, t, p, k, expected):
    ranks = Ranks(torch.tensor([g]), torch.tensor([t]), torch.tensor([p]), gallery=1000)
    assert float(ranks.hits(k)) == pytest.approx(expected, abs=5e-5)
    assert float(ranks.expected()) == 1 + g + (t - p) / (p + 1)


@given(st.integers(1, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_hit_probability_is_the_hypergeometric_one(t, data):
    p = data.draw(st.integers(1, t))
    g = data.draw(st.integers(0, 10))
    ranks = Ranks(torch.tensor([g]), torch.tensor([t]), torch.tensor([p]), gallery=g + t)
    for k in range(1, g + t + 3):
        m = min(max(k - g, 0), t)
        exact = 1 - Fraction(math.comb(t - p, m), math.comb(t, m))
        assert float(ranks.hits(k)) == pytest.approx(float(exact), abs=1e-12)


def test_expected_rank_is_the_mean_over_all_orders():
    # 5 tied candidates, 2 of them right: mean place of the first right one over all orders.
    orders = set(itertools.permutations([1, 1, 0, 0, 0]))
    mean = sum(order.index(1) + 1 for order in orders) / len(orders)
    ranks = Ranks(torch.tensor([0]), torch.tensor([5]), torch.tensor([2]), gallery=5)
    assert float(ranks.expected()) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("images", "dim", "block"), [(30, 1, 1), (1000, 3, 100), (1000, 511, 1024), (1000, 511, 333)]
)
def test_a_constant_model_scores_exact_chance(images, dim, block):
    owner = np.arange(images).repeat(1 + np.arange(images) % 4)
    row = np.random.default_rng(dim).standard_normal(dim).astype(np.float32)
    image, text = np.tile(row, (images, 1)), np.tile(2.5 * row, (len(owner), 1))
    got, by_chance = retrieval_metrics(image, text, owner, block=block), chance(owner, images)
    for direction, queries in zip(DIRECTIONS, (images, len(owner)), strict=True):
        assert got[direction]["tied_queries"] == queries
        assert len(by_chance[direction]) == 14
        for name in set(by_chance[direction]) - {"median_rank"}:
            assert got[direction][name] == pytest.approx(by_chance[direction][name], rel=1e-10), name
    assert by_chance["text_to_image"]["recall@5"] == pytest.approx(5 / images)


def test_equal_rows_tie_wherever_they_lie():
    # 700 copies of one text spread among others: an ordinary float32 product tells some of them apart.
    rng = np.random.default_rng(0)
    image, text, owner = draw(1, images=900, captions=2, dim=300, signal=0.1)
    copies = rng.permutation(len(text))[:700]
    text[copies] = text[copies[0]]
    first = retrieval_ranks(image, text, owner, block=1800)
    for block in (97, 128, 1000):
        for a, b in zip(first, retrieval_ranks(image, text, owner, block=block), strict=True):
            for name in ("query", "above", "level", "right"):
                assert torch.equal(getattr(a, name), getattr(b, name))
    queries = np.unique(owner[copies])
    # A query whose best answer is a copy ties with all 700.
    tied = first[0].best().tied[queries]
    assert set(tied.tolist()) <= {1, 700}
    assert (tied == 700).sum() > 50


@pytest.mark.parametrize("nudge", [0, 1, 5, 20])
def test_nearly_equal_rows_do_not_depend_on_block_or_order(nudge):
    # Texts that differ in the last bits only: the order among them is decided exactly, not by the kernel.
    rng = np.random.default_rng(nudge)
    image = rng.standard_normal((200, 64)).astype(np.float32)
    owner = np.arange(200).repeat(3)
    text = np.tile(rng.standard_normal(64).astype(np.float32), (600, 1))
    text += (rng.integers(-nudge, nudge + 1, text.shape) * np.spacing(np.abs(text))).astype(np.float32)
    expected = retrieval_metrics(image, text, owner)
    for block in (31, 256):
        assert retrieval_metrics(image, text, owner, block=block) == expected
    i, t = rng.permutation(200), rng.permutation(600)
    place = np.argsort(i)  # where each image went
    shuffled = retrieval_metrics(image[i], text[t], place[owner[t]], block=100)
    close(shuffled, expected)


def test_threads_do_not_matter():
    image, text, owner = draw(3, images=300, dim=100)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = retrieval_metrics(image, text, owner)
        torch.set_num_threads(2)
        assert retrieval_metrics(image, text, owner) == one
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers():
    image, text, owner = draw(9, images=500, dim=100)
    text[::3] = text[0]
    expected = retrieval_metrics(image, text, owner)
    on_gpu = [torch.from_numpy(rows).cuda() for rows in (image, text)]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # TF32 must not reach the scores
        assert retrieval_metrics(on_gpu[0], on_gpu[1], owner, block=130) == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_float32_products_survive_autocast_and_lowered_precision():
    image, text, owner = draw(4, images=200, dim=64)
    expected = retrieval_metrics(image, text, owner)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert retrieval_metrics(image, text, owner) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_takes_torch_numpy_memmap_and_other_floats(tmp_path):
    image, text, owner = draw(5)
    expected = retrieval_metrics(image, text, owner)
    np.save(tmp_path / "image.npy", image)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    assert retrieval_metrics(mapped, torch.from_numpy(text), torch.from_numpy(owner)) == expected
    assert retrieval_metrics(image.astype(np.float64), text, owner.tolist()) == expected
    double = torch.from_numpy(image.astype(np.float64))
    kept = double.clone()
    retrieval_metrics(double, torch.from_numpy(text).requires_grad_(), owner)
    assert torch.equal(double, kept)
    assert retrieval_metrics(image.tolist(), text.tolist(), owner.tolist()) == expected
    assert retrieval_metrics(np.asfortranarray(image), torch.from_numpy(text.T.copy()).T, owner) == expected
    half = image.astype(np.float16)
    assert retrieval_metrics(half, text, owner) == retrieval_metrics(half.astype(np.float32), text, owner)


def test_length_of_rows_does_not_matter():
    image, text, owner = draw(6)
    scale = np.float32(2.0) ** np.random.default_rng(0).integers(-100, 100, (len(image), 1))
    assert retrieval_metrics(image * scale, text, owner) == retrieval_metrics(image, text, owner)


def test_cutoffs_above_the_gallery_count_as_the_whole_gallery():
    image, text, owner = draw(7, images=4, captions=2)
    got = retrieval_metrics(image, text, owner, ks=(3, 4, 100))
    assert got["text_to_image"]["recall@4"] == got["text_to_image"]["recall@100"] == 1.0
    assert chance(owner, 4, ks=[100])["image_to_text"]["recall@100"] == 1.0


def test_random_embeddings_score_about_chance():
    rng = np.random.default_rng(0)
    owner = np.arange(300).repeat(2 + np.arange(300) % 4)
    scores, ks = [], (1, 10, 50)
    for _ in range(30):
        image, text = rng.standard_normal((300, 32)), rng.standard_normal((len(owner), 32))
        scores.append(retrieval_metrics(image, text, owner, ks))
    by_chance = chance(owner, 300, ks)
    for direction in DIRECTIONS:
        for name, expected in by_chance[direction].items():
            drawn = [score[direction][name] for score in scores]
            error = np.std(drawn) / math.sqrt(len(drawn))
            assert abs(np.mean(drawn) - expected) < 5 * error + 0.5 * (name == "median_rank"), name


def test_chance_by_hand():
    got = chance([0, 0, 1, 1, 1], images=2, ks=(1, 2, 3))
    by_hand = {"recall@1": 0.5, "recall@2": 1, "recall@3": 1, "median_rank": 1, "mean_rank": 1.5, "mrr": 0.75}
    assert {name: got["text_to_image"][name] for name in by_hand} == by_hand
    assert got["image_to_text"]["recall@1"] == pytest.approx((2 / 5 + 3 / 5) / 2)
    assert got["image_to_text"]["recall@2"] == pytest.approx(1 - (3 / 10 + 1 / 10) / 2)
    assert got["image_to_text"]["mean_rank"] == pytest.approx((6 / 3 + 6 / 4) / 2)


IMAGE, TEXT, OWNER = draw(8, images=6, captions=2)


def broken(rows, row, value):
    rows = rows.copy()
    rows[row, 0 if value else slice(None)] = value
    return rows


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((broken(IMAGE, 4, np.nan), TEXT, OWNER), ValueError, "image_embeddings: row 4 has NaN or infinite"),
        ((IMAGE, broken(TEXT, 11, np.inf), OWNER), ValueError, "text_embeddings: row 11 has NaN or infinite"),
        ((IMAGE, broken(TEXT, 2, 0), OWNER), ValueError, "text_embeddings: row 2 is all zeros"),
        ((IMAGE[:, :5], TEXT, OWNER), ValueError, "have 5 dimensions, text_embeddings 16"),
        ((IMAGE[0], TEXT, OWNER), ValueError, r"image_embeddings: expected \(rows, dimensions\)"),
        ((IMAGE, TEXT[:0], OWNER[:0]), ValueError, r"text_embeddings: expected .* got shape \(0, 16\)"),
        ((IMAGE.astype(complex), TEXT, OWNER), TypeError, "expected real numbers, got complex"),
        ((IMAGE > 0, TEXT, OWNER), TypeError, "expected real numbers, got bool"),
        ((IMAGE, TEXT, OWNER[:-1]), ValueError, r"one entry for each of 12 texts, got shape \(11,\)"),
        ((IMAGE, TEXT, OWNER.astype(float)), TypeError, "image_of_text: expected integers, got float64"),
        ((IMAGE, TEXT, OWNER - 1), ValueError, "names image -1, expected 0 to 5"),
        ((IMAGE[:5], TEXT, OWNER), ValueError, "names image 5, expected 0 to 4"),
        ((IMAGE, TEXT, OWNER % 5), ValueError, r"image 5 has no text.*1 of 6 images"),
        ((IMAGE, TEXT, OWNER, (1, 0)), ValueError, "whole numbers of at least 1"),
        ((IMAGE, TEXT, OWNER, ()), ValueError, "whole numbers of at least 1"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        retrieval_metrics(*arguments)


def test_huge_and_tiny_rows_have_the_places_of_usual_ones():
    image, text, owner = draw(10)
    expected = retrieval_metrics(image, text, owner)
    for power in (-1000, -300, 300, 1000):  # past what float32 holds, and near the ends of float64
        assert retrieval_metrics(image.astype(np.float64) * 2.0**power, text, owner) == expected
    subnormal = image.astype(np.float64) * 2.0**-1065
    assert retrieval_metrics(subnormal, text, owner) == retrieval_metrics(
        np.ldexp(subnormal, 1065), text, owner
    )
    assert retrieval_metrics(image * np.float32(2.0**-120), text * np.float32(2.0**120), owner) == expected


def test_rows_on_two_devices_are_refused():
    first, second = Rows(IMAGE, "image_embeddings", 8), Rows(TEXT, "text_embeddings", 8)
    second.device = torch.device("cuda:0")
    with pytest.raises(ValueError, match="image_embeddings are on cpu, text_embeddings on cuda:0"):
        same_width(first, second)


def test_bad_block_is_refused():
    with pytest.raises(ValueError, match="block must be at least 1 row, got 0"):
        retrieval_metrics(IMAGE, TEXT, OWNER, block=0)
