"""Normal samples of which some values are known by a bound alone: mean, interval, and the likelihood of the spread.

With log T for the values this is the log-normal accelerated-failure-time model, a Tobit model with one mean a sample: a
run that fell short of its target has T above its last mark, one that was there at its first mark has T below that. To
drop such runs, or to take bounds for values, biases the mean and makes the spread too small.

Sources: J. Tobin, Econometrica 26 (1958) 24; for failure times Kalbfleisch and Prentice, The Statistical Analysis of
Failure Time Data (2002), chapter 3. Shapes: samples [samples, runs], padded by runs of weight 0.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_ndtr

Array = NDArray[np.float64]

_NEWTON_STEPS = 30


@dataclass(frozen=True)
class Samples:
    """Values [samples, runs], their side and weight.

    side: 0 where the value is exact, +1 where the truth lies above it (right-censored), -1 below (left-censored).
    weight: how often a run counts; 0 for padding. A sample without an exact value has no mean.
    """

    values: Array
    side: Array
    weight: Array

    @classmethod
    def padded(cls, sample: ArrayLike, values: ArrayLike, side: ArrayLike) -> "Samples":
        """Lay out runs [runs], sorted by the number of their sample from 0 on, as one row a sample."""
        sample = np.asarray(sample, int)
        sizes = np.bincount(sample)
        place = np.arange(len(sample)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.zeros((3, len(sizes), int(sizes.max(initial=0))))
        for row, known in zip(rows, (values, side, 1.0), strict=True):
            row[sample, place] = known
        return cls(*rows)

    @property
    def num_exact(self) -> Array:
        """Weight of the exact values [samples]."""
        return np.asarray((self.weight * (self.side == 0)).sum(axis=1), float)

    @property
    def mean_exact(self) -> Array:
        """Mean of the exact values alone [samples]."""
        return np.asarray((self.weight * self.values * (self.side == 0)).sum(axis=1) / self.num_exact, float)

    @property
    def squares_exact(self) -> Array:
        """Sum of squares of the exact values around their mean [samples]."""
        exact = self.weight * (self.side == 0)
        return np.asarray((exact * (self.values - self.mean_exact[:, None]) ** 2).sum(axis=1), float)

    @property
    def is_exact(self) -> NDArray[np.bool_]:
        """Whether a sample has no bound at all [samples]."""
        return np.asarray(~((self.side != 0) & (self.weight > 0)).any(axis=1), bool)

    def at(self, which: NDArray[np.bool_] | NDArray[np.int_]) -> "Samples":
        """Return some of the samples."""
        return Samples(self.values[which], self.side[which], self.weight[which])


def means(samples: Samples, deviation: Array) -> Array:
    """Return the most likely mean of each sample, its standard deviation [samples] given.

    The logarithm of the likelihood is concave in the mean; Newton's steps are held within one standard deviation.
    """
    mean = samples.mean_exact
    open_ = np.flatnonzero(~samples.is_exact)
    slopes, spread, place = _Slopes.of(samples.at(open_)), deviation[open_], mean[open_]
    for _ in range(_NEWTON_STEPS if len(open_) else 0):
        slope, bend = slopes.at(place, spread)
        step = np.clip(slope / bend, -spread, spread)
        place = place + step
        if np.all(np.abs(step) <= 1e-9 * spread):
            break
    mean[open_] = place
    return mean


def information(samples: Samples, mean: Array, deviation: Array) -> Array:
    """Return minus the second derivative of the log-likelihood at the mean [samples]: runs / variance if all exact."""
    return _Slopes.of(samples).at(mean, deviation)[1]


def profile_interval(samples: Samples, mean: Array, deviation: Array, t: Array) -> tuple[Array, Array]:
    """Return the ends where twice the log-likelihood has fallen by t² [samples] from its maximum, at `mean`.

    For exact samples they are mean ± t · deviation / √n. The exact values alone bound the region, so that Newton's
    method comes down to it from outside, along a convex function.
    """
    reach = t * deviation / np.sqrt(samples.num_exact)
    best, slopes = log_likelihood(samples, mean, deviation), _Slopes.of(samples)
    ends = []
    for side in (-1.0, 1.0):
        place = mean + side * reach
        for _ in range(_NEWTON_STEPS):
            excess = 2 * (best - log_likelihood(samples, place, deviation)) - t**2
            slope = -2 * slopes.at(place, deviation)[0]
            place = place - np.where(np.abs(excess) > 1e-12, excess / slope, 0.0)
        ends.append(place)
    return ends[0], ends[1]


def log_likelihood(samples: Samples, mean: Array, deviation: Array) -> Array:
    """Return the log-likelihood of each sample [samples], less what depends on neither mean nor data."""
    z = (samples.values - mean[:, None]) / deviation[:, None]
    exact = -(z**2) / 2 - np.log(deviation)[:, None]
    return np.asarray((samples.weight * np.where(samples.side == 0, exact, log_ndtr(-samples.side * z))).sum(axis=1))


def adjusted_log_likelihood(samples: Samples, log_variance: Array) -> Array:
    """Return the log-likelihood of each sample's log variance [samples] at its best mean, which is paid for.

    The most likely variance of n runs is too small by (n - 1) / n, so the likelihood is that of (n - 1) / n times the
    variance, and weighs as much. For exact samples it is the restricted likelihood, with its maximum at the sum of
    squares over n - 1. With bounds it keeps the pooled variance within 8 % of the truth where up to a third of pairs or
    triples of runs fall short; to integrate the mean out makes it up to twice too large, to drop them half as large.
    """
    count = samples.weight.sum(axis=1)
    deviation = np.exp(log_variance / 2) * np.sqrt((count - 1) / count)
    return np.asarray((count - 1) / count * log_likelihood(samples, means(samples, deviation), deviation), float)


@dataclass(frozen=True)
class _Slopes:
    """Derivatives of the log-likelihood by the mean: what the exact values give in sum, and the bounds one by one."""

    num_exact: Array
    mean_exact: Array
    bounds: Samples

    @classmethod
    def of(cls, samples: Samples) -> "_Slopes":
        weight = samples.weight * (samples.side != 0)
        with_bounds = weight.any(axis=0)
        bounds = Samples(samples.values[:, with_bounds], samples.side[:, with_bounds], weight[:, with_bounds])
        return cls(samples.num_exact, samples.mean_exact, bounds)

    def at(self, mean: Array, deviation: Array) -> tuple[Array, Array]:
        """Return the first and minus the second derivative [samples]."""
        side, weight = self.bounds.side, self.bounds.weight
        signed = side * (mean[:, None] - self.bounds.values) / deviation[:, None]
        mills = np.exp(-(signed**2) / 2 - log_ndtr(signed)) / np.sqrt(2 * np.pi)
        slope = self.num_exact * (self.mean_exact - mean) / deviation + (weight * side * mills).sum(axis=1)
        bend = self.num_exact + (weight * mills * (signed + mills)).sum(axis=1)
        return slope / deviation, bend / deviation**2
