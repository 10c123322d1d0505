"""Resamples of seeds: the same seed everywhere, percentiles that cover, and the choice repeated."""

import numpy as np
import pytest

from analysis.statistics.resampling import Candidates, seed_weights, spread_factor


def test_seed_weights_belong_to_a_seed_and_its_context() -> None:
    first, second = seed_weights(["a", "b"], "lab", 50), seed_weights(["c", "b"], "lab", 50)
    assert np.array_equal(first[:, 1], second[:, 1])
    assert not np.array_equal(first[:, 0], second[:, 0])
    assert not np.array_equal(first, seed_weights(["a", "b"], "other", 50))


@pytest.mark.parametrize("num_seeds", [10, 20])
def test_percentiles_of_spread_resamples_cover_as_their_level_says(num_seeds: int) -> None:
    seeds = [str(number) for number in range(num_seeds)]
    weights = seed_weights(seeds, "lab")
    values = np.random.default_rng(0).standard_normal((num_seeds, 2000))
    moves = weights @ values / weights.sum(axis=1, keepdims=True) - values.mean(axis=0)
    for factor, expected in ((spread_factor(np.array(num_seeds), 0.9), 0.90), (1.0, 0.83 if num_seeds == 10 else 0.86)):
        low, high = np.quantile(values.mean(axis=0) + factor * moves, [0.05, 0.95], axis=0)
        assert np.mean((low < 0) & (high > 0)) == pytest.approx(expected, abs=0.02)


def test_candidates_choose_the_lowest_that_competes_in_each_cell() -> None:
    candidates = Candidates(np.array([0, 0, 1, 1, 1]), np.array([True, True, False, True, True]))
    chosen = candidates.lowest(np.array([[2.0, 1.0, 0.0, 4.0, 3.0], [1.0, 2.0, np.nan, 3.0, 4.0]]))
    assert chosen.tolist() == [[1, 4], [0, 3]]
