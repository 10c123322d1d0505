"""Means of normal samples with bounds: against independent maximisation, published fits and planted truth."""

import numpy as np
import pytest
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import log_ndtr

from analysis.statistics.censored import Samples, adjusted_log_likelihood, log_likelihood, means, profile_interval
from analysis.statistics.spread import constant_spread

#: Hours to failure of ten motorettes at each temperature (°C), and how many of them were still running at the last.
#: W. Nelson and G. J. Hahn, Technometrics 14 (1972) 247.
MOTORETTES = {
    150: ([8064] * 10, 10),
    170: ([1764, 2772, 3444, 3542, 3780, 4860, 5196, 5448, 5448, 5448], 3),
    190: ([408, 408, 1344, 1344, 1440, 1680, 1680, 1680, 1680, 1680], 5),
    220: ([408, 408, 504, 504, 504, 528, 528, 528, 528, 528], 5),
}


def drawn(rng: np.random.Generator, samples: int, runs: int, bound: float) -> Samples:
    """Draw standard normal samples, cut off at a bound; those with no exact value are left out."""
    values = rng.standard_normal((samples, runs))
    side = (values > bound).astype(float)
    found = Samples(np.minimum(values, bound), side, np.ones_like(values))
    return found.at(found.num_exact > 0)


def two_sided() -> Samples:
    rng = np.random.default_rng(0)
    side = rng.choice([0.0, 1.0, -1.0], p=[0.6, 0.3, 0.1], size=(40, 5))
    side[:, 0] = 0.0
    weight = rng.integers(1, 4, size=(40, 5)).astype(float)
    return Samples(rng.standard_normal((40, 5)), side, weight)


def likelihood_of(samples: Samples, place: int, mean: float, deviation: float) -> float:
    """Write out the log-likelihood of one sample, run by run."""
    total = 0.0
    for value, side, weight in zip(samples.values[place], samples.side[place], samples.weight[place], strict=True):
        z = (value - mean) / deviation
        total += weight * (-(z**2) / 2 if side == 0 else log_ndtr(-z) if side > 0 else log_ndtr(z))
    return float(total)


def test_means_are_those_of_an_independent_maximisation() -> None:
    samples = two_sided()
    found = means(samples, np.full(40, 0.8))
    for place, mean in enumerate(found):
        best = minimize_scalar(
            lambda m, place=place: -likelihood_of(samples, place, m, 0.8), (-5, 5), options={"xtol": 1e-12}
        )
        assert mean == pytest.approx(best.x, abs=1e-6)


def test_profile_intervals_end_where_the_likelihood_has_fallen() -> None:
    samples, t = two_sided(), 1.9
    mean = means(samples, np.full(40, 0.8))
    low, high = profile_interval(samples, mean, np.full(40, 0.8), np.full(40, t))
    for place, best in enumerate(mean):

        def excess(m: float, place: int = place, best: float = best) -> float:
            return 2 * (likelihood_of(samples, place, best, 0.8) - likelihood_of(samples, place, m, 0.8)) - t**2

        assert low[place] == pytest.approx(brentq(excess, best - 20, best), abs=1e-7)
        assert high[place] == pytest.approx(brentq(excess, best, best + 20), abs=1e-7)


def test_samples_without_bounds_have_their_mean_and_its_normal_interval() -> None:
    samples = drawn(np.random.default_rng(1), 8, 4, bound=9.0)
    mean, deviation = means(samples, np.ones(8)), np.full(8, 0.5)
    low, high = profile_interval(samples, mean, deviation, np.full(8, 2.0))
    assert mean == pytest.approx(samples.values.mean(axis=1))
    assert low == pytest.approx(mean - 0.5)  # 2 x 0.5 / sqrt(4)
    assert high == pytest.approx(mean + 0.5)


@pytest.mark.parametrize(
    ("temperatures", "kelvin", "unit", "published"),
    [
        # log10 hours: J. Schmee and G. J. Hahn, Technometrics 21 (1979) 417
        ((150, 170, 190, 220), 273.2, np.log(10), (-6.019, 4.311, 0.2592)),
        # natural logarithms: SAS/STAT User's Guide, LIFEREG, Motorette Failure, log-normal model
        ((170, 190, 220), 273.2, 1.0, (-10.4706, 8.3221, 0.6040)),
    ],
)
def test_likelihood_is_greatest_at_published_fits_of_the_motorettes(
    temperatures: tuple[int, ...], kelvin: float, unit: float, published: tuple[float, float, float]
) -> None:
    values = np.log([MOTORETTES[t][0] for t in temperatures]) / unit
    side = np.array([np.arange(10) >= 10 - MOTORETTES[t][1] for t in temperatures], float)
    samples, inverse = Samples(values, side, np.ones_like(values)), 1000 / (kelvin + np.array(temperatures))

    def minus_log_likelihood(p: np.ndarray) -> float:
        return -float(log_likelihood(samples, p[0] + p[1] * inverse, np.full(len(inverse), p[2])).sum())

    best = minimize(minus_log_likelihood, published, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
    assert best.x == pytest.approx(published, rel=2e-4)


def test_log_likelihood_is_the_published_one_of_the_motorettes() -> None:
    """SAS/STAT LIFEREG gives -24.4738 for the log-normal model of the 30 motorettes above 150 °C."""
    values = np.log([MOTORETTES[t][0] for t in (170, 190, 220)])
    side = np.array([np.arange(10) >= 10 - MOTORETTES[t][1] for t in (170, 190, 220)], float)
    mean = -10.4706 + 8.3221 * 1000 / (273.2 + np.array([170, 190, 220]))
    found = log_likelihood(Samples(values, side, np.ones_like(values)), mean, np.full(3, 0.6040)).sum()
    assert found - (side == 0).sum() * np.log(2 * np.pi) / 2 == pytest.approx(-24.4738, abs=1e-4)


@pytest.mark.parametrize("runs", [2, 3, 10])
def test_means_are_not_biased_by_runs_that_fall_short(runs: int) -> None:
    samples = drawn(np.random.default_rng(2), 4000, runs, bound=0.84)  # a fifth of the runs
    found = means(samples, np.ones(len(samples.values)))
    assert abs(found.mean()) < 0.06
    assert samples.mean_exact.mean() < -0.25  # what the survivors alone would say


@pytest.mark.parametrize("bound", [9.0, 1.5, 1.0, 0.5])
def test_pooled_variance_of_pairs_stays_near_the_truth_where_some_fall_short(bound: float) -> None:
    rng = np.random.default_rng(3)
    found = [constant_spread(drawn(rng, 24, 2, bound)).variance for _ in range(150)]
    assert np.mean(found) == pytest.approx(1.0, abs=0.1)


def test_adjusted_likelihood_of_exact_samples_is_greatest_at_the_pooled_variance() -> None:
    samples = drawn(np.random.default_rng(4), 6, 3, bound=9.0)
    pooled = np.log(samples.squares_exact.sum() / 12)  # 6 x (3 - 1)
    at, below, above = (
        adjusted_log_likelihood(samples, np.full(6, pooled + move)).sum() for move in (0.0, -0.01, 0.01)
    )
    assert at > max(below, above)
    assert above == pytest.approx(below, abs=1e-4)


def test_padded_lays_runs_out_by_sample() -> None:
    samples = Samples.padded([0, 0, 1], [1.0, 3.0, 5.0], [0, 1, 0])
    assert samples.values.tolist() == [[1.0, 3.0], [5.0, 0.0]]
    assert samples.side.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert samples.weight.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    assert samples.is_exact.tolist() == [False, True]
