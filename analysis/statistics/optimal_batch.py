"""Batches read off the points of T(B) themselves, without a curve: the cheapest one, and how far T stays near it.

Shapes: B in tokens and log T [n], smallest batch first.
"""

import numpy as np
from scipy.special import ndtri

from analysis.statistics.families import Array
from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import Errors, t_quantile
from analysis.statistics.resampling import normal_draws


def cheapest_batch(batches: Array, log_tokens: Array, level: float, errors: Errors | None) -> Estimate:
    """Return the largest B with T(B) = min T; its ends are the batches whose T may be the least one.

    No value where the largest batch is the cheapest, and no upper end where it may be: more might be as cheap. Each
    batch is compared by a one-sided t test, Bonferroni over all, since the minimum was picked for being low.

    Source: arXiv 2505.02222, eq. 6.
    """
    lowest, last = _lowest(log_tokens), len(log_tokens) - 1
    value = None if lowest == last else float(batches[lowest])
    if errors is None:
        return Estimate(value)
    quantile = t_quantile(1 - 2 * (1 - level) / max(last, 1), errors.contrast_dof)
    may_be = np.flatnonzero(log_tokens - log_tokens[lowest] <= quantile * _error_of_excess(errors, lowest))
    high = None if may_be[-1] == last else float(batches[may_be[-1]])
    return Estimate(value, float(batches[may_be[0]]), high)


def largest_batch_within(
    share: float, batches: Array, log_tokens: Array, level: float, errors: Errors | None
) -> Estimate:
    """Return the largest B with T(B) <= (1 + share) min T, log T interpolated in log B.

    No value and no upper end where the largest batch is within that share. The ends are percentiles over draws of all
    log T, widened from the normal to the t distribution: each draw has a cheapest batch of its own, since errors of an
    excess over one that was picked for being low would be too small. By simulation they cover 89 to 93 % where they
    say 90, at two and three seeds with 5 and 10 % noise.
    """
    limit, log_batch = float(np.log1p(share)), np.log(np.asarray(batches, float))
    value = float(_last_crossings(log_batch, log_tokens[None], limit)[0])
    if errors is None:
        return Estimate(_finite(value))
    spread = t_quantile(level, errors.contrast_dof) / ndtri(0.5 + level / 2)
    noise = normal_draws(len(log_batch)) @ np.linalg.cholesky(errors.covariance).T
    drawn = _last_crossings(log_batch, log_tokens + spread * noise, limit)
    low = float(np.quantile(drawn, 0.5 - level / 2, method="lower"))
    high = float(np.quantile(drawn, 0.5 + level / 2, method="higher"))
    return Estimate(_finite(value), _finite(min(low, value, log_batch[-1])), _finite(max(high, value)))


def _lowest(log_tokens: Array) -> int:
    """Return the place of the least T, of equal ones the largest batch."""
    return len(log_tokens) - 1 - int(np.argmin(log_tokens[::-1]))


def _error_of_excess(errors: Errors, lowest: int) -> Array:
    """Return the standard error of log T over that of the lowest [n]."""
    variance = np.diag(errors.covariance)
    return np.asarray(np.sqrt(np.maximum(variance + variance[lowest] - 2 * errors.covariance[lowest], 0.0)))


def _last_crossings(log_batch: Array, log_tokens: Array, limit: float) -> Array:
    """Return log B [r] where log T [r, n] passes its least by the limit for good; infinite if the largest is within."""
    excess = log_tokens - log_tokens.min(axis=1, keepdims=True)
    last = excess.shape[1] - 1
    inside = last - np.argmax(excess[:, ::-1] <= limit, axis=1)
    row, before = np.arange(len(excess)), np.minimum(inside, last - 1)
    here, there = excess[row, before], excess[row, before + 1]
    share = (limit - here) / np.where(inside < last, there - here, 1.0)
    return np.where(inside < last, log_batch[before] + share * (log_batch[before + 1] - log_batch[before]), np.inf)


def _finite(log_batch: float) -> float | None:
    return float(np.exp(log_batch)) if np.isfinite(log_batch) else None
