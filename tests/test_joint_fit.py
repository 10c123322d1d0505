"""Two curves at once: against separate fits, brute force and simulation."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import NonlinearConstraint, minimize

from analysis.statistics.families import EXPONENT_SPREAD
from analysis.statistics.fit import fit_saturating
from analysis.statistics.intervals import Estimate
from analysis.statistics.joint_fit import JointFit, common_exponent, fit_two, resampled_exponent, resampled_ratios
from analysis.statistics.noise import Errors
from analysis.statistics.residuals import Observed
from analysis.statistics.two_curves import TwoCurves

Array = NDArray[np.float64]

BATCHES = np.array([256.0, 1024.0, 4096.0, 16384.0])
LOG_BATCH = np.log(np.concatenate([BATCHES, BATCHES]))
DOF = 12.0


def planted(t_min: float, b_crit: float, exponent: float = 1.0, batches: Array = BATCHES) -> Array:
    return np.asarray(np.log(t_min) + np.log1p((batches / b_crit) ** exponent))


TRUTH = np.concatenate([planted(180_000.0, 2_000.0), planted(120_000.0, 3_000.0)])


def curves(log_tokens: Array, covariance: Array | None = None) -> TwoCurves:
    covariance = 0.05**2 * np.eye(8) if covariance is None else covariance
    return TwoCurves(Observed(LOG_BATCH, log_tokens, Errors(covariance, DOF, DOF), "log", "squares"), 4)


def correlated(variance: float, correlation: float) -> Array:
    """Errors of which those of the two sides at one batch go together."""
    return np.asarray(variance * np.kron([[1.0, correlation], [correlation, 1.0]], np.eye(4)), float)


def noisy(seed: int, covariance: Array) -> Array:
    return TRUTH + np.linalg.cholesky(covariance) @ np.random.default_rng(seed).standard_normal(8)


def ends(estimate: Estimate) -> tuple[float, float, float]:
    assert estimate.value is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.value, estimate.low, estimate.high


def exponent_of(two: TwoCurves) -> Estimate:
    return common_exponent(two, fit_two(two, 0.9), 0.9)[0]


def width(estimate: Estimate) -> float:
    _, low, high = ends(estimate)
    return float(np.log(high / low))


RATIOS: dict[str, Callable[[JointFit], Estimate]] = {
    "small": lambda fit: fit.ratio_small_batch,
    "large": lambda fit: fit.ratio_large_batch,
    "batch": lambda fit: fit.critical_batch_ratio,
}


def test_joint_fit_without_shared_errors_is_two_separate_fits() -> None:
    """Its intervals are somewhat wider, since they do not take α = 1 for granted."""
    log_tokens = noisy(0, 0.05**2 * np.eye(8))
    fit = fit_two(curves(log_tokens), 0.9)
    for side in (0, 1):
        errors = Errors(0.05**2 * np.eye(4), DOF, DOF)
        alone = fit_saturating(BATCHES, log_tokens[4 * side : 4 * side + 4], 0.9, errors)
        (value, low, high), (own, own_low, own_high) = ends(fit.knee(side)), ends(alone.critical_batch_tokens)
        assert value == pytest.approx(own)
        assert own_low / 1.5 < low < own_low * 1.01
        assert own_high / 1.01 < high < own_high * 1.5
        assert np.exp(fit.best[2 * side]) == pytest.approx(alone.t_min_tokens.value)


def test_joint_fit_finds_the_planted_ratios() -> None:
    fit = fit_two(curves(TRUTH), 0.9)
    assert [ratio(fit).value for ratio in RATIOS.values()] == pytest.approx([1.5, 2.25, 1.5])


@pytest.mark.parametrize(
    ("name", "contrast"),
    [("small", [1, 0, -1, 0, 0]), ("large", [1, -1, -1, 1, 0]), ("batch", [0, -1, 0, 1, 0])],
)
def test_joint_fit_interval_ends_where_the_profile_passes_t_squared(name: str, contrast: list[int]) -> None:
    """By brute force: an end is where the misfit, at best with the ratio held there, is t² above the least."""
    covariance = correlated(0.05**2, 0.6)
    log_tokens = noisy(1, covariance)
    fit = fit_two(curves(log_tokens, covariance), 0.9)
    weight = np.linalg.inv(covariance)

    def misfit(parameters: Array) -> float:
        model = [planted(np.exp(t), np.exp(b), np.exp(parameters[4])) for t, b in parameters[:4].reshape(2, 2)]
        residuals = log_tokens - np.concatenate(model)
        return float(residuals @ weight @ residuals + (parameters[4] / EXPONENT_SPREAD) ** 2)

    def log_ratio(parameters: Array) -> Array:
        power = np.exp(parameters[4]) if name == "large" else 1.0
        return np.array([np.array(contrast) @ np.multiply(parameters, [1, power, 1, power, 1])])

    least = minimize(misfit, fit.best, tol=1e-10).fun
    for end in ends(RATIOS[name](fit))[1:]:
        held = NonlinearConstraint(log_ratio, np.log(end), np.log(end))
        there = minimize(misfit, fit.best, method="SLSQP", tol=1e-10, constraints=[held]).fun
        assert there - least == pytest.approx(fit.scale.allowed, rel=0.03)


def test_joint_fit_of_swapped_sides_inverts_every_ratio() -> None:
    log_tokens = noisy(2, 0.05**2 * np.eye(8))
    fit, swapped = fit_two(curves(log_tokens), 0.9), fit_two(curves(np.roll(log_tokens, 4)), 0.9)
    for ratio in RATIOS.values():
        value, low, high = ends(ratio(swapped))
        assert (1 / value, 1 / high, 1 / low) == pytest.approx(ends(ratio(fit)), rel=1e-3)


def test_joint_fit_of_scaled_tokens_is_the_same() -> None:
    log_tokens = noisy(2, 0.05**2 * np.eye(8))
    fit = fit_two(curves(log_tokens), 0.9)
    scaled = Observed(LOG_BATCH + 3.0, log_tokens + 3.0, Errors(0.05**2 * np.eye(8), DOF, DOF), "log", "squares")
    for ratio in RATIOS.values():
        assert ends(ratio(fit_two(TwoCurves(scaled, 4), 0.9))) == pytest.approx(ends(ratio(fit)), rel=1e-4)


def test_joint_fit_is_surer_of_ratios_where_errors_are_shared() -> None:
    apart, shared = (fit_two(curves(TRUTH, correlated(0.05**2, rho)), 0.9) for rho in (0.0, 0.9))
    for ratio in RATIOS.values():
        assert width(ratio(shared)) < 0.5 * width(ratio(apart))


def test_joint_fit_bounds_only_the_ratios_that_a_knee_beyond_the_grid_leaves() -> None:
    far = np.concatenate([planted(180_000.0, 2_000.0), planted(120_000.0, 1e7)])
    fit = fit_two(curves(far), 0.9)
    assert width(fit.ratio_small_batch) < 0.3
    assert fit.ratio_large_batch.high is None
    assert fit.critical_batch_ratio.high is None
    assert ends(fit.knee(0))[0] == pytest.approx(2_000.0, rel=1e-3)
    assert (fit.knee(1).high, fit.ratio_large_batch.low is None) == (None, False)


def test_joint_fit_at_equal_tokens_lets_the_critical_batch_grow_with_tokens() -> None:
    fit = fit_two(curves(TRUTH), 0.9)
    assert fit.batch_ratio_at_equal_tokens(0.5).value == pytest.approx(1.5 * 1.5**0.5)
    assert ends(fit.batch_ratio_at_equal_tokens(0.0)) == pytest.approx(ends(fit.critical_batch_ratio))
    # the ratio of S_min is that of T_min times that of B_crit
    assert fit.batch_ratio_at_equal_tokens(1.0).value == pytest.approx(fit.ratio_large_batch.value)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [0.8, 1.0])
def test_joint_fit_covers_the_truth_nine_times_in_ten_also_where_the_exponent_is_not_one(exponent: float) -> None:
    covariance = correlated(0.07**2, 0.5)
    truth = np.concatenate([planted(180_000.0, 2_000.0, exponent), planted(120_000.0, 3_000.0, exponent)])
    rng = np.random.default_rng(3)
    hits = []
    for draw in range(150):
        known = Errors(covariance * rng.chisquare(DOF) / DOF, DOF, DOF)
        log_tokens = noisy(1000 + draw, covariance) - TRUTH + truth
        fit = fit_two(TwoCurves(Observed(LOG_BATCH, log_tokens, known, "log", "squares"), 4), 0.9)
        planted_ratios = zip(RATIOS.values(), (1.5, 1.5 * 1.5**exponent, 1.5), strict=True)
        hits.append([ends(ratio(fit))[1] <= own <= ends(ratio(fit))[2] for ratio, own in planted_ratios])
    assert np.all(np.mean(hits, axis=0) >= 0.86)
    assert np.all(np.mean(hits, axis=0) <= 0.98)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.5])
def test_common_exponent_is_the_planted_one(exponent: float) -> None:
    log_tokens = np.concatenate([planted(180_000.0, 2_000.0, exponent), planted(120_000.0, 3_000.0, exponent)])
    estimate = exponent_of(curves(log_tokens, 0.01**2 * np.eye(8)))
    value, low, high = ends(estimate)
    assert value == pytest.approx(exponent, rel=1e-4)
    assert 0.9 < low / value < 1 < high / value < 1.1


def test_common_exponent_has_no_end_where_the_data_give_none() -> None:
    estimate = exponent_of(curves(TRUTH, 30.0**2 * np.eye(8)))
    assert (estimate.low, estimate.high) == (None, None)


ZIGZAG = 0.06 * np.array([1, -1, 1, -1, 1, -1, 1, -1.0])


def test_a_misfit_that_another_exponent_does_not_mend_leaves_it_at_one() -> None:
    fit = fit_two(curves(TRUTH + ZIGZAG, 0.01**2 * np.eye(8)), 0.9)
    assert fit.scale.birge_factor > 3
    assert fit.refutation is None
    assert fit.best[4] == pytest.approx(0.0, abs=1e-6)


def test_an_exponent_that_is_not_one_is_refuted_by_what_it_takes_off_the_misfit() -> None:
    bent = np.concatenate([planted(180_000.0, 2_000.0, 1.5), planted(120_000.0, 3_000.0, 1.5)])
    fit = fit_two(curves(bent, 0.01**2 * np.eye(8)), 0.9)
    assert fit.refutation is not None
    assert fit.refutation < 0.01
    assert np.exp(fit.best[4]) == pytest.approx(1.5, rel=0.02)


def test_the_spread_of_the_exponent_is_weighed_against_the_scatter_that_the_points_have() -> None:
    """With errors a hundred times too small, the exponent is as free as the scatter of the points makes it."""
    small, right = (fit_two(curves(TRUTH + ZIGZAG, error**2 * np.eye(8)), 0.9) for error in (0.0006, 0.006))
    assert small.prior / right.prior == pytest.approx(100, rel=0.01)
    assert width(small.critical_batch_ratio) == pytest.approx(width(right.critical_batch_ratio), rel=0.02)


def test_resampled_ratios_and_exponents_spread_as_the_interval_says() -> None:
    covariance = correlated(0.03**2, 0.5)
    fit = fit_two(curves(TRUTH, covariance), 0.9)
    rng = np.random.default_rng(4)
    drawn = TRUTH + rng.standard_normal((2000, 8)) @ np.linalg.cholesky(covariance).T
    two = curves(TRUTH, covariance)
    resampled = [*resampled_ratios(two, fit, drawn), resampled_exponent(two, fit, drawn)]
    estimates = [*(ratio(fit) for ratio in RATIOS.values()), exponent_of(two)]
    for own, estimate in zip(resampled, estimates, strict=True):
        low, high = np.quantile(own, [0.05, 0.95], axis=-1)
        assert np.log(np.max(high) / np.min(low)) == pytest.approx(width(estimate) * 1.645 / 1.782, rel=0.08)
