"""The order of the windows: a permutation, frozen, and without a visible pattern."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harness.shuffle
from harness.shuffle import window_index

FIRST_OF_SEED_0 = [76120, 31634, 18917, 9220, 8616, 83930, 66242, 56534]
FIRST_OF_SEED_1 = [92112, 13934, 54367, 83370, 81934, 59648, 136589, 124014]
FIRST_OF_SECOND_EPOCH = [75186, 31573, 48131, 24687, 82002, 39082, 46358, 34152]

WORD = 2**64


def reference_index(position: int, num_windows: int, seed: int) -> int:
    """The same in Python's whole numbers, one position at a time."""
    golden, a = 0x9E3779B97F4A7C15, math.isqrt(num_windows - 1) + 1
    b = math.ceil(num_windows / a)
    epoch, x = divmod(position, num_windows)
    stream = splitmix(splitmix(seed + golden) + epoch)
    while True:
        high, low = divmod(x, b)
        for number in range(1, 7):
            key = splitmix(stream + number * golden)
            if number % 2:
                high = (high + splitmix(low + key)) % a
            else:
                low = (low + splitmix(high + key)) % b
        x = high * b + low
        if x < num_windows:
            return x


def splitmix(x: int) -> int:
    x %= WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


@pytest.mark.parametrize("num_windows", [1, 2, 3, 4, 5, 8, 13, 64, 97, 100, 128, 1009, 65_536, 65_537])
def test_window_index_is_a_permutation_of_every_epoch(num_windows: int) -> None:
    for epoch in (0, 1, 7):
        positions = epoch * num_windows + np.arange(num_windows)
        assert sorted(window_index(positions, num_windows, seed=3)) == list(range(num_windows))


@settings(deadline=None, max_examples=60)
@given(num_windows=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_window_index_is_a_permutation_for_any_size_and_seed(num_windows: int, seed: int, epoch: int) -> None:
    positions = epoch * num_windows + np.arange(num_windows)
    assert len(np.unique(window_index(positions, num_windows, seed))) == num_windows


@settings(deadline=None, max_examples=60)
@given(num_windows=st.integers(1, 10**12), first=st.integers(0, 10**15), count=st.integers(1, 50))
def test_window_index_equals_the_plain_reference(num_windows: int, first: int, count: int) -> None:
    positions = np.arange(first, first + count)
    expected = [reference_index(int(position), num_windows, seed=1) for position in positions]
    assert window_index(positions, num_windows, seed=1).tolist() == expected


@pytest.mark.parametrize("num_windows", [3, 5, 7, 13])
def test_positions_of_many_epochs_at_once_keep_the_keys_of_their_own(num_windows: int) -> None:
    positions = np.arange(40 * num_windows)
    expected = [reference_index(int(position), num_windows, seed=2) for position in positions]
    assert window_index(positions, num_windows, seed=2).tolist() == expected


def test_window_index_equals_its_frozen_table() -> None:
    """A change here changes the data of every run: raise SCIENCE_VERSION with it."""
    assert window_index(np.arange(8), 139_000, seed=0).tolist() == FIRST_OF_SEED_0
    assert window_index(np.arange(8), 139_000, seed=1).tolist() == FIRST_OF_SEED_1
    assert window_index(139_000 + np.arange(8), 139_000, seed=0).tolist() == FIRST_OF_SECOND_EPOCH


def test_a_cipher_that_is_no_permutation_fails_instead_of_walking_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.shuffle, "_encipher", lambda number, a, b, _: np.full_like(number, a * b - 1))
    with pytest.raises(AssertionError, match="passes each of the a·b - N outside numbers once at most"):
        window_index(np.arange(5), 5, seed=0)


def test_window_index_keeps_the_shape_of_the_positions() -> None:
    positions = np.arange(12).reshape(3, 4)
    assert window_index(positions, 50, seed=0).tolist() == window_index(positions.ravel(), 50, 0).reshape(3, 4).tolist()


def test_window_index_differs_by_seed_and_by_epoch() -> None:
    first = window_index(np.arange(1000), 1000, seed=0)
    other_seed = window_index(np.arange(1000), 1000, seed=1)
    next_epoch = window_index(1000 + np.arange(1000), 1000, seed=0)
    for other in (other_seed, next_epoch):
        assert np.mean(first == other) < 0.01  # one in a thousand by chance


@pytest.mark.parametrize("seed", range(5))
def test_window_index_does_not_follow_its_position(seed: int) -> None:
    """Under the null, r · sqrt(n) is standard normal for lags and neighbours alike; five would be one in a million."""
    count = 50_000
    index = window_index(np.arange(count), count, seed)
    assert abs(np.corrcoef(np.arange(count), index)[0, 1]) * np.sqrt(count) < 5
    assert abs(np.corrcoef(index[1:], index[:-1])[0, 1]) * np.sqrt(count) < 5


@pytest.mark.parametrize("num_windows", [2**16, 99_991])
def test_window_index_spreads_the_first_positions_evenly(num_windows: int) -> None:
    """Chi-square of 50 bins has mean 49 and standard deviation 10; sampling without replacement makes it smaller."""
    drawn = window_index(np.arange(5000), num_windows, seed=0)
    counts, _ = np.histogram(drawn, bins=50, range=(0, num_windows))
    assert 15 < np.sum((counts - 100) ** 2 / 100) < 100


def test_every_first_window_is_equally_likely_over_seeds() -> None:
    first = [int(window_index(np.array([0]), 10, seed)[0]) for seed in range(2000)]
    counts = np.bincount(first, minlength=10)
    assert np.sum((counts - 200) ** 2 / 200) < 30  # chi-square with 9 degrees of freedom: 30 is p = 4e-4
