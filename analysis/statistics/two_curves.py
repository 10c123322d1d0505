"""Two curves T(B) = T_min (1 + (B / B_crit)^α) with one α: their least misfit, for many problems at once.

Shapes: n points, those of the first side before those of the second; r problems, with parameters [r, 5]: log T_min and
log B_crit of the first side, of the second, and log α of both.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analysis.statistics.families import EXPONENT_SPREAD, FREE_EXPONENT
from analysis.statistics.least_squares import FROM_NEARBY, TOLERANCE, Solution, least_squares
from analysis.statistics.residuals import Observed

Array = NDArray[np.float64]

#: One over the standard error of the observation of log α that holds it.
_STIFF = 1e5


@dataclass(frozen=True)
class TwoCurves:
    """The points of two sides, of which the first has `num_first`; `observed` says what errors they have."""

    observed: Observed
    num_first: int

    def hold(self, log_tokens: Array, log_exponents: Array, starts: Array) -> Solution:
        """Fit every row of `log_tokens` [r, n] with α held at `log_exponents` [r]."""
        return self._solve(log_tokens, log_exponents, starts, _STIFF)

    def free(self, log_tokens: Array, starts: Array, tolerance: float = TOLERANCE) -> Solution:
        """Fit every row of `log_tokens` [r, n] with α free."""
        return self._solve(log_tokens, np.zeros(len(log_tokens)), starts, 0.0, tolerance)

    def near_one(self, log_tokens: Array, starts: Array, prior: float, tolerance: float = TOLERANCE) -> Solution:
        """Fit every row of `log_tokens` [r, n] with log α observed to be 0 ± EXPONENT_SPREAD.

        `prior` is the variance of log T, in units of the errors, that this spread is weighed against.
        """
        stiffness = np.sqrt(prior) / EXPONENT_SPREAD
        return self._solve(log_tokens, np.zeros(len(log_tokens)), starts, stiffness, tolerance)

    def fitted(self, parameters: Array) -> Array:
        """Return log T [r, n] of the curves."""
        return self._model(parameters)[:, :-1]

    @property
    def limits(self) -> Array:
        """The ends of the search for log B_crit: beyond them nothing changes."""
        return np.asarray(FREE_EXPONENT.limits(self.observed.log_batch)[0])

    @property
    def spans(self) -> Array:
        """The smallest and the largest log B of each side [2, 2]."""
        sides = np.split(self.observed.log_batch, [self.num_first])
        return np.array([[side.min(), side.max()] for side in sides])

    @property
    def starts(self) -> Array:
        """Parameters [9, 5] with the knees at the smallest, the middle and the largest batch of each side, α = 1."""
        sides = [np.arange(self.num_first), np.arange(self.num_first, len(self.observed.log_tokens))]
        points = [self._starts_of(side) for side in sides]
        return np.array([(*first, *second, 0.0) for first in points[0] for second in points[1]])

    def _starts_of(self, side: NDArray[np.int_]) -> list[tuple[float, float]]:
        log_batch, log_tokens = self.observed.log_batch[side], self.observed.log_tokens[side]
        knees = np.quantile(log_batch, [0.0, 0.5, 1.0])
        return [(float(np.mean(log_tokens - np.logaddexp(0.0, log_batch - knee))), float(knee)) for knee in knees]

    def _solve(
        self, log_tokens: Array, log_exponents: Array, starts: Array, stiffness: float, tolerance: float = TOLERANCE
    ) -> Solution:
        num = len(self.observed.log_batch)
        whitening = np.zeros((num + 1, num + 1))
        whitening[:num, :num], whitening[num, num] = self.observed.root, stiffness
        observations = np.column_stack([log_tokens, log_exponents])
        task = (self._model, self._jacobian, observations, starts, whitening)
        found = least_squares(*task, tolerance=tolerance, damping=FROM_NEARBY)
        parameters = found.parameters.copy()
        parameters[:, [1, 3]] = np.clip(parameters[:, [1, 3]], *self.limits)
        return replace(found, parameters=parameters)

    def _model(self, parameters: Array) -> Array:
        log_t_min, log_b_crit = self._of_points(parameters)
        within = np.clip(log_b_crit, *self.limits)
        excess = FREE_EXPONENT.log_excess(self.observed.log_batch, within, parameters[:, 4:])
        return np.column_stack([log_t_min + excess, parameters[:, 4]])

    def _jacobian(self, parameters: Array) -> Array:
        log_b_crit = self._of_points(parameters)[1]
        within = np.clip(log_b_crit, *self.limits)
        slopes = FREE_EXPONENT.slopes(self.observed.log_batch, within, parameters[:, 4:])
        num = len(self.observed.log_batch)
        derivatives = np.zeros((len(parameters), num + 1, 5))
        for side, points in enumerate((slice(0, self.num_first), slice(self.num_first, num))):
            derivatives[:, points, 2 * side] = 1.0
            derivatives[:, points, 2 * side + 1] = (slopes[0] * (within == log_b_crit))[:, points]
        derivatives[:, :num, 4] = slopes[1]
        derivatives[:, num, 4] = 1.0
        return derivatives

    def _of_points(self, parameters: Array) -> tuple[Array, Array]:
        """Return log T_min and log B_crit [r, n] of every point."""
        second = 2 * (np.arange(len(self.observed.log_batch)) >= self.num_first)
        return parameters[:, second], parameters[:, second + 1]
