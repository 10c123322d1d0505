"""Curves of three parameters, and other errors than those of log T, against planted truth."""

import numpy as np
import pytest

from analysis.statistics.families import (
    FREE_EXPONENT,
    KINK,
    NEARLY_SATURATING,
    SATURATING,
    VALLEY,
    Family,
    log_batch_at,
)
from analysis.statistics.fit import Array, fit_family
from analysis.statistics.noise import Errors

EIGHT = 256.0 * 2.0 ** np.arange(8)


def with_exponent(batches: Array, b_crit: float, alpha: float) -> Array:
    return np.asarray(np.log(1e5 * (1 + (batches / b_crit) ** alpha)))


def with_kink(batches: Array, b_star: float, tail_slope: float) -> Array:
    return np.asarray(np.log(1e5) + (1 + tail_slope) * np.maximum(0.0, np.log(batches / b_star)))


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.6])
def test_free_exponent_recovers_an_exact_curve(alpha: float) -> None:
    fit = fit_family(FREE_EXPONENT, EIGHT, with_exponent(EIGHT, 2e3, alpha), 0.9, Errors(np.eye(8) * 1e-4, 16.0, 16.0))
    assert fit.critical_batch_tokens.value == pytest.approx(2e3, rel=1e-6)
    assert fit.t_min_tokens.value == pytest.approx(1e5, rel=1e-6)
    bend = fit.bend_estimate
    assert bend.value == pytest.approx(np.log(alpha), abs=1e-6)
    assert bend.low is not None
    assert bend.high is not None
    assert bend.low < np.log(alpha) < bend.high
    assert fit.s_min_steps.value is None


@pytest.mark.parametrize("tail_slope", [-0.8, -0.3])
def test_kink_recovers_an_exact_curve(tail_slope: float) -> None:
    fit = fit_family(KINK, EIGHT, with_kink(EIGHT, 3e3, tail_slope), 0.9, Errors(np.eye(8) * 1e-4, 16.0, 16.0))
    assert fit.critical_batch_tokens.value == pytest.approx(3e3, rel=1e-5)
    assert fit.bend_estimate.value == pytest.approx(1 + tail_slope, abs=1e-6)
    assert fit.critical_batch_tokens.low is not None
    assert fit.critical_batch_tokens.low < 3e3


def test_a_bent_family_has_an_interval_from_seven_points_on() -> None:
    errors = Errors(np.eye(8) * 1e-4, 16.0, 16.0)
    for family, log_t in ((FREE_EXPONENT, with_exponent(EIGHT, 2e3, 1.3)), (KINK, with_kink(EIGHT, 2e3, -0.5))):
        seven, six = (fit_family(family, EIGHT[:n], log_t[:n], 0.9, errors.at(range(n))) for n in (7, 6))
        assert seven.critical_batch_tokens.low is not None
        assert six.critical_batch_tokens.value is not None
        assert six.critical_batch_tokens.low is None


def test_aicc_needs_k_plus_three_points_and_prefers_the_family_of_the_truth() -> None:
    wiggle = 0.02 * np.array([1, -1, 1, 1, -1, -1, 1, -1])

    def aicc(family: Family, log_t: Array, num: int = 8) -> float | None:
        return fit_family(family, EIGHT[:num], log_t[:num], 0.9).aicc

    plain, bent = with_exponent(EIGHT, 2e3, 1.0) + wiggle, with_exponent(EIGHT, 2e3, 1.8) + wiggle
    assert aicc(SATURATING, plain) < aicc(FREE_EXPONENT, plain)  # type: ignore[operator]
    assert aicc(FREE_EXPONENT, bent) < aicc(SATURATING, bent)  # type: ignore[operator]
    assert [aicc(SATURATING, plain, num) is None for num in (5, 6)] == [True, False]
    assert [aicc(FREE_EXPONENT, plain, num) is None for num in (6, 7)] == [True, False]


