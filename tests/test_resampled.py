"""Fits to all resamples at once against fits one by one, and the intervals that come of them."""

import numpy as np
import pytest

from analysis.statistics.families import FREE_EXPONENT, KINK, NEARLY_SATURATING, SATURATING, Family
from analysis.statistics.fit import Array, Fit, fit_family, fit_saturating
from analysis.statistics.intervals import Resamples
from analysis.statistics.noise import Errors
from analysis.statistics.resampled import fit_resamples
from analysis.statistics.residuals import Observed
from analysis.statistics.search import Search
from tests.test_families import EIGHT, with_exponent, with_kink


@pytest.mark.parametrize("family", [SATURATING, FREE_EXPONENT, KINK])
@pytest.mark.parametrize(
    ("residuals", "loss"), [("log", "squares"), ("log", "soft_l1"), ("raw_tokens", "squares"), ("raw_steps", "squares")]
)
def test_resamples_are_each_fitted_as_one_alone_is(family: Family, residuals: str, loss: str) -> None:
    random = np.random.default_rng(5)
    truth = with_kink(EIGHT, 2e3, -0.4) if family is KINK else with_exponent(EIGHT, 2e3, 1.2)
    log_t = truth + 0.03 * random.standard_normal((6, 8))
    together = fit_resamples(family, EIGHT, log_t, None, residuals, loss)
    for row, found in zip(log_t, together, strict=True):
        alone = fit_family(family, EIGHT, row, 0.9, None, residuals, loss)
        np.testing.assert_allclose(found, [alone.log_t_min, alone.log_b_crit, alone.bend], atol=1e-3)


@pytest.mark.parametrize("family", [SATURATING, NEARLY_SATURATING, FREE_EXPONENT, KINK])
def test_no_point_of_a_fine_grid_fits_better_than_the_best_found(family: Family) -> None:
    random = np.random.default_rng(6)
    for bend in (0.7, 1.0, 1.6):
        log_t = with_exponent(EIGHT, 2e3, bend) + 0.03 * random.standard_normal(8)
        search = Search(family, Observed(np.log(EIGHT), log_t, None, "log", "squares"), prior=1e-3)
        best = search.best()
        sides = np.linspace(*search.limits[0], 801), np.linspace(*family.bends, 101 if family.is_bent else 1)
        grid = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)
        assert search.at(best[None]).misfit[0] <= search.at(grid).misfit.min()


def test_an_assumed_spread_pulls_each_resample_as_it_pulls_one_alone() -> None:
    log_t = with_exponent(EIGHT, 2e3, 1.4) + 0.03 * np.random.default_rng(7).standard_normal((3, 8))
    pulled, free = (fit_resamples(family, EIGHT, log_t, prior=1e-2) for family in (NEARLY_SATURATING, FREE_EXPONENT))
    for row, found in zip(log_t, pulled, strict=True):
        search = Search(NEARLY_SATURATING, Observed(np.log(EIGHT), row, None, "log", "squares"), prior=1e-2)
        np.testing.assert_allclose(found[1:], search.best(), atol=1e-6)
    assert np.all(np.abs(pulled[:, 2]) < np.abs(free[:, 2]))


def test_resamples_weigh_the_points_by_their_errors() -> None:
    errors = Errors(np.diag(np.r_[np.full(7, 1e-4), 1.0]), 16.0, 16.0)
    log_t = with_exponent(EIGHT, 2e3, 1.0)
    log_t[-1] += 2.0
    found = fit_resamples(SATURATING, EIGHT, log_t[None], errors)[0]
    assert found[1] == pytest.approx(fit_saturating(EIGHT, log_t, 0.9, errors).log_b_crit, abs=1e-6)
    assert found[1] == pytest.approx(np.log(2e3), abs=0.01)


def resampled(fit: Fit, log_b_crit: Array) -> Fit:
    zeros = np.zeros_like(log_b_crit)
    return fit.with_resamples(Resamples(log_b_crit, zeros, zeros + fit.log_t_min, 0.9))


def test_an_interval_of_resamples_lies_between_their_percentiles() -> None:
    fit = fit_saturating(EIGHT, with_exponent(EIGHT, 2e3, 1.0), 0.9)
    draws = np.random.default_rng(0).normal(np.log(2e3), 0.1, 10_000)
    ends = resampled(fit, draws).critical_batch_tokens
    assert ends.low is not None
    assert ends.high is not None
    assert np.mean(draws < np.log(ends.low)) == pytest.approx(0.05, abs=1e-3)
    assert np.mean(draws > np.log(ends.high)) == pytest.approx(0.05, abs=1e-3)


def test_resamples_without_a_knee_leave_the_interval_open() -> None:
    fit = fit_saturating(EIGHT, with_exponent(EIGHT, 2e3, 1.0), 0.9)
    draws = np.full(1000, np.log(2e3))
    draws[:100] = fit.limits[0][1]
    ends = resampled(fit, draws)
    assert ends.critical_batch_tokens.high is None
    assert ends.critical_batch_tokens.low == pytest.approx(2e3)
    assert ends.s_min_steps.low is None
