"""Linear least squares with known variances: functions of the coefficients, with intervals."""

import numpy as np
from numpy.typing import NDArray

from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import t_quantile

Array = NDArray[np.float64]


def weighted_fit(
    design: Array, values: Array, variances: Array, contrasts: Array, level: float, dof: float
) -> list[Estimate]:
    """Fit values [n] = design [n, p] · coefficients; return contrasts [m, p] · coefficients.

    Intervals are Student's with the `dof` to which the variances are known; where the fit misses the values by more
    than these, the variances are scaled up to what it misses.
    """
    weighted = design / variances[:, None]
    covariance = np.linalg.inv(design.T @ weighted)
    found = covariance @ weighted.T @ values
    spare = len(values) - design.shape[1]
    misfit = float(((values - design @ found) ** 2 / variances).sum())
    scale = max(1.0, misfit / spare) if spare else 1.0
    centres = contrasts @ found
    halves = t_quantile(level, dof) * np.sqrt(scale * np.einsum("mi,ij,mj->m", contrasts, covariance, contrasts))
    return [Estimate(c, c - half, c + half) for c, half in zip(centres.tolist(), halves.tolist(), strict=True)]
