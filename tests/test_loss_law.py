"""Loss laws in arrays: planted truth, inverses, errors, and what few budgets can and cannot tell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from analysis.statistics.law_curves import Curves
from analysis.statistics.loss_law import LossLaw, fit_loss_law
from analysis.statistics.noise import Errors, t_quantile

Array = NDArray[np.float64]

FLOOR = 1.8
HEIGHT = np.array([0.9, 1.0, 1.3, 1.9])
EXPONENT = np.array([0.45, 0.42, 0.38, 0.35])
TOKENS = np.array([1e6, 2e6, 4e6, 8e6])
BATCH = np.repeat(np.arange(4), len(TOKENS))


def losses(exponent: Array = EXPONENT, tokens: Array = TOKENS) -> Array:
    """Return L = floor + height (D / 10^6)^-exponent of every batch and budget."""
    return (FLOOR + HEIGHT[:, None] * (tokens / 1e6) ** -exponent[:, None]).ravel()


def true_log_tokens(target: float, exponent: Array = EXPONENT) -> Array:
    return np.asarray(np.log(1e6) - np.log((target - FLOOR) / HEIGHT) / exponent)


def fitted(values: Array, tokens: Array = TOKENS, errors: Errors | None = None) -> LossLaw:
    return fit_loss_law(np.repeat(np.arange(4), len(tokens)), np.tile(tokens, 4), values, errors)


def known_noise(sigma: float, num_points: int = len(BATCH)) -> Errors:
    return Errors(np.eye(num_points) * sigma**2, 30.0, 30.0)


def test_loss_law_recovers_floor_exponents_and_prefactors_of_every_batch() -> None:
    law = fitted(losses())
    assert law.floor_nats(0.9)[0] == pytest.approx(FLOOR, abs=1e-6)
    assert [value for value, _, _ in law.exponents(0.9)] == pytest.approx(EXPONENT, abs=1e-6)
    assert law.log_prefactors() == pytest.approx(np.log(HEIGHT) + EXPONENT * np.log(1e6), abs=1e-5)
    assert not law.shared_exponent


def test_derivatives_of_the_law_are_those_of_finite_differences() -> None:
    curves = Curves(BATCH, np.tile(np.log(TOKENS / 2.8e6), 4), 4, 2.5)
    parameters = np.array(
        [[0.9, 2.4, 2.5, 2.7, 3.1, 0.3, 0.25, 0.3, 0.4], [0.0, 2.4, 2.5, 2.7, 3.1, 0.3, 0.2, 0.3, 0.4]]
    )
    steps = 1e-6 * np.eye(parameters.shape[1])
    numeric = [(curves.losses(parameters + step) - curves.losses(parameters - step)) / 2e-6 for step in steps]
    assert curves.derivatives(parameters) == pytest.approx(np.stack(numeric, axis=-1), abs=1e-8)


def test_two_budgets_a_batch_share_an_exponent() -> None:
    one = np.full(4, 0.4)
    two = TOKENS[[0, 3]]
    law = fitted(losses(one, two), two)
    assert law.shared_exponent
    assert law.floor_nats(0.9)[0] == pytest.approx(FLOOR, abs=1e-5)
    assert law.log_tokens(2.7) == pytest.approx(true_log_tokens(2.7, one), abs=1e-6)


def test_two_budgets_of_one_batch_are_joined_by_a_straight_line() -> None:
    law = fit_loss_law(np.zeros(2, int), np.array([1e6, 4e6]), np.array([3.0, 2.6]), known_noise(0.01, 2))
    assert np.exp(law.log_tokens(2.8)) == pytest.approx([2e6])
    assert law.floor_nats(0.9) == (None, None, None)
    assert law.covariance is None


def test_losses_on_a_straight_line_have_no_floor() -> None:
    straight = (3.0 + 0.1 * np.arange(4)[:, None] - 0.2 * np.log(TOKENS / 1e6)).ravel()
    law = fitted(straight)
    assert law.floor_nats(0.9)[0] is None
    assert law.log_prefactors() == [None] * 4
    assert law.log_tokens(2.9) == pytest.approx(np.log(1e6) + (0.1 + 0.1 * np.arange(4)) / 0.2, abs=1e-4)


@given(st.floats(min_value=1.9, max_value=4.0))
def test_log_tokens_is_the_inverse_of_the_law(target: float) -> None:
    law = fitted(losses())
    assert law.losses_at(law.log_tokens(target)) == pytest.approx(np.full(4, target), abs=1e-6)


def test_log_tokens_below_the_floor_is_infinite() -> None:
    assert np.all(np.isposinf(fitted(losses()).log_tokens(FLOOR - 0.01)))


@settings(deadline=None)
@given(st.floats(min_value=1e-3, max_value=1e3))
def test_scaling_all_tokens_scales_the_tokens_to_a_target(factor: float) -> None:
    noisy = losses() + 0.003 * np.random.default_rng(0).standard_normal(len(BATCH))
    plain, scaled = fitted(noisy), fitted(noisy, factor * TOKENS)
    assert scaled.log_tokens(2.6) == pytest.approx(plain.log_tokens(2.6) + np.log(factor), abs=1e-6)


def test_rising_losses_are_told_from_falling_ones() -> None:
    values = losses().reshape(4, -1)
    values[2] = values[2][::-1]
    assert fitted(values.ravel()).falls.tolist() == [True, True, False, True]


def test_losses_that_come_to_their_floor_before_the_largest_budget_do_not_fall() -> None:
    level = fit_loss_law(np.zeros(5, int), TOKENS[0] * 4.0 ** np.arange(5), np.array([3.0, 2.5, 2.5, 2.5, 2.5]))
    assert level.falls.tolist() == [False]


def test_intervals_of_log_tokens_and_their_differences_cover_the_truth() -> None:
    sigma, rng = 0.004, np.random.default_rng(1)
    inside, contrasts, floors = [], [], []
    for _ in range(300):
        law = fitted(losses() + sigma * rng.standard_normal(len(BATCH)), errors=known_noise(sigma))
        log_tokens = law.log_tokens(2.6)
        errors = law.errors_at(log_tokens, np.arange(4))
        assert errors is not None
        miss = np.abs(log_tokens - true_log_tokens(2.6))
        inside.append(miss < t_quantile(0.9, errors.dof) * np.sqrt(np.diag(errors.covariance)))
        difference = (log_tokens - true_log_tokens(2.6)) @ [1, 0, 0, -1]
        contrasts.append(abs(difference) < t_quantile(0.9, errors.contrast_dof) * errors.of_difference(0, 3))
        _, low, high = law.floor_nats(0.9)
        floors.append((low is None or low <= FLOOR) and (high is None or high >= FLOOR))
    for covered in (inside, contrasts, floors):
        assert 0.86 < np.mean(covered) < 0.95


def test_errors_come_from_residuals_where_three_points_are_to_spare() -> None:
    rng = np.random.default_rng(2)
    seven = np.array([1e6, 2e6, 4e6, 8e6, 16e6, 32e6, 64e6])
    law = fitted(losses(tokens=seven) + 0.01 * rng.standard_normal(28), seven)
    errors = law.errors_at(law.log_tokens(2.6), np.arange(4))
    assert errors is not None
    assert errors.dof == 28 - 9
    few = TOKENS[[0, 1, 3]]
    assert fit_loss_law(np.repeat([0, 1], 3), np.tile(few, 2), losses(tokens=few)[:6]).covariance is None


def test_a_misfit_beyond_the_noise_widens_the_errors() -> None:
    wiggle = 0.05 * np.tile([1.0, -1.0, -1.0, 1.0], 4) * np.repeat([1, -1, 1, -1], 4)
    sigma = 0.002
    good, bad = fitted(losses(), errors=known_noise(sigma)), fitted(losses() + wiggle, errors=known_noise(sigma))
    assert good.birge_factor == 1.0
    assert bad.lack_of_fit_p is not None
    assert bad.lack_of_fit_p < 1e-6
    assert bad.birge_factor > 5
    assert bad.dof == 16 - 9


def test_exponents_of_their_own_keep_tokens_unbiased_where_one_for_all_would_not() -> None:
    apart = np.array([0.5, 0.4, 0.3, 0.25])
    law = fitted(losses(apart))
    assert law.log_tokens(2.6) == pytest.approx(true_log_tokens(2.6, apart), abs=1e-6)
    two = TOKENS[[0, 3]]
    assert np.abs(fitted(losses(apart, two), two).log_tokens(2.6) - true_log_tokens(2.6, apart)).max() > 0.01
