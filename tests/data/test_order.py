from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.data.order import shuffled


@given(num_samples=st.integers(1, 700), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    index_B = epoch * num_samples + np.arange(num_samples)
    assert sorted(shuffled(index_B, num_samples, seed)) == list(range(num_samples))


def test_pure_function_of_the_index() -> None:
    whole = shuffled(np.arange(1000), 37, seed=5)
    backwards = np.concatenate([shuffled(np.array([i]), 37, seed=5) for i in reversed(range(1000))])
    assert (whole == backwards[::-1]).all()


def test_known_values_stay() -> None:
    """A checkpoint of an older version must go on in the same order."""
    assert shuffled(np.arange(12), 10, seed=0).tolist() == [3, 4, 7, 0, 6, 5, 8, 9, 2, 1, 2, 7]


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_the_order(other: dict[str, int]) -> None:
    n = 500
    first = shuffled(np.arange(n), n, seed=0)
    second = shuffled(np.arange(n) + n * other.get("epoch", 0), n, seed=other.get("seed", 0))
    assert (first == second).sum() < 10


def test_looks_random() -> None:
    """Places and samples are uncorrelated, and neighbours land anywhere."""
    n = 20_000
    order = shuffled(np.arange(n), n, seed=3)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    first_of_epoch = shuffled(np.arange(600) * 6, 6, seed=3)
    counts = np.bincount(first_of_epoch, minlength=6)
    assert (abs(counts - 100) < 45).all()


def test_trillions_of_samples_cost_nothing() -> None:
    n = 3 * 10**12
    sample_B = shuffled(np.arange(1000) + 7 * n, n, seed=1)
    assert len(set(sample_B.tolist())) == 1000 and sample_B.min() >= 0 and sample_B.max() < n
