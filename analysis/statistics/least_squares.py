"""Nonlinear least squares of one model to many sets of observations at once, such as the resamples of a bootstrap.

Levenberg-Marquardt steps are taken for all problems together, in arrays; a problem leaves when it has converged.

Shapes: m problems at work, n points, p parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: Parameters [m, p] to predictions [m, n], or to their derivatives [m, n, p].
Curve = Callable[[Array], Array]

#: Of many starts, so many of the least misfit are followed in each problem.
NUM_TRIES = 3
_MAX_STEPS = 1000
#: Converged: the rest of the way lowers the misfit by less than this share (its root is the relative offset of Bates
#: and Watts, 1981: the distance to the minimum over the standard error), or by less than rounding of the observations.
TOLERANCE = 1e-16
#: The same for percentiles of resamples, which need no more digits.
ROUGH = 1e-8
#: The damping of the first step, where the Jacobian's columns have length one: of any start, and of one near the end.
FROM_AFAR, FROM_NEARBY = 0.1, 1e-3
_ROUNDING = 16 * np.finfo(float).eps ** 2
#: Beyond this damping no step helps any more: a minimum if no column of the Jacobian points along the residuals.
_MAX_DAMPING = 1e16
#: Enough to solve for a step where two parameters do the same.
_MIN_DAMPING = 1e-13
_MAX_COSINE = 1e-6
#: Problems at work together: few enough for their Jacobians to stay in the cache.
_CHUNK = 8192


class Loss(NamedTuple):
    """A loss of squared whitened residuals z = r²; its derivative by z, the weight of a point; half the second by r."""

    value: Callable[[Array], Array]
    weight: Callable[[Array], Array]
    curvature: Callable[[Array], Array]


#: The robust losses grow like |r| beyond one unit of the whitening.
LOSS_FUNCTIONS = {
    "squares": Loss(lambda z: z, np.ones_like, np.ones_like),
    "soft_l1": Loss(lambda z: 2 * (np.sqrt(1 + z) - 1), lambda z: 1 / np.sqrt(1 + z), lambda z: (1 + z) ** -1.5),
    "huber": Loss(
        lambda z: np.where(z <= 1, z, 2 * np.sqrt(np.maximum(z, 1)) - 1),
        lambda z: 1 / np.sqrt(np.maximum(z, 1)),
        lambda z: np.where(z <= 1, 1.0, 0.0),
    ),
}


@dataclass(frozen=True)
class Solution:
    """The least misfit found for each problem.

    Shapes: parameters [problems, p], misfit and converged [problems], jacobian [problems, n, p] of the whitened model.
    The misfit is the sum of squares of the whitened residuals, or of the robust loss of these squares.
    """

    parameters: Array
    misfit: Array
    jacobian: Array
    converged: NDArray[np.bool_]

    def covariance(self) -> Array:
        """Return (JᵀJ)⁻¹ [problems, p, p]: times the variance of a whitened residual it is that of the parameters.

        By QR of scaled columns, which loses half the digits that JᵀJ would. Infinite where a parameter has no effect.
        """
        scale = np.linalg.norm(self.jacobian, axis=1)
        triangle = np.linalg.qr(self.jacobian / np.where(scale > 0, scale, 1.0)[:, None, :])[1]
        known = np.abs(np.diagonal(triangle, axis1=1, axis2=2)).min(axis=1) > np.finfo(float).eps
        inverse = np.full(triangle.shape, np.inf)
        inverse[known] = np.linalg.inv(triangle[known]) / scale[known][:, :, None]
        return np.where(known[:, None, None], inverse @ np.swapaxes(inverse, 1, 2), np.inf)


def least_squares(
    model: Curve,
    jacobian: Curve,
    observations: Array,
    starts: Array,
    whitening: Array | None = None,
    loss: str = "squares",
    num_tries: int = NUM_TRIES,
    tolerance: float = TOLERANCE,
    damping: float = FROM_AFAR,
) -> Solution:
    """Minimise Σ loss((W (observed − model))²) for every row of `observations` [problems, n].

    `starts` [starts, p] serve all problems, or [starts, problems, p] each its own. `whitening` W [k, n] makes residuals
    alike: a root of the inverse covariance of the observations. The robust losses are weighted anew at each step. The
    `num_tries` best starts of a problem are followed until a step promises less than `tolerance` of the misfit; the
    first step of each has this `damping`.

    Raises: ValueError for an unknown loss.
    Source: damping by D. W. Marquardt, SIAM J. 11 (1963) 431; its updates by H. B. Nielsen, IMM-REP-1999-05.
    """
    if loss not in LOSS_FUNCTIONS:
        raise ValueError(f"loss {loss!r} is unknown: one of {', '.join(LOSS_FUNCTIONS)}")
    observations, starts = np.atleast_2d(np.asarray(observations, float)), np.asarray(starts, float)
    if starts.ndim == 2:
        starts = np.broadcast_to(starts[:, None, :], (len(starts), len(observations), starts.shape[1]))
    matrix = np.eye(observations.shape[1]) if whitening is None else whitening
    task = _Task(model, jacobian, matrix, LOSS_FUNCTIONS[loss], num_tries, tolerance, damping)
    with np.errstate(all="ignore"):  # a step into overflow is taken back
        parts = [
            _best_of_tries(task, observations[first : first + _CHUNK] @ matrix.T, starts[:, first : first + _CHUNK])
            for first in range(0, len(observations), _CHUNK)
        ]
        parameters, misfit, converged = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Solution(parameters, misfit, task.whitened_jacobian(parameters), converged)


@dataclass(frozen=True)
class _Task:
    """What all problems share."""

    model: Curve
    jacobian: Curve
    whitening: Array
    loss: Loss
    num_tries: int
    tolerance: float
    damping: float

    def residuals(self, observed: Array, parameters: Array) -> Array:
        return np.asarray(observed - self.model(parameters) @ self.whitening.T)

    def misfit(self, residuals: Array) -> Array:
        misfit = np.asarray(self.loss.value(residuals**2).sum(axis=1))
        return np.where(np.isfinite(misfit), misfit, np.inf)

    def whitened_jacobian(self, parameters: Array) -> Array:
        return np.asarray(self.whitening @ self.jacobian(parameters))

    def normal_equations(self, residuals: Array, parameters: Array) -> tuple[Array, Array]:
        """Return JᵀwJ [m, p, p] and Jᵀwr [m, p]."""
        derivatives = self.whitened_jacobian(parameters)
        weighted = np.swapaxes(derivatives * self.loss.weight(residuals**2)[:, :, None], 1, 2)
        return weighted @ derivatives, (weighted @ residuals[:, :, None])[:, :, 0]


def _best_of_tries(task: _Task, observed: Array, starts: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Follow the best starts of each problem; return parameters, misfit and convergence of the best end."""
    num, rows = len(observed), np.arange(len(observed))
    misfit = np.array([task.misfit(task.residuals(observed, start)) for start in starts])
    tried = np.argsort(misfit, axis=0, kind="stable")[: task.num_tries]
    chosen = starts[tried, rows].reshape(-1, starts.shape[2])
    ends = _descend(task, np.tile(observed, (len(tried), 1)), chosen)
    best = np.argmin(ends[1].reshape(-1, num), axis=0) * num + rows
    parameters, misfit, converged = (end[best] for end in ends)
    return parameters, misfit, converged


