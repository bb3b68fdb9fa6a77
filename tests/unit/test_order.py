from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import EpochOrder, rank_slice
from data.seeds import SAMPLE, sample_rng, sample_rngs

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum)


@given(
    counts=COUNTS, seed=st.integers(0, 99), window=st.integers(0, 50), epoch=st.integers(0, 3), data=st.data()
)
@settings(max_examples=200, deadline=None)
def test_an_epoch_is_a_permutation_and_any_slice_of_it_is_the_same(counts, seed, window, epoch, data):
    total = sum(counts)
    order = EpochOrder(counts, seed=seed, window=window)
    whole = order.positions(epoch, 0, total)
    assert sorted(whole.tolist()) == list(range(total))
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    fresh = EpochOrder(counts, seed=seed, window=window)  # has walked nowhere
    assert fresh.positions(epoch, start, stop).tolist() == whole[start:stop].tolist()


def test_locate_skips_empty_shards():
    order = EpochOrder([0, 2, 0, 1, 0], seed=0, window=0)
    assert [order.locate(index) for index in range(3)] == [(1, 0), (1, 1), (3, 0)]


def test_epochs_seeds_and_windows_differ():
    def whole(seed=0, window=100, epoch=0):
        return EpochOrder([50, 50, 50, 50], seed=seed, window=window).positions(epoch, 0, 200).tolist()

    orders = [whole(), whole(epoch=1), whole(seed=1), whole(window=200), whole(window=0)]
    assert len({tuple(order) for order in orders}) == 5
    assert whole(window=0) == list(range(200))
    assert whole() == whole()


def test_a_window_mixes_shards_and_bounds_how_many_are_read_at_once():
    order = EpochOrder([100] * 50, seed=3, window=1000)
    whole = order.positions(0, 0, 5000) // 100  # shard of each position
    for first in range(0, 5000, 1000):
        shards, counts = np.unique(whole[first : first + 1000], return_counts=True)
        assert len(shards) == 10
        assert (counts == 100).all()
    assert len(np.unique(whole[:100])) == 10  # mixed, not one shard after the other


def test_positions_are_uniform():
    """Mean position of every sample over many epochs is the middle, and neighbours part."""
    order = EpochOrder([10] * 10, seed=0, window=100)
    epochs = np.array([np.argsort(order.positions(epoch, 0, 100)) for epoch in range(400)])
    # A position is uniform on 0..99: mean 49.5, standard error 28.9 / sqrt(400) = 1.44; 5 of them for 100 samples.
    assert np.abs(epochs.mean(0) - 49.5).max() < 5 * 1.44


def test_rank_slices_cover_everything_evenly():
    for count in (0, 1, 5, 16):
        for world in (1, 2, 3, 7):
            slices = [rank_slice(count, rank, world) for rank in range(world)]
            assert slices[0][0] == 0
            assert slices[-1][1] == count
            assert all(one[1] == two[0] for one, two in pairwise(slices))
            sizes = [stop - start for start, stop in slices]
            assert max(sizes) - min(sizes) <= 1


def test_random_numbers_of_a_sample_differ_by_seed_epoch_and_index():
    draws = {sample_rng(*which).random() for which in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(draws) == 4
    assert sample_rng(5, 6, 7).random() == sample_rng(5, 6, 7).random()


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="shuffle is a number of samples, at least 0, got -1"):
        EpochOrder([1], seed=0, window=-1)


@pytest.mark.parametrize(
    "place", [(0, 0, 0), (7, 3, 123_456), (2**32, 0, 3), (1, 2, 2**32), (2**40, 2**33, 2**35)]
)
def test_sample_rng_is_numpys_own_of_the_four_numbers(place: tuple[int, int, int]):
    seed, epoch, index = place
    expected = np.random.default_rng((seed, epoch, SAMPLE, index))
    assert (sample_rng(*place).random(8) == expected.random(8)).all()


def test_a_batch_of_random_numbers_is_numpys_own_of_each_sample():
    rng = np.random.default_rng(0)
    epochs, indices = rng.integers(0, 2**32, (2, 200))
    for seed in (0, 2**32 - 1):
        for made, epoch, index in zip(sample_rngs(seed, epochs, indices), epochs, indices, strict=True):
            expected = np.random.default_rng((seed, int(epoch), SAMPLE, int(index)))
            assert made.bit_generator.state == expected.bit_generator.state
    assert sample_rngs(0, epochs[:0], indices[:0]) == []
