"""The fit against published numbers, planted truth, and its limits."""

import numpy as np
import pytest

from analysis.statistics.families import FREE_EXPONENT, SATURATING
from analysis.statistics.fit import Array, fit_family, fit_saturating
from analysis.statistics.noise import Errors

BATCH_SEQUENCES = np.array([64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384], float)

#: arXiv 2410.21676: millions of parameters, steps to the target at BATCH_SEQUENCES, published B*.
ZHANG = [
    (85, [46000, 23000, 13282, 7000, 3840, 2528, 1917, 1600, 1600], 745.320),
    (151, [96000, 49000, 24000, 12000, 7128, 4350, 2940, 2400, 2300], 955.158),
    (302, [196000, 90000, 46000, 23400, 13300, 7224, 4980, 3400, 2879], 1393.727),
    (604, [311000, 166000, 81000, 37440, 21320, 11400, 7199, 4700, 3800], 1888.522),
    (1200, [642000, 331000, 176000, 94000, 46500, 25000, 15360, 8900, 6500], 2533.411),
]


def overhead_20pct_of(steps: list[int]) -> float:
    fit = fit_saturating(BATCH_SEQUENCES, np.log(np.array(steps) * BATCH_SEQUENCES), level=0.9)
    assert fit.critical_batch_tokens.value is not None
    return 1.2 * 256 + 0.2 * fit.critical_batch_tokens.value


@pytest.mark.parametrize(("millions", "steps", "published"), ZHANG)
def test_fit_gives_the_published_critical_batches(millions: int, steps: list[int], published: float) -> None:
    assert overhead_20pct_of(steps) == pytest.approx(published, rel=1e-5), millions


def test_fit_gives_the_published_law_of_model_size() -> None:
    millions = np.array([row[0] for row in ZHANG])
    exponent, log_factor = np.polyfit(np.log(millions), np.log([overhead_20pct_of(row[1]) for row in ZHANG]), 1)
    assert exponent == pytest.approx(0.46828, abs=1e-4)
    assert np.exp(log_factor) == pytest.approx(93.197, rel=1e-4)


def planted(batches: Array, t_min: float, b_crit: float) -> Array:
    return np.asarray(np.log(t_min * (1 + batches / b_crit)))


@pytest.mark.parametrize("b_crit", [100.0, 2_000.0, 50_000.0])
def test_fit_recovers_an_exact_curve(b_crit: float) -> None:
    batches = np.array([256.0, 1024.0, 4096.0, 16384.0])
    errors = Errors(np.eye(4) * 1e-4, dof=12.0, contrast_dof=12.0)
    fit = fit_saturating(batches, planted(batches, 1e5, b_crit), 0.9, errors)
    for estimate, truth in (
        (fit.critical_batch_tokens, b_crit),
        (fit.t_min_tokens, 1e5),
        (fit.s_min_steps, 1e5 / b_crit),
        (fit.tokens_at(np.array([3000]))[0], 1e5 * (1 + 3000 / b_crit)),
    ):
        assert estimate.value == pytest.approx(truth, rel=1e-4)
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < truth < estimate.high


def test_fit_profile_agrees_with_the_linear_approximation_when_noise_is_small() -> None:
    batches, error = np.array([256.0, 1024.0, 4096.0, 16384.0]), 1e-3
    fit = fit_saturating(batches, planted(batches, 1e5, 2000.0), 0.9, Errors(np.eye(4) * error**2, 1e6, 1e6))
    jacobian = np.column_stack([np.ones(4), -batches / (batches + 2000.0)])
    half = 1.6449 * error * np.sqrt(np.linalg.inv(jacobian.T @ jacobian)[1, 1])
    estimate = fit.critical_batch_tokens
    assert estimate.low is not None
    assert estimate.high is not None
    assert np.log(estimate.high / estimate.low) / 2 == pytest.approx(half, rel=1e-2)


def test_fit_knows_a_variance_from_misfit_to_the_spare_points_only() -> None:
    batches, error = np.array([256.0, 1024.0, 4096.0, 16384.0]), 0.01
    bent = planted(batches, 1e5, 2000.0) + np.array([1.0, -1.0, 1.0, -1.0]) * 3 * error
    fit = fit_saturating(batches, bent, 0.9, Errors(np.eye(4) * error**2, 12.0, 12.0))
    assert fit.scale.birge_factor > 1
    assert (
        fit.scale.allowed == fit.scale.allowed_batch == pytest.approx(2.919986**2, rel=1e-6)
    )  # t of 2 degrees of freedom


