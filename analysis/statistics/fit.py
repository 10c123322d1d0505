"""Least squares on log T with profile intervals: arrays in, a Fit out; no names of optimizers, no tables.

The model is T(B) = T_min (1 + B / B_crit), or log T = log T_min + log(1 + B / B_crit). Given B_crit the best T_min is
a weighted mean, so the fit is a search along one line: exhaustive on a grid, then refined. The profile along the
grid, made finer around the best, gives every interval.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from analysis.statistics.noise import LACK_OF_FIT_LEVEL, Errors, lack_of_fit, t_quantile

Array = NDArray[np.float64]

NUM_PARAMETERS = 2
#: Residuals give a variance only with this many points beyond the parameters.
MIN_SPARE_POINTS = 3
#: The search reaches this far, in log tokens, beyond the smallest and the largest batch.
_REACH = 12.0
_GRID_POINTS = 2001


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its interval; None for what the data do not bound."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Fit:
    """T(B) = T_min (1 + B / B_crit) fitted to log T.

    Shapes: `log_b_crit`, `log_t_min`, `misfit` along the profile [grid], least at `best`; `residuals` [batches].
    `misfit` is above the least, in units of the variance: an interval holds where it is within `allowed_batch` for
    B_crit, `allowed` for what contains T_min (None: there are no intervals). `conditional_error` is the standard error
    of log T_min given B_crit.
    """

    best: int
    log_b_crit: Array
    log_t_min: Array
    misfit: Array
    conditional_error: float
    allowed: float | None
    allowed_batch: float | None
    residuals: Array
    lack_of_fit_p: float | None
    birge_factor: float

    @property
    def critical_batch_tokens(self) -> Estimate:
        """No value, and no end, where the best or the region of the allowed misfit reaches the end of the search."""
        last = len(self.log_b_crit) - 1
        value = float(np.exp(self.log_b_crit[self.best])) if 0 < self.best < last else None
        if self.allowed_batch is None:
            return Estimate(value)
        inside = np.flatnonzero(self.misfit <= self.allowed_batch)
        low = None if inside[0] == 0 else self._crossing(inside[0], inside[0] - 1)
        high = None if inside[-1] == last else self._crossing(inside[-1], inside[-1] + 1)
        return Estimate(value, low, high)

    @property
    def t_min_tokens(self) -> Estimate:
        """T_min vanishes with B_crit: no lower end where the allowed misfit reaches the start of the search."""
        estimate = self._function(np.zeros_like(self.log_b_crit))
        value = None if self.best == 0 else estimate.value
        return Estimate(value, None if self._allows(0) else estimate.low, estimate.high)

    @property
    def s_min_steps(self) -> Estimate:
        """S_min = T_min / B_crit vanishes as B_crit grows: no lower end where that misfit reaches the search's end."""
        estimate = self._function(-self.log_b_crit)
        value = None if self.best == len(self.log_b_crit) - 1 else estimate.value
        return Estimate(value, None if self._allows(-1) else estimate.low, estimate.high)

    def tokens_at(self, global_batch_tokens: float) -> Estimate:
        """Return the fitted T(B)."""
        return self._function(np.logaddexp(0.0, np.log(global_batch_tokens) - self.log_b_crit))

    def _allows(self, place: int) -> bool:
        return self.allowed is not None and bool(self.misfit[place] <= self.allowed)

    def _function(self, shift: Array) -> Estimate:
        """Estimate exp(log T_min + shift): its extremes over all pairs (T_min, B_crit) within the allowed misfit."""
        value = float(np.exp(self.log_t_min[self.best] + shift[self.best]))
        if self.allowed is None:
            return Estimate(value)
        inside = self.misfit <= self.allowed
        centre = (self.log_t_min + shift)[inside]
        half = self.conditional_error * np.sqrt(self.allowed - self.misfit[inside])
        return Estimate(value, float(np.exp(np.min(centre - half))), float(np.exp(np.max(centre + half))))

    def _crossing(self, inside: int, outside: int) -> float:
        """Interpolate B_crit, in its logarithm, where the misfit passes what is allowed."""
        assert self.allowed_batch is not None
        depth, place = np.sqrt(self.misfit[[inside, outside]]), self.log_b_crit[[inside, outside]]
        return float(np.exp(np.interp(np.sqrt(self.allowed_batch), depth, place)))


