"""Claims that hold together: Holm against its definition, bands against the studentized range and by simulation."""

import numpy as np
import pytest
from scipy.stats import studentized_range

from analysis.statistics.multiplicity import draws_of, holm, largest_drop
from analysis.statistics.noise import Errors


def test_holm_steps_down_and_keeps_the_order_of_the_input() -> None:
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.6, 0.7])) == pytest.approx([1.0, 1.0])


def test_holm_leaves_one_p_value_alone_and_none_empty() -> None:
    assert holm(np.array([0.03])).tolist() == [0.03]
    assert holm(np.array([])).tolist() == []


def test_holm_claims_anything_false_at_most_at_its_level() -> None:
    rng = np.random.default_rng(0)
    false_claims = [(holm(rng.uniform(size=5)) < 0.1).any() for _ in range(4000)]
    assert np.mean(false_claims) == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("dof", [6.0, 1e6])
def test_largest_drop_has_the_band_of_tukey_where_cells_vary_alike(dof: float) -> None:
    errors = Errors(0.01 * np.eye(4), dof, dof)
    drop, _, high, first, second = largest_drop(np.array([0.0, 5.0, 1.0, 9.0]), draws_of(errors), 0.9)
    assert (drop, first, second) == (4.0, 1, 2)
    assert high is not None
    assert high - drop == pytest.approx(0.1 * studentized_range.ppf(0.9, 4, dof), rel=0.02)


def test_largest_drop_is_negative_where_all_rises() -> None:
    drop, low, high, *_ = largest_drop(np.array([0.0, 1.0, 3.0]), draws_of(Errors(1e-4 * np.eye(3), 9.0, 9.0)), 0.9)
    assert drop == -1.0
    assert low is not None
    assert high is not None
    assert low < drop < high < 0


def test_largest_drop_without_draws_has_no_interval() -> None:
    assert largest_drop(np.array([1.0, 0.5]), None, 0.9) == (0.5, None, None, 0, 1)


def test_largest_drop_covers_the_largest_of_the_true_falls() -> None:
    rng = np.random.default_rng(1)
    truth, spread = np.array([0.0, -0.05, -0.04, 0.1]), 0.05
    hits = []
    for _ in range(600):
        variance = spread**2 * rng.chisquare(8) / 8
        deviations = draws_of(Errors(variance * np.eye(4), 8.0, 8.0), 1000)
        _, low, high, *_ = largest_drop(truth + spread * rng.standard_normal(4), deviations, 0.9)
        assert low is not None
        assert high is not None
        hits.append(low <= 0.05 <= high)
    assert np.mean(hits) >= 0.9
