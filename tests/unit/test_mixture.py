"""Which sample stands where when sources are mixed: exact quotas, whole epochs, a function of the batch's number."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import Mixture, quotas, whole_weights
from data.order import EpochOrder, rank_slice, source_seed

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def draw_one_by_one(total: int, weights: list[int]) -> list[int]:
    """The definition: whoever's turn is first draws."""
    shares = [0] * len(weights)
    for _ in range(total):
        turns = [Fraction(2 * share + 1, weight) for share, weight in zip(shares, weights, strict=True)]
        shares[turns.index(min(turns))] += 1
    return shares


@given(weights=WEIGHTS, total=st.integers(0, 200))
@settings(max_examples=80, deadline=None)
def test_quotas_are_the_draws_one_by_one(weights, total):
    assert quotas(total, weights) == draw_one_by_one(total, weights)


@given(weights=WEIGHTS, total=st.integers(0, 10**12))
@settings(max_examples=80, deadline=None)
def test_quotas_sum_up_and_are_the_exact_part_rounded(weights, total):
    shares = quotas(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - Fraction(total * weight, sum(weights))) < len(weights)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    batch=st.integers(1, 6),
    world=st.integers(1, 4),
    window=st.integers(0, 20),
    seed=st.integers(0, 20),
    mix=st.sampled_from(["samples", "batches"]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_every_sample_once_per_epoch_of_its_source_for_any_ranks_and_kill(
    sizes, batch, world, window, seed, mix, data
):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    total = batch * world
    for size, weight in zip(sizes, weights, strict=True):  # what a mixture refuses is tested below
        if len(sizes) > 1 and (total if mix == "batches" else -(-total * weight // sum(weights))) > size:
            return

    def make() -> Mixture:
        orders = [
            EpochOrder([size - size // 2, 0, size // 2], seed=source_seed(seed, k), window=window)
            for k, size in enumerate(sizes)
        ]
        return Mixture(orders, weights, list(map(str, sizes)), global_batch=total, mix=mix)

    one, steps = make(), 40
    whole = [one.rows(step, 0, total) for step in range(steps)]
    # Ranks and a kill: rank slices of a mixture that was made anew at each step, laid side by side.
    for step in range(0, steps, 7):
        parts = []
        for rank in range(world):
            fresh = make()
            parts.append(fresh.rows(step, *rank_slice(fresh.size(step), rank, world)))
        for name in ("sources", "epochs", "numbers"):
            side_by_side = np.concatenate([getattr(part, name) for part in parts])
            assert side_by_side.tolist() == getattr(whole[step], name).tolist()
    # Every sample once per epoch of its source, in epochs that follow each other.
    seen: Counter = Counter()
    for rows in whole:
        seen.update(zip(rows.sources.tolist(), rows.epochs.tolist(), rows.numbers.tolist(), strict=True))
    assert max(seen.values()) == 1
    for source, size in enumerate(sizes):
        drawn = one.drawn(steps)[source]
        assert one.epochs_seen(steps)[str(size)] * size == pytest.approx(drawn) or sizes.count(size) > 1
        for epoch in range(-(-drawn // size)):
            numbers = {number for where, turn, number in seen if (where, turn) == (source, epoch)}
            expected = set(range(sum(sizes[:source]), sum(sizes[: source + 1])))
            assert numbers == expected or (epoch == drawn // size and len(numbers) == drawn % size)
    # Exact quotas in every batch, or one source in each.
    if len(sizes) > 1:
        for step, rows in enumerate(whole):
            counts = np.bincount(rows.sources, minlength=len(sizes))
            assert counts.sum() == total
            if mix == "batches":
                assert (counts > 0).sum() == 1
            else:
                before, after = (draw_one_by_one(n * total, weights) for n in (step, step + 1))
                assert counts.tolist() == [y - x for x, y in zip(before, after, strict=True)]


def test_one_source_is_what_it_was_before_there_were_mixtures():
    """Bit for bit the order that runs were begun with."""
    order = EpochOrder([5, 3], seed=1, window=4)
    mixture = Mixture([order], [8], ["a"], global_batch=3, mix="samples")
    batches = [mixture.rows(step, 0, 3).numbers.tolist() for step in range(6)]
    assert batches == [order.positions(e, n, n + 3).tolist() for e in (0, 1) for n in (0, 3, 6)]
    assert [mixture.size(step) for step in range(6)] == [3, 3, 2, 3, 3, 2]


def test_sources_alternate_within_a_batch_so_that_every_rank_has_its_share():
    orders = [EpochOrder([400], seed=0, window=0), EpochOrder([100], seed=0, window=0)]
    mixture = Mixture(orders, [3, 1], ["a", "b"], global_batch=64, mix="samples")
    for rank in range(4):
        assert np.bincount(mixture.rows(2, *rank_slice(64, rank, 4)).sources).tolist() == [12, 4]


@pytest.mark.parametrize("seed", range(8))
def test_drawing_with_replacement_goes_on_until_small_shards_fill_the_epoch(seed):
    order = EpochOrder([100, *[1] * 9, 0], seed=seed, window=0, replacement=True)
    assert len(order.positions(0, 0, 109)) == 109
    assert (
        EpochOrder([100, *[1] * 9, 0], seed=seed, window=7, replacement=True).positions(0, 100, 109).size == 9
    )


def test_drawing_with_replacement_repeats_shards_and_keeps_the_size():
    order = EpochOrder([10] * 30, seed=0, window=0, replacement=True)
    epochs = [order.positions(epoch, 0, 300) for epoch in range(2)]
    assert [len(epoch) for epoch in epochs] == [300, 300]
    for epoch in epochs:
        counts = np.bincount(epoch, minlength=300)
        assert (counts.reshape(30, 10) == counts[::10, None]).all()  # whole shards
        assert 0.2 < (counts == 0).mean() < 0.55  # (1 - 1/30)^30 = 0.36 are left out
    assert epochs[0].tolist() != epochs[1].tolist()
    again = EpochOrder([10] * 30, seed=0, window=50, replacement=True)
    assert sorted(again.positions(0, 0, 300)) == sorted(epochs[0].tolist())
    assert again.positions(0, 100, 130).tolist() == again.positions(0, 0, 300)[100:130].tolist()


@pytest.mark.parametrize(
    ("given_", "temperature", "shares"),
    [
        ([None, None], None, [0.9, 0.1]),
        ([None, None], 1, [0.9, 0.1]),
        ([None, None], 2, [0.75, 0.25]),
        ([None, None], 1e9, [0.5, 0.5]),
        ([None, None], 1e-9, [1.0, 0.0]),
        ([0.7, 0.3], None, [0.7, 0.3]),
        ([2, 6], None, [0.25, 0.75]),
    ],
)
def test_weights_and_temperature(given_, temperature, shares):
    weights = whole_weights([900, 100], given_, temperature)
    assert [weight / sum(weights) for weight in weights] == pytest.approx(shares)
    if given_ == [0.7, 0.3]:
        assert quotas(1000, weights) == [700, 300]


@pytest.mark.parametrize(
    ("given_", "temperature", "words"),
    [
        ([1, None], None, "give every source one, or none and a temperature; here 1 of 2 have one"),
        ([1, 2], 2.0, "here a temperature as well"),
        ([1, 0], None, r"weights must be numbers above 0 .*, got \[1, 0\]"),
        ([1, -1], None, r"weights must be numbers above 0 .*, got \[1, -1\]"),
        ([1, float("nan")], None, r"weights must be numbers above 0 .*, got \[1, nan\]"),
        ([1e308, 1e308], None, r"weights must be numbers above 0 \(and below 1e\+100\), got \[1e\+308"),
        ([1, "2"], None, r"weights must be numbers above 0 .*, got \[1, '2'\]"),
        ([None, None], float("nan"), "temperature must be above 0, got nan"),
        ([None, None], 0, "temperature must be above 0, got 0"),
    ],
)
def test_impossible_weights(given_, temperature, words):
    with pytest.raises(ValueError, match=words):
        whole_weights([10, 10], given_, temperature)


def test_a_source_smaller_than_its_share_of_a_batch_and_an_unknown_mix():
    orders = [EpochOrder([100], seed=0, window=0), EpochOrder([3], seed=0, window=0)]
    with pytest.raises(ValueError, match="source small has 3 samples and gives up to 5 to a batch of 10"):
        Mixture(orders, [1, 1], ["big", "small"], global_batch=10, mix="samples")
    with pytest.raises(ValueError, match="mix 'shards': expected 'samples' or 'batches'"):
        Mixture(orders, [1, 1], ["big", "small"], global_batch=2, mix="shards")
