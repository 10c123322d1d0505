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
    def falls(self) -> bool:
        """Whether T falls before it rises."""
        return self.log_excess is _valley

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


def _valley_root(log_batch: Array, log_b_crit: Array, depth: Array) -> Array:
    """Return the square root of T / T_least - 1, negative on the falling branch."""
    half = (log_batch - log_b_crit) / 2
    return np.asarray((1 + depth) * np.exp(half) - depth * np.exp(-half))


def _valley(log_batch: Array, log_b_crit: Array, depth: Array) -> Array:
    return np.asarray(np.log1p(_valley_root(log_batch, log_b_crit, depth) ** 2))


def _valley_slopes(log_batch: Array, log_b_crit: Array, depth: Array) -> tuple[Array, Array]:
    half, root = (log_batch - log_b_crit) / 2, _valley_root(log_batch, log_b_crit, depth)
    by_root = 2 * root / (1 + root**2)
    by_half = (1 + depth) * np.exp(half) + depth * np.exp(-half)
    return -by_root * by_half / 2, by_root * 2 * np.sinh(half)


#: T = T_least (1 + ((1 + m) √(B / B_crit) - m √(B_crit / B))²), bend = m: a curve that falls and rises. T is least at
#: m / (1 + m) B_crit, and twice that at B_crit. m = 0 is the saturating curve, and m < 0.21 is the curve
#: T = T_min (1 + B / B_c) (1 + B_0 / B), of which m (1 + m) = √(B_0 / B_c) / (1 + √(B_0 / B_c))².
VALLEY = Family("valley", _valley, _valley_slopes, (0.0, 2.0), 0.3)


def log_batch_at(
    rise: float, reference: float | None = None, family: Family = FREE_EXPONENT
) -> Callable[[Array, Array], Array]:
    """Return log B, a function of log B_crit and the bend, at which T is `1 + rise` times T(reference), else T_min.

    It lies on the rising branch. The families are the powers and the valley.
    (B / B_crit)^α = rise + (1 + rise) (B_ref / B_crit)^α: with α = 1 it is rise B_crit + (1 + rise) B_ref.
    """

    def of_power(log_b_crit: Array, log_exponent: Array) -> Array:
        exponent = np.exp(log_exponent)
        floor = -np.inf if reference is None else np.log1p(rise) + exponent * (np.log(reference) - log_b_crit)
        return np.asarray(log_b_crit + np.logaddexp(np.log(rise), floor) / exponent)

    def of_valley(log_b_crit: Array, depth: Array) -> Array:
        floor = 0.0 if reference is None else _valley_root(np.log(reference), log_b_crit, depth) ** 2
        root = np.sqrt(rise + (1 + rise) * floor)
        return np.asarray(
            log_b_crit + 2 * np.log((root + np.sqrt(root**2 + 4 * depth * (1 + depth))) / (2 + 2 * depth))
        )

    return of_valley if family.falls else of_power