def _descend(task: _Task, observed: Array, start: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Take damped Gauss-Newton steps from `start` [m, p] until each problem has converged or no step helps."""
    parameters, misfit = start.copy(), task.misfit(task.residuals(observed, start))
    converged = np.zeros(len(start), bool)
    damping, growth = np.full(len(start), task.damping), np.full(len(start), 2.0)
    least = _ROUNDING * (observed**2).sum(axis=1)
    active = np.flatnonzero(np.isfinite(misfit))
    for _ in range(_MAX_STEPS):
        if not len(active):
            break
        here = parameters[active]
        residuals = task.residuals(observed[active], here)
        curvature, slope = task.normal_equations(residuals, here)
        step, scaled_slope, promised = _damped_step(curvature, slope, damping[active])
        there = here + step
        reached = task.misfit(task.residuals(observed[active], there))
        gain = (misfit[active] - reached) / promised
        better = reached < misfit[active]
        cosine = np.abs(scaled_slope).max(axis=1) / np.sqrt(misfit[active])
        arrived = (damping[active] < 1) & (promised <= task.tolerance * misfit[active] + least[active])
        stuck = (damping[active] > _MAX_DAMPING) | ~np.isfinite(promised)
        parameters[active[better]], misfit[active[better]] = there[better], reached[better]
        damping[active], growth[active] = _adapted(damping[active], growth[active], gain, better)
        converged[active] = arrived | (stuck & (cosine < _MAX_COSINE))
        active = active[~(arrived | stuck)]
    return parameters, misfit, converged


def _damped_step(curvature: Array, slope: Array, damping: Array) -> tuple[Array, Array, Array]:
    """Return the step, the slope with respect to columns of length one, and the fall of the misfit that it promises."""
    scale = np.sqrt(np.diagonal(curvature, axis1=1, axis2=2))
    scale = np.where((scale > 0) & np.isfinite(scale), scale, 1.0)
    usable = np.asarray(np.isfinite(curvature).all(axis=(1, 2)) & np.isfinite(slope).all(axis=1))
    matrix = np.where(usable[:, None, None], curvature, 0.0) / (scale[:, :, None] * scale[:, None, :])
    matrix += np.maximum(damping, _MIN_DAMPING)[:, None, None] * np.eye(scale.shape[1])
    scaled_slope = np.where(usable[:, None], slope, np.nan) / scale
    step = np.linalg.solve(matrix, scaled_slope[:, :, None])[:, :, 0]
    promised = (step * (scaled_slope + damping[:, None] * step)).sum(axis=1)
    return step / scale, scaled_slope, promised


def _adapted(damping: Array, growth: Array, gain: Array, better: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Damp less the more of the promised gain came true; after a failure more, twice as steeply each time."""
    eased = damping * np.maximum(1 / 3, 1 - (2 * np.minimum(gain, 1.0) - 1) ** 3)
    return np.where(better, eased, damping * growth), np.where(better, 2.0, 2 * growth)
