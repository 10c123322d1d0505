"""Families of curves T(B): tokens to a target loss over the global batch size, two or three parameters each.

All are T(B) = T_min · excess(B; B_crit, bend): log T is linear in log T_min, and `bend` shapes the rise. Arguments are
logarithms where they are named so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Array = NDArray[np.float64]
#: (log B, log B_crit, bend) to log (T / T_min), or to its derivatives by log B_crit and by bend.
Excess = Callable[[Array, Array, Array], Array]
Slopes = Callable[[Array, Array, Array], tuple[Array, Array]]

#: How far log α may lie from 0 in a curve that is saturating by and large. In the table of arXiv 2410.21676, five
#: models of nine batches each, it is 0.08 ± 0.13; this is twice its root mean square.
EXPONENT_SPREAD = 0.3

#: A search for B_crit reaches this far, in log tokens, beyond the smallest and the largest batch.
REACH = 12.0


@dataclass(frozen=True)
class Family:
    """One family.

    bends: ends of the search for the third parameter, the same twice where it is fixed.
    spread: standard deviation around 0 that is assumed of the bend beforehand; None: nothing is.
    """

    name: str
    log_excess: Excess
    slopes: Slopes
    bends: tuple[float, float]
    spread: float | None = None

    @property
    def is_bent(self) -> bool:
        return self.bends[0] < self.bends[1]

    @property
    def num_parameters(self) -> int:
        """Parameters that the points alone decide."""
        return 3 if self.is_bent and self.spread is None else 2

    def limits(self, log_batch: Array) -> Array:
        """Return the ends [2, 2] of a search for log B_crit and for the bend."""
        return np.array([[log_batch.min() - REACH, log_batch.max() + REACH], self.bends])


def _power(log_batch: Array, log_b_crit: Array, log_exponent: Array) -> Array:
    height = np.exp(log_exponent) * (log_batch - log_b_crit)
    # What logaddexp(0, height) gives, in a third of its time.
    return np.asarray(np.log1p(np.exp(-np.abs(height))) + np.maximum(height, 0.0))


def _power_slopes(log_batch: Array, log_b_crit: Array, log_exponent: Array) -> tuple[Array, Array]:
    height = np.exp(log_exponent) * (log_batch - log_b_crit)
    share = expit(height)
    return -np.exp(log_exponent) * share, height * share


def _kink(log_batch: Array, log_b_crit: Array, slope: Array) -> Array:
    return np.asarray(slope * np.maximum(0.0, log_batch - log_b_crit))


def _kink_slopes(log_batch: Array, log_b_crit: Array, slope: Array) -> tuple[Array, Array]:
    beyond = log_batch > log_b_crit
    return -slope * beyond, beyond * (log_batch - log_b_crit)


_LOG_EXPONENTS = (-float(np.log(8.0)), float(np.log(8.0)))

#: T = T_min (1 + B / B_crit). Source: arXiv 1812.06162, eq. 2.11.
SATURATING = Family("saturating", _power, _power_slopes, (0.0, 0.0))

#: T = T_min (1 + (B / B_crit)^α), bend = log α: twice T_min at B_crit whatever α.
FREE_EXPONENT = Family("free_exponent", _power, _power_slopes, _LOG_EXPONENTS)

#: The same with α near 1: what real curves leave open of a saturating one.
NEARLY_SATURATING = Family("nearly_saturating", _power, _power_slopes, _LOG_EXPONENTS, EXPONENT_SPREAD)

#: log T flat up to B_crit, of slope `bend` = 1 + m beyond, where log S falls with slope m, -1 < m < 0.
#: Source: arXiv 2505.02222, appendix F.
KINK = Family("kink", _kink, _kink_slopes, (0.0, 1.0))


def log_batch_at(rise: float, reference: float | None = None) -> Callable[[Array, Array], Array]:
    """Return log B, a function of log B_crit and log α, at which T is `1 + rise` times T(reference), else T_min.

    (B / B_crit)^α = rise + (1 + rise) (B_ref / B_crit)^α: with α = 1 it is rise B_crit + (1 + rise) B_ref.
    """

    def log_batch(log_b_crit: Array, log_exponent: Array) -> Array:
        exponent = np.exp(log_exponent)
        floor = -np.inf if reference is None else np.log1p(rise) + exponent * (np.log(reference) - log_b_crit)
        return np.asarray(log_b_crit + np.logaddexp(np.log(rise), floor) / exponent)

    return log_batch
