"""Orders without arrays: permutations are permutations, blends keep their shares, any item can be asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megayoco.data.order import BlendOrder, Permutation

WEIGHTS = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**32))
def test_every_number_has_one_place(size, key):
    permutation = Permutation(size, key)
    order = permutation.array(block=1000)
    assert sorted(order.tolist()) == list(range(size))
    places = {0, size // 2, size - 1}
    assert [permutation[i] for i in places] == [int(order[i]) for i in places]


def test_a_permutation_of_any_size_stays_inside_it():
    for size in (2**40, 2**53 + 1, 2**62):
        permutation = Permutation(size, "large")
        found = [permutation[i] for i in (*range(100), size - 1)]
        assert len(set(found)) == 101 and min(found) >= 0 and max(found) < size
        assert permutation._network(np.array([size - 1], np.uint64))[0] == permutation._network(size - 1)
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            Permutation(5, 0)[outside]


def test_a_permutation_is_fixed_for_ever():
    """A resumed run may have another version of numpy. These numbers were printed once."""
    assert Permutation(10, "samples", 1234, 0).array().tolist() == [8, 2, 1, 6, 0, 3, 4, 9, 5, 7]
    assert Permutation(10**12, "x")[7] == 934770512101


@pytest.mark.parametrize("size", [2, 5, 24])
def test_keys_reach_all_places_equally_often(size):
    orders = np.array([Permutation(size, key).array() for key in range(4000)])
    counts = np.array([np.bincount(orders[:, i], minlength=size) for i in range(size)])
    expected = 4000 / size
    # chi-squared of size x size cells has (size - 1)^2 degrees of freedom; five deviations of it
    freedom = (size - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5
    neighbours = np.mean(np.diff(orders, axis=1) == 1)
    assert neighbours == pytest.approx(1 / size, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, places=st.lists(st.integers(0, 30_000), min_size=1, max_size=20))
def test_any_item_of_a_blend_is_that_of_reading_in_order(weights, places):
    blend, last = BlendOrder(weights), max(places) + 1
    sequence = [blend[i] for i in range(last)]
    for source in range(len(weights)):
        assert [item for s, item in sequence if s == source] == list(range(sum(s == source for s, _ in sequence)))
    assert [BlendOrder(weights)[i] for i in places] == [sequence[i] for i in places]


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, length=st.integers(1, 50_000))
def test_every_prefix_of_a_blend_has_the_shares(weights, length):
    blend = BlendOrder(weights)
    sources = np.array([blend[i][0] for i in range(length)])
    counts = np.bincount(sources, minlength=len(weights))
    error = np.abs(counts - blend.shares * length)
    assert (error <= 1 + len(weights) * blend.shares).all()
    if length > 15_000:  # the promise: within 0.1 % of all samples
        assert (error / length < 1e-3).all()


def test_shares_hold_after_a_million_million_samples():
    blend = BlendOrder([0.7, 0.2999, 0.0001])
    start = 10**12 + 12345
    block = [blend[i] for i in range(start, start + 20_000)]
    counts = np.bincount([source for source, _ in block], minlength=3)
    assert np.abs(counts - blend.shares * 20_000).max() <= 2
    for source, share in enumerate(blend.shares):
        items = [item for s, item in block if s == source]
        assert items == list(range(items[0], items[0] + len(items)))
        assert items[0] == pytest.approx(share * start, abs=3)


def test_many_small_sources_do_not_come_all_at_once():
    blend = BlendOrder([1000.0] + [1.0] * 1000)
    small = np.cumsum([blend[i][0] > 0 for i in range(20_000)])
    assert np.abs(small - np.arange(1, 20_001) / 2).max() < 10


def test_equal_weights_take_turns():
    blend = BlendOrder([1, 1, 1])
    sources = [blend[i][0] for i in range(300)]
    assert all(sorted(sources[i : i + 3]) == [0, 1, 2] for i in range(0, 300, 3))


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_must_be_positive_numbers(weights):
    with pytest.raises(ValueError, match="weights"):
        BlendOrder(weights)
