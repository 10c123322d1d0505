"""The spread of repeated runs, pooled over groups: one variance for all, or one that grows as a power of the batch.

For groups without bounds it is a gamma regression on their squared deviations (restricted likelihood).

Sources: H. D. Patterson and R. Thompson, Biometrika 58 (1971) 545; J. A. Nelder and Y. Lee, Journal of the Royal
Statistical Society B 60 (1998) 877.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc

from analysis.statistics.censored import Samples, adjusted_log_likelihood

Array = NDArray[np.float64]

#: The variance grows with the batch where one variance for all is less likely than this. At 5 %, two or three seeds
#: seldom prove a growth for want of which intervals at the largest batch cover 80 % where they say 90; a growth that is
#: not there makes intervals 1 % wider.
GROWTH_LEVEL = 0.25

_NEWTON_STEPS = 50
_STEP = 1e-3  # of the numerical derivatives, in log variance


@dataclass(frozen=True)
class Spread:
    """variance · exp(growth · (x - centre)), x = log B; `dof` as if the groups were independent.

    `twice_log_ratio` is that of the likelihood with growth over the one without.
    """

    variance: float
    dof: float
    growth: float = 0.0
    growth_error: float = 0.0
    centre: float = 0.0
    twice_log_ratio: float = 0.0

    def scale(self, log_batch: Array) -> Array:
        """Return the variance at each log batch over that at the centre."""
        return np.asarray(np.exp(self.growth * (log_batch - self.centre)), float)

    def is_growing(self, design_effect: float) -> bool:
        """Say whether the growth is significant, for groups that count for `1 / design_effect` of their number."""
        return bool(chdtrc(1, self.twice_log_ratio / design_effect) < GROWTH_LEVEL)


def constant_spread(samples: Samples) -> Spread:
    """Return the most likely variance of all samples together; each needs an exact value, and some must vary."""
    design = np.ones((len(samples.values), 1))
    coefficients, precision, _ = _fit(samples, design)
    return Spread(float(np.exp(coefficients[0])), float(2 * precision[0, 0]))


def growing_spread(samples: Samples, log_batch: Array) -> Spread | None:
    """Return the most likely variance that is a power of the batch; None where one batch size, or no maximum, tells."""
    weight = samples.weight.sum(axis=1) - 1
    centre = float(weight @ log_batch / weight.sum())
    if np.ptp(log_batch) < 1e-9:
        return None
    one = np.ones(len(log_batch))
    coefficients, precision, likelihood = _fit(samples, np.column_stack([one, log_batch - centre]))
    covariance = np.linalg.inv(precision)
    if (np.diag(covariance) <= 0).any():
        return None
    return Spread(
        variance=float(np.exp(coefficients[0])),
        dof=float(2 / covariance[0, 0]),
        growth=float(coefficients[1]),
        growth_error=float(np.sqrt(covariance[1, 1])),
        centre=centre,
        twice_log_ratio=2 * (likelihood - _fit(samples, one[:, None])[2]),
    )


def _fit(samples: Samples, design: Array) -> tuple[Array, Array, float]:
    """Maximise the likelihood of log variance = design @ coefficients; return these, their precision, the maximum."""
    coefficients = np.zeros(design.shape[1])
    coefficients[0] = np.log(samples.squares_exact.sum() / (samples.num_exact - 1).sum())
    precision, likelihood = np.eye(len(coefficients)), 0.0
    for _ in range(_NEWTON_STEPS):
        at = design @ coefficients
        below, middle, above = (adjusted_log_likelihood(samples, at + step) for step in (-_STEP, 0.0, _STEP))
        slope, bend = (above - below) / (2 * _STEP), (2 * middle - above - below) / _STEP**2
        precision, likelihood = design.T @ (bend[:, None] * design), float(middle.sum())
        step = np.clip(np.linalg.solve(precision, design.T @ slope), -1.0, 1.0)
        coefficients = coefficients + step
        if np.all(np.abs(step) < 1e-6):
            break
    return coefficients, precision, likelihood
