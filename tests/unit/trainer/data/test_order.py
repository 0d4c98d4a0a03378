"""The data order: bijective, uniform, stable over versions, and exact in its shares."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropipe.trainer.data.order import Permutation, SampleOrder, Source, key64


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4097])
def test_permutation_is_a_bijection(size):
    image = Permutation(size, key64("test", size))(np.arange(size))
    assert sorted(image.tolist()) == list(range(size))


@settings(deadline=None, max_examples=50)
@given(size=st.integers(10**6, 2**61), key=st.integers(0, 2**64 - 1), start=st.integers(0, 10**6 - 1000))
def test_large_permutations_stay_inside_and_do_not_collide(size, key, start):
    image = Permutation(size, key)(np.arange(start, start + 1000))
    assert image.min() >= 0 and image.max() < size and len(np.unique(image)) == 1000


def test_every_place_is_equally_likely():
    """Chi-square over 20,000 keys: where the first of 10 elements goes, and the order of 4 (24 outcomes)."""
    first = np.bincount([Permutation(10, key64(k))(np.array([0]))[0] for k in range(20_000)], minlength=10)
    assert ((first - 2000) ** 2 / 2000).sum() < 27.9  # 9 degrees of freedom, p = 0.001
    orders: dict[tuple, int] = {}
    for k in range(24_000):
        order = tuple(Permutation(4, key64("order", k))(np.arange(4)).tolist())
        orders[order] = orders.get(order, 0) + 1
    counts = np.array(list(orders.values()))
    assert len(counts) == 24 and ((counts - 1000) ** 2 / 1000).sum() < 49.7  # 23 degrees of freedom, p = 0.001


def test_neighbours_are_scattered():
    image = Permutation(100_000, 7)(np.arange(100_000)).astype(float)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(image, np.arange(100_000))[0, 1]) < 0.01


def test_golden_values_never_change():
    """A changed value means that every run in the world resumes on other data."""
    assert Permutation(1000, 42)(np.arange(8)).tolist() == GOLDEN_FIRST
    digest = hashlib.sha256(Permutation(10**12, 1)(np.arange(0, 10**12, 10**8)).tobytes()).hexdigest()
    assert digest == GOLDEN_DIGEST
    order = SampleOrder([Source("a", 5, 0.7), Source("b", 3, 0.3)], seed=1234)
    source, sample = order.sample(range(12))
    assert (source.tolist(), sample.tolist()) == GOLDEN_MIXTURE


GOLDEN_FIRST = [998, 721, 62, 193, 563, 996, 685, 278]
GOLDEN_DIGEST = "700d396bc9fc041cf56e6ae7b80fa4cefbdbbd3d740c30b1651980a980b0e306"
GOLDEN_MIXTURE = ([1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0], [2, 0, 3, 0, 2, 4, 1, 1, 1, 4, 1, 0])


def test_each_epoch_holds_every_sample_once_in_another_order():
    order = SampleOrder([Source("a", 100)], seed=1)
    _, sample = order.sample(range(300))
    epochs = sample.reshape(3, 100)
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_seed_and_data_change_the_order_but_weight_does_not_change_a_source():
    one = SampleOrder([Source("a", 1000)], seed=1).sample(range(50))[1].tolist()
    assert one != SampleOrder([Source("a", 1000)], seed=2).sample(range(50))[1].tolist()
    assert one != SampleOrder([Source("b", 1000)], seed=1).sample(range(50))[1].tolist()
    source, sample = SampleOrder([Source("x", 9, 3), Source("a", 1000, 1)], seed=1).sample(range(200))
    assert sample[source == 1].tolist() == one


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.floats(0.001, 1000, allow_nan=False).map(lambda w: round(w, 3)), min_size=1, max_size=6),
    total=st.integers(1, 3000),
)
def test_shares_are_exact_at_every_length(weights, total):
    order = SampleOrder([Source(str(k), 10**6, weight) for k, weight in enumerate(weights)], seed=0)
    source, _ = order.sample(range(total))
    counts = np.bincount(source, minlength=len(weights))
    assert counts.tolist() == order.counts(total) and counts.sum() == total
    for count, weight in zip(counts, weights, strict=True):
        # rounding of six odd weights to a common denominator of 2**20 moves a share by less than 3e-5
        assert abs(count - total * weight / sum(weights)) < len(weights) + total * 3e-5


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="outside"):
        Permutation(10, 0)(np.array([10]))
    with pytest.raises(ValueError, match="positive"):
        SampleOrder([Source("a", 10, 0.0)], seed=0)
