"""Batches read off the points: their intervals repeat the choice of the cheapest one."""

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import Errors
from analysis.statistics.optimal_batch import cheapest_batch, largest_batch_within

Array = NDArray[np.float64]

SEVEN, FOUR, FIVE = 2.0 ** np.arange(16, 23), 4.0 ** np.arange(4, 8), 4.0 ** np.arange(3, 8)
#: log T over its least: two that only rise, and one that falls and rises.
CURVES = {
    "seven": (SEVEN, np.log1p(SEVEN / 1e6)),
    "four": (FOUR, np.log1p(FOUR / 2500.0)),
    "valley": (FIVE, np.log1p(FIVE / 3000.0) + np.log1p(150.0 / FIVE)),
}
DRAWS = 1000


def draws(log_tokens: Array, seeds: int, noise: float) -> list[tuple[Array, Errors]]:
    """Return measured log T with the errors that as many seeds give."""
    random, dof = np.random.default_rng(0), len(log_tokens) * (seeds - 1)
    size = noise / np.sqrt(seeds)
    return [
        (
            log_tokens + random.normal(0.0, size, len(log_tokens)),
            Errors(np.eye(len(log_tokens)) * size**2 * random.chisquare(dof) / dof, dof, dof),
        )
        for _ in range(DRAWS)
    ]


def share_that_holds(estimates: list[Estimate], truth: float) -> float:
    held = [(own.low or 0.0) <= truth * (1 + 1e-9) and truth <= (own.high or np.inf) for own in estimates]
    return float(np.mean(held))


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize(("seeds", "noise"), [(2, 0.05), (2, 0.1), (3, 0.05), (3, 0.1)])
def test_batch_within_five_percent_has_an_interval_that_covers(name: str, seeds: int, noise: float) -> None:
    batches, log_tokens = CURVES[name]
    truth = largest_batch_within(0.05, batches, log_tokens, 0.9, None).value
    assert truth is not None
    found = [largest_batch_within(0.05, batches, *own[:1], 0.9, own[1]) for own in draws(log_tokens, seeds, noise)]
    assert 0.85 <= share_that_holds(found, truth) <= 0.95
    widths = [np.log((own.high or np.inf) / own.low) for own in found if own.low is not None]
    assert np.median(widths) < 1.35  # of 2.8 to 5.5 that the batches span


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
def test_cheapest_batch_is_among_those_that_may_be_it(name: str) -> None:
    batches, log_tokens = CURVES[name]
    truth = float(batches[np.argmin(log_tokens)])
    found = [cheapest_batch(batches, *own[:1], 0.9, own[1]) for own in draws(log_tokens, 2, 0.1)]
    assert share_that_holds(found, truth) >= 0.9


def test_batch_within_five_percent_moves_with_the_cheapest_of_every_draw() -> None:
    """Of two equal least T either may be the lower one, and T within 5 % of that one ends earlier."""
    batches, log_tokens = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.0, 0.0, 0.045, 1.0])
    errors = Errors(np.diag([0.0001, 0.02, 0.0001, 0.0001]) ** 1.0, 20.0, 20.0)
    estimate = largest_batch_within(0.05, batches, log_tokens, 0.9, errors)
    assert estimate.value is not None
    assert estimate.value > 4
    assert estimate.low is not None
    assert estimate.low < 2


def test_batch_within_five_percent_takes_the_value_in_and_is_open_where_the_largest_may_be_it() -> None:
    batches, log_tokens = np.array([1.0, 2.0, 4.0]), np.array([0.0, 0.0, 0.06])
    estimate = largest_batch_within(0.05, batches, log_tokens, 0.9, Errors(np.eye(3) * 0.03**2, 6.0, 6.0))
    assert estimate.low is not None
    assert estimate.value is not None
    assert estimate.low <= estimate.value
    assert estimate.high is None