def test_fit_bounds_t_min_from_below_only_where_its_own_interval_does() -> None:
    """The region of T_min is that of all errors, wider than the contrasts' that bounds B_crit."""
    batches = np.array([256.0, 1024.0, 4096.0, 16384.0])
    fit = fit_saturating(batches, planted(batches, 1e5, 150.0), 0.9, Errors(np.eye(4) * 0.01, 1.0, 100.0))
    assert fit.critical_batch_tokens.low is not None
    assert fit.t_min_tokens.low is None


def test_fit_leaves_the_interval_open_where_the_knee_is_beyond_the_batches() -> None:
    batches = np.array([256.0, 1024.0, 4096.0, 16384.0])
    errors = Errors(np.eye(4) * 0.01, 12.0, 12.0)
    above = fit_saturating(batches, planted(batches, 1e5, 1e7), 0.9, errors)
    assert above.critical_batch_tokens.high is None
    assert above.critical_batch_tokens.low is not None
    assert above.s_min_steps.low is None
    assert above.t_min_tokens.low is not None
    below = fit_saturating(batches, planted(batches, 1e5, 1.0), 0.9, errors)
    assert below.critical_batch_tokens.low is None
    assert below.t_min_tokens.low is None
    assert below.s_min_steps.low is not None


def test_fit_of_a_falling_curve_gives_no_critical_batch() -> None:
    fit = fit_saturating(np.array([256.0, 1024.0, 4096.0]), np.log([3e5, 2e5, 1e5]), 0.9)
    assert fit.critical_batch_tokens.value is None
    assert fit.s_min_steps.value is None


def test_fit_takes_the_variance_from_residuals_from_k_plus_three_points_on_the_variance_counted() -> None:
    batches = 256.0 * 2.0 ** np.arange(6)
    wiggle = np.array([0.05, -0.05, 0.02, 0.03, -0.05, 0.01])
    assert fit_saturating(batches, planted(batches, 1e5, 2e3) + wiggle, 0.9).critical_batch_tokens.low is not None
    few = fit_saturating(batches[:5], planted(batches, 1e5, 2e3)[:5] + wiggle[:5], 0.9)
    assert few.critical_batch_tokens.value is not None
    assert few.critical_batch_tokens.low is None
    assert few.tokens_at(np.array([1000]))[0].low is None


def test_fit_widens_intervals_when_the_curve_misfits() -> None:
    batches = 256.0 * 2.0 ** np.arange(6)
    errors = Errors(np.eye(6) * 1e-4, 12.0, 12.0)
    bump = np.array([0.0, 0.1, -0.1, 0.1, -0.1, 0.0])
    good = fit_saturating(batches, planted(batches, 1e5, 2e3), 0.9, errors)
    bad = fit_saturating(batches, planted(batches, 1e5, 2e3) + bump, 0.9, errors)
    assert good.scale.birge_factor == 1.0
    assert good.scale.lack_of_fit_p == pytest.approx(1.0)
    assert bad.scale.lack_of_fit_p is not None
    assert bad.scale.lack_of_fit_p < 1e-6
    assert bad.scale.birge_factor == pytest.approx(float(np.sqrt(bad.residuals @ bad.residuals / 1e-4 / 4)), rel=1e-6)


def test_raw_residuals_move_the_reference_table_as_far_as_is_known() -> None:
    moved = [knee(steps, residuals="raw_tokens") / knee(steps) - 1 for _, steps, _ in ZHANG]
    assert min(moved) == pytest.approx(-0.16, abs=0.005)
    steps_moved = [abs(knee(steps, residuals="raw_steps") / knee(steps) - 1) for _, steps, _ in ZHANG]
    assert max(steps_moved) > 0.16


def test_a_robust_loss_moves_the_published_critical_batches_by_less_than_a_percent() -> None:
    moved = [abs((307.2 + 0.2 * knee(steps, loss="soft_l1")) / published - 1) for _, steps, published in ZHANG]
    assert max(moved) == pytest.approx(0.009, abs=0.0005)


def knee(steps: list[int], residuals: str = "log", loss: str = "squares") -> float:
    log_tokens = np.log(np.array(steps) * BATCH_SEQUENCES)
    fit = fit_family(SATURATING, BATCH_SEQUENCES, log_tokens, 0.9, None, residuals, loss)
    assert fit.critical_batch_tokens.value is not None
    return fit.critical_batch_tokens.value


def test_a_curve_through_three_points_of_any_exponent_comes_to_an_end() -> None:
    """Its misfit has a plateau without an end, on which an exhaustive search would wander for ever."""
    errors = Errors(np.diag([0.002, 0.012, 0.012]), 5.0, 5.0)
    log_tokens = np.array([11.83048295, 12.41128382, 12.57869007])
    fit = fit_family(FREE_EXPONENT, np.array([256.0, 2048.0, 4096.0]), log_tokens, 0.93, errors)
    assert np.max(np.abs(fit.residuals)) < 0.1
