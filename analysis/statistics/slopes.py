"""One slope for several groups of points, each with a level of its own."""

import numpy as np
from numpy.typing import NDArray

from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import t_quantile

Array = NDArray[np.float64]


def common_slope(x: Array, y: Array, group: NDArray[np.int_], level: float) -> Estimate:
    """Fit y = level_g + slope · x by least squares over points [n] of groups numbered from 0.

    The interval is Student's, by the residuals; without a point to spare there is none, and without two x in any group
    no slope. Assumption: errors are independent, with one variance.
    """
    size = np.bincount(group)
    x_own, y_own = (values - (np.bincount(group, values) / size)[group] for values in (x, y))
    spread = float(x_own @ x_own)
    if spread <= 0:
        return Estimate(None)
    slope = float(x_own @ y_own) / spread
    spare = len(x) - len(size) - 1
    if spare < 1:
        return Estimate(slope)
    residual = y_own - slope * x_own
    half = t_quantile(level, spare) * float(np.sqrt(residual @ residual / spare / spread))
    return Estimate(slope, slope - half, slope + half)