def test_aicc_is_that_of_normal_errors_with_the_variance_among_the_parameters() -> None:
    log_t = with_exponent(EIGHT, 2e3, 1.0) + 0.02 * np.array([1, -1, 1, 1, -1, -1, 1, -1])
    fit = fit_family(SATURATING, EIGHT, log_t, 0.9)
    num, k = 8, 3
    likelihood = num * np.log(np.mean(fit.residuals**2))
    assert fit.aicc == pytest.approx(likelihood + 2 * k * num / (num - k - 1))


def test_an_interval_for_exponents_near_one_holds_where_that_of_one_alone_misses() -> None:
    batches, errors = EIGHT[::2], Errors(np.eye(4) * 0.05**2, 12.0, 12.0)
    log_t = with_exponent(batches, 2e3, 0.8)
    alone, nearly = (fit_family(family, batches, log_t, 0.9, errors) for family in (SATURATING, NEARLY_SATURATING))
    high = alone.critical_batch_tokens.high
    low = alone.critical_batch_tokens.low
    assert high is not None
    assert low is not None
    assert not low < 2e3 < high
    wide = nearly.critical_batch_tokens
    assert wide.low is not None
    assert wide.high is not None
    assert wide.low < 2e3 < wide.high


def test_a_robust_loss_hardly_follows_one_wrong_point() -> None:
    log_t = with_exponent(EIGHT, 2e3, 1.0)
    log_t[3] += 1.5
    plain, robust = (fit_family(SATURATING, EIGHT, log_t, 0.9, loss=loss) for loss in ("squares", "soft_l1"))
    truth = np.log(2e3)
    assert abs(robust.log_b_crit - truth) < 0.3 * abs(plain.log_b_crit - truth)


@pytest.mark.parametrize(
    ("residuals", "loss", "words"),
    [
        ("raw", "squares", "residuals 'raw' are unknown: one of log, raw_tokens, raw_steps"),
        ("log", "cauchy", "loss 'cauchy' is unknown: one of squares, soft_l1, huber"),
        ("raw_steps", "huber", "loss huber is for residuals of log T, not raw_steps"),
    ],
)
def test_what_is_compared_is_refused_where_it_means_nothing(residuals: str, loss: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_family(SATURATING, EIGHT, with_exponent(EIGHT, 2e3, 1.0), 0.9, None, residuals, loss)


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.7])
def test_log_batch_at_is_where_tokens_have_risen_so_far(alpha: float) -> None:
    def tokens(batch: float) -> float:
        return 1 + (batch / 2e3) ** alpha

    shape = np.log(np.array(2e3)), np.log(np.array(alpha))
    assert np.exp(log_batch_at(1.0)(*shape)) == pytest.approx(2e3)
    assert tokens(float(np.exp(log_batch_at(0.2)(*shape)))) == pytest.approx(1.2)
    assert tokens(float(np.exp(log_batch_at(0.2, 300.0)(*shape)))) == pytest.approx(1.2 * tokens(300.0))


def test_valley_has_twice_its_least_at_b_crit_and_slopes_that_are_its_derivatives() -> None:
    log_b_crit, depth, step = np.log(3_000.0), 0.15, 1e-6
    assert VALLEY.log_excess(np.array([log_b_crit]), np.array(log_b_crit), np.array(depth)) == pytest.approx(np.log(2))
    least = np.array([log_b_crit + np.log(depth / (1 + depth))])
    assert VALLEY.log_excess(least, np.array(log_b_crit), np.array(depth)) == pytest.approx(0.0, abs=1e-12)
    log_batch = np.log(np.geomspace(64.0, 65_536.0, 11))

    def excess(knee: float, bend: float) -> Array:
        return VALLEY.log_excess(log_batch, np.array(knee), np.array(bend))

    by_knee = (excess(log_b_crit + step, depth) - excess(log_b_crit - step, depth)) / (2 * step)
    by_depth = (excess(log_b_crit, depth + step) - excess(log_b_crit, depth - step)) / (2 * step)
    slopes = VALLEY.slopes(log_batch, np.array(log_b_crit), np.array(depth))
    assert np.allclose(slopes, [by_knee, by_depth], atol=1e-6)