def fit_saturating(global_batch_tokens: Array, log_tokens: Array, level: float, errors: Errors | None = None) -> Fit:
    """Fit T(B) = T_min (1 + B / B_crit) to log T [batches] by generalised least squares; deterministic.

    `errors` of log T come from replicates. The misfit is tested against them (F test), and a significant one scales the
    variance by misfit / (n - k), which is then known to n - k degrees of freedom only. Without them the variance comes
    from the residuals if n >= k + 3, else there is no interval.

    Sources: the model is arXiv 1812.06162, eq. 2.11; the scale factor R. T. Birge, Phys. Rev. 40 (1932) 207.
    Assumption: profile regions {misfit <= best + t²} have their level: exact for linear models, to first order here.
    """
    batches, log_t = np.asarray(global_batch_tokens, float), np.asarray(log_tokens, float)
    num_points = len(batches)
    assert num_points >= NUM_PARAMETERS, batches
    weight = np.linalg.inv(errors.covariance) if errors else np.eye(num_points)
    precision = float(weight.sum())

    def profile(log_b_crit: Array) -> tuple[Array, Array, Array]:
        excess = log_t - np.logaddexp(0.0, np.log(batches) - log_b_crit[:, None])
        log_t_min = excess @ weight.sum(axis=0) / precision
        residuals = excess - log_t_min[:, None]
        return log_t_min, residuals, np.einsum("gi,ij,gj->g", residuals, weight, residuals)

    grid = np.linspace(np.log(batches.min()) - _REACH, np.log(batches.max()) + _REACH, _GRID_POINTS)
    best = int(np.argmin(profile(grid)[2]))
    if 0 < best < len(grid) - 1:
        around = (grid[best - 1], grid[best + 1])
        refined = minimize_scalar(lambda u: profile(np.array([u]))[2][0], bounds=around, method="bounded").x
        near = np.geomspace(1e-6, 1.0, _GRID_POINTS // 8)
        grid = np.unique(np.concatenate([grid, refined - near, [refined], refined + near]))
        best = int(np.searchsorted(grid, refined))
    log_t_min, residuals, misfit = profile(grid)
    scale = _scale(float(misfit[best]), num_points - NUM_PARAMETERS, level, errors)
    return Fit(
        best=best,
        log_b_crit=grid,
        log_t_min=log_t_min,
        misfit=np.maximum(misfit - misfit[best], 0.0) / scale.variance,
        conditional_error=float(np.sqrt(scale.variance / precision)),
        allowed=scale.allowed,
        allowed_batch=scale.allowed_batch,
        residuals=residuals[best],
        lack_of_fit_p=scale.lack_of_fit_p,
        birge_factor=float(np.sqrt(scale.variance)) if errors else 1.0,
    )


@dataclass(frozen=True)
class _Scale:
    """The variance in units of the weights, the misfits allowed in intervals, the p-value of the misfit."""

    variance: float
    allowed: float | None = None
    allowed_batch: float | None = None
    lack_of_fit_p: float | None = None


def _scale(minimum: float, spare: int, level: float, errors: Errors | None) -> _Scale:
    """Take the variance from replicates or from residuals; else there is no interval."""
    per_point = minimum / max(spare, 1)
    if errors is not None:
        p_value = lack_of_fit(per_point, spare, errors.contrast_dof)
        misfits = p_value is not None and p_value < LACK_OF_FIT_LEVEL
        dofs = [min(dof, spare) if misfits else dof for dof in (errors.dof, errors.contrast_dof)]
        allowed, allowed_batch = (t_quantile(level, dof) ** 2 for dof in dofs)
        return _Scale(per_point if misfits else 1.0, allowed, allowed_batch, p_value)
    if spare >= MIN_SPARE_POINTS and per_point > np.finfo(float).eps:
        allowed = t_quantile(level, spare) ** 2
        return _Scale(per_point, allowed, allowed)
    return _Scale(1.0)
