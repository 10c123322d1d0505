"""What least squares compares: residuals of log T, T or S, plain or robust; and the variance that intervals take.

Shapes: K candidate curves, n batches.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.statistics.families import Array
from analysis.statistics.least_squares import LOSS_FUNCTIONS
from analysis.statistics.noise import LACK_OF_FIT_LEVEL, Errors, lack_of_fit, t_quantile
from analysis.vocabulary import RESIDUALS

#: A robust loss grows like |residual| beyond this residual of log T: the size of common seed noise.
ROBUST_SCALE = 0.1
#: Residuals give a variance, and a choice between families, from k + 3 points on, the variance among the k parameters.
MIN_SPARE_POINTS = 3
_ROBUST_STEPS = 40


@dataclass(frozen=True)
class Concentrated:
    """The best T_min for each curve: log_t_min, misfit and its curvature in that [K]; whitened residuals [K, n]."""

    log_t_min: Array
    misfit: Array
    curvature: Array
    residuals: Array


@dataclass(frozen=True)
class Observed:
    """log T [n] at log B [n], with what makes residuals comparable."""

    log_batch: Array
    log_tokens: Array
    errors: Errors | None
    residuals: str
    loss: str

    def __post_init__(self) -> None:
        if self.residuals not in RESIDUALS:
            raise ValueError(f"residuals {self.residuals!r} are unknown: one of {', '.join(RESIDUALS)}")
        if self.loss not in LOSS_FUNCTIONS:
            raise ValueError(f"loss {self.loss!r} is unknown: one of {', '.join(LOSS_FUNCTIONS)}")
        if self.loss != "squares" and self.residuals != "log":
            raise ValueError(f"loss {self.loss} is for residuals of log T, not {self.residuals}: its scale is relative")

    @property
    def weighted_by_errors(self) -> bool:
        return self.errors is not None and self.residuals == "log" and self.loss == "squares"

    @cached_property
    def root(self) -> Array:
        """W with WᵀW the inverse covariance of log T; the identity where errors do not count."""
        if self.errors is None or not self.weighted_by_errors:
            return np.eye(len(self.log_batch))
        return np.asarray(np.linalg.inv(np.linalg.cholesky(self.errors.covariance)))

    def concentrate(self, excess: Array) -> Concentrated:
        """Find the best T_min for curves log T = log T_min + excess [K, n]."""
        if self.residuals != "log":
            return self._raw(excess)
        return self._robust(excess) if self.loss != "squares" else self._log(excess)

    def _log(self, excess: Array) -> Concentrated:
        ones = self.root.sum(axis=1)
        precision = float(ones @ ones)
        whitened = (self.log_tokens - excess) @ self.root.T
        log_t_min = whitened @ ones / precision
        residuals = whitened - log_t_min[:, None] * ones
        return Concentrated(log_t_min, (residuals**2).sum(axis=1), np.full(len(excess), precision), residuals)

    def _raw(self, excess: Array) -> Concentrated:
        """Compare T or S, in units of their root mean square."""
        size = np.exp(self.log_tokens - (self.log_batch if self.residuals == "raw_steps" else 0.0))
        unit = np.sqrt(np.mean(size**2))
        curve = np.exp(excess) * (size / np.exp(self.log_tokens)) / unit
        t_min = curve @ (size / unit) / (curve**2).sum(axis=1)
        fitted = t_min[:, None] * curve
        residuals = size / unit - fitted
        return Concentrated(np.log(t_min), (residuals**2).sum(axis=1), (fitted**2).sum(axis=1), residuals)

    def _robust(self, excess: Array) -> Concentrated:
        """Weigh anew, step by step: the losses are convex, so any start leads to the minimum."""
        loss, whitened = LOSS_FUNCTIONS[self.loss], (self.log_tokens - excess) / ROBUST_SCALE
        centre = np.median(whitened, axis=1)
        for _ in range(_ROBUST_STEPS):
            weight = loss.weight((whitened - centre[:, None]) ** 2)
            centre = (weight * whitened).sum(axis=1) / weight.sum(axis=1)
        residuals = whitened - centre[:, None]
        squares = residuals**2
        curvature = np.maximum(loss.curvature(squares).sum(axis=1), 1.0) / ROBUST_SCALE**2
        return Concentrated(centre * ROBUST_SCALE, loss.value(squares).sum(axis=1), curvature, residuals)


@dataclass(frozen=True)
class Scale:
    """The variance in units of the weights, and how far above the least an interval takes in the misfit, in the same.

    `allowed_batch` is for what rests on contrasts between batches alone, such as B_crit; `allowed` for what contains
    T_min; None: there are no intervals. `lack_of_fit_p` is the p-value of the misfit against replicates, `birge_factor`
    by how much one widens intervals; `is_likelihood`: whether errors are taken as normal, as information criteria do.
    """

    variance: float
    allowed: float | None = None
    allowed_batch: float | None = None
    lack_of_fit_p: float | None = None
    birge_factor: float = 1.0
    is_likelihood: bool = True


def scale_of(best: Concentrated, spare: int, level: float, observed: Observed) -> Scale:
    """Take the variance from replicates or from the residuals at the best point; else there is no interval.

    `spare` points beyond the parameters of the curve. For a robust loss of influence ψ the misfit rises in units of
    mean ψ² / mean ψ'. Source: Hampel et al., Robust Statistics (1986), section 7.2.
    """
    squares, loss = best.residuals[0] ** 2, LOSS_FUNCTIONS[observed.loss]
    if observed.errors is not None and observed.weighted_by_errors:
        return _from_replicates(float(squares.sum()), spare, level, observed.errors)
    influence = float((squares * loss.weight(squares) ** 2).sum()) / max(spare, 1)
    variance = influence / max(float(loss.curvature(squares).mean()), 1 / len(squares))
    is_likelihood = observed.loss == "squares"
    if spare - 1 < MIN_SPARE_POINTS or variance <= np.finfo(float).eps:
        return Scale(1.0, is_likelihood=is_likelihood)
    allowed = t_quantile(level, spare) ** 2
    return Scale(variance, allowed, allowed, is_likelihood=is_likelihood)


def gain_p_value(gain: float, scale: Scale, spare: int, errors: Errors) -> float:
    """Return the p-value of what one more parameter takes off the misfit; `scale` and `spare` are those with it.

    If that curve misfits too, the variance comes from its `spare` points, and is known to so many degrees of freedom.
    """
    dof = min(errors.contrast_dof, spare) if scale.birge_factor > 1 else errors.contrast_dof
    p_value = lack_of_fit(max(gain, 0.0) / scale.variance, 1, dof)
    assert p_value is not None
    return p_value


def _from_replicates(minimum: float, spare: int, level: float, errors: Errors) -> Scale:
    per_point = minimum / max(spare, 1)
    p_value = lack_of_fit(per_point, spare, errors.contrast_dof)
    misfits = p_value is not None and p_value < LACK_OF_FIT_LEVEL
    dofs = [min(dof, spare) if misfits else dof for dof in (errors.dof, errors.contrast_dof)]
    allowed, allowed_batch = (t_quantile(level, dof) ** 2 for dof in dofs)
    variance = per_point if misfits else 1.0
    return Scale(variance, allowed, allowed_batch, p_value, float(np.sqrt(variance)))
