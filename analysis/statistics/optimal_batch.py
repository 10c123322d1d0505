"""Batches read off the points of T(B) themselves, without a curve: the cheapest one, and how far T stays near it.

Shapes: B in tokens and log T [n], smallest batch first.
"""

import numpy as np

from analysis.statistics.families import Array
from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import Errors, t_quantile


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

    No value and no upper end where the largest batch is within that share. The ends are where the same line meets
    log T ± t standard errors of its excess over the minimum.
    """
    lowest = _lowest(log_tokens)
    excess = log_tokens - log_tokens[lowest]
    value = _last_crossing(batches, excess, np.log1p(share))
    if errors is None:
        return Estimate(value)
    half = t_quantile(level, errors.contrast_dof) * _error_of_excess(errors, lowest)
    low = _last_crossing(batches, excess + half, np.log1p(share))
    largest = float(batches[-1])
    return Estimate(value, largest if low is None else low, _last_crossing(batches, excess - half, np.log1p(share)))


def _lowest(log_tokens: Array) -> int:
    """Return the place of the least T, of equal ones the largest batch."""
    return len(log_tokens) - 1 - int(np.argmin(log_tokens[::-1]))


def _error_of_excess(errors: Errors, lowest: int) -> Array:
    """Return the standard error of log T over that of the lowest [n]."""
    variance = np.diag(errors.covariance)
    return np.asarray(np.sqrt(np.maximum(variance + variance[lowest] - 2 * errors.covariance[lowest], 0.0)))


def _last_crossing(batches: Array, excess: Array, limit: float) -> float | None:
    """Return B where the excess passes the limit for good; None where the largest batch is within it."""
    inside = int(np.flatnonzero(excess <= limit)[-1])
    if inside == len(excess) - 1:
        return None
    here, there = excess[inside], excess[inside + 1]
    return float(np.exp(np.interp(limit, [here, there], np.log(batches[inside : inside + 2]))))
