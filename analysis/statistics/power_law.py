"""Power laws y = prefactor · Π x^exponent by least squares in logarithms.

Shapes: n points, p variables.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.statistics.families import Array
from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import t_quantile

#: An interval needs so many points beyond the exponents and the prefactor.
MIN_SPARE_POINTS = 3
#: Variables whose logarithms depend on each other up to this share cannot be told apart.
_MIN_INDEPENDENCE = 1e-6


@dataclass(frozen=True)
class PowerLaw:
    """Exponents of the variables and the prefactor, each with an interval where the points give one."""

    exponents: tuple[Estimate, ...]
    prefactor: Estimate


def fit_power_law(y: Array, x: Array, level: float, has_interval: bool = True) -> PowerLaw | None:
    """Fit log y [n] on log x [n, p]; None where the variables cannot be told apart, or no point is to spare.

    Intervals by Student's t with the variance of the residuals, from three points beyond the parameters on, unless
    `has_interval` forbids. Assumption: errors of log y are independent, with one variance.
    """
    log_x = np.log(x)
    design = np.column_stack([np.ones(len(y)), log_x])
    centred = log_x - log_x.mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False) if centred.size else np.zeros(1)
    spare = len(y) - design.shape[1]
    if spare < 1 or singular.min() <= _MIN_INDEPENDENCE * max(singular.max(), 1e-300):
        return None
    inverse = np.linalg.pinv(design)
    found = inverse @ np.log(y)
    half = np.full(len(found), np.nan)
    if has_interval and spare >= MIN_SPARE_POINTS:
        variance = ((np.log(y) - design @ found) ** 2).sum() / spare
        half = t_quantile(level, spare) * np.sqrt(variance * (inverse**2).sum(axis=1))
    prefactor, *exponents = (_estimate(value, width) for value, width in zip(found, half, strict=True))
    return PowerLaw(tuple(exponents), _mapped(prefactor, np.exp))


def _estimate(value: float, half: float) -> Estimate:
    known = bool(np.isfinite(half))
    return Estimate(float(value), float(value - half) if known else None, float(value + half) if known else None)


def _mapped(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    ends = (estimate.value, estimate.low, estimate.high)
    return Estimate(*(None if end is None else float(function(end)) for end in ends))
