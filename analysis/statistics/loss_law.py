"""Fits of loss laws L_b(D) = E + A_b D^-β_b over token budgets D, with a floor E that all batches b share.

Shapes: n points, b batches, p = 1 + 2 b parameters (γ, ℓ_1 … ℓ_b, s_1 … s_b) as in `law_curves`, m sets of parameters.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.statistics.law_curves import Array, Curves, Indices
from analysis.statistics.least_squares import least_squares
from analysis.statistics.noise import LACK_OF_FIT_LEVEL, Errors, lack_of_fit, t_quantile

#: A number with the ends of its interval; None for what the data do not bound.
Bounded = tuple[float | None, float | None, float | None]

#: Residuals give a variance, and batches their own exponents, only with this many points beyond the parameters.
MIN_SPARE_POINTS = 3
#: An exponent of a batch's own takes this many budgets.
MIN_BUDGETS_FOR_EXPONENT = 3
#: A law that falls by less at its largest budget, in units of its mean slope, has come to its floor before.
MIN_RELATIVE_SLOPE = 1e-3
#: Floors to start from: this many times the spread of the losses below the lowest.
_STARTS = (0.05, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class LossLaw:
    """The law of a series of batches, fitted.

    Shapes: `log_centre`, `min_log_tokens`, `max_log_tokens` [b], `parameters` [p], `residuals` [n]. `covariance` [p, p]
    of the parameters is known to `dof` degrees of freedom (`contrast_dof` between batches); None where nothing tells
    it. `birge_factor` is how far a significant misfit widened the errors.
    """

    log_centre: Array
    min_log_tokens: Array
    max_log_tokens: Array
    mean_nats: float
    parameters: Array
    residuals: Array
    shared_exponent: bool
    covariance: Array | None = None
    dof: float = 0.0
    contrast_dof: float = 0.0
    lack_of_fit_p: float | None = None
    birge_factor: float = 1.0

    @property
    def num_batches(self) -> int:
        return len(self.log_centre)

    @property
    def falls(self) -> NDArray[np.bool_]:
        """Whether the loss of each batch [b] falls all the way to the largest budget: tokens can be read off it."""
        fall = self.losses_at(self.min_log_tokens) - self.losses_at(self.max_log_tokens)
        mean_slope = fall / (self.max_log_tokens - self.min_log_tokens)
        return (fall > 0) & (-self.slopes_at(self.max_log_tokens) > MIN_RELATIVE_SLOPE * mean_slope)

    def floor_nats(self, level: float) -> Bounded:
        """Return E; no value and no end below zero, which no loss is, nor where the losses do not bend."""
        gamma = float(self.parameters[0])
        half = self._half_width(np.eye(len(self.parameters))[0], level)
        ends = (None, None) if half is None else (self._floor(gamma - half), self._floor(gamma + half))
        return self._floor(gamma), *ends

    def exponents(self, level: float) -> list[Bounded]:
        """Return β of every batch; no value and no end below zero."""
        found = []
        for value, gradient in zip(*self._exponents(), strict=True):
            half = self._half_width(gradient, level)
            ends = (None, None) if half is None else (_positive(value - half), _positive(value + half))
            found.append((_positive(value), *ends))
        return found

    def log_prefactors(self) -> list[float | None]:
        """Return log A of every batch, D in tokens; None where there is no floor to fall to."""
        floor = self._floor(float(self.parameters[0]))
        if floor is None:
            return [None] * self.num_batches
        heights = self.parameters[1 : 1 + self.num_batches] - floor
        return [float(log_a) for log_a in np.log(heights) + self._exponents()[0] * self.log_centre]

    def losses_at(self, log_tokens: Array) -> Array:
        """Return each batch's loss [b] at its own `log_tokens` [b]."""
        return np.asarray(self._at(log_tokens).losses(self.parameters[None])[0])

    def slopes_at(self, log_tokens: Array) -> Array:
        """Return each batch's dL / d log D [b] at its own `log_tokens` [b]."""
        return np.asarray(self._at(log_tokens).slopes(self.parameters[None])[0])

    def log_tokens(self, target_loss_nats: float) -> Array:
        """Return log T of every batch [b]; infinite where the target is at or below the floor."""
        at_centre = self._at(self.log_centre).log_tokens(target_loss_nats, self.parameters[None])[0]
        return np.asarray(at_centre + self.log_centre)

    def errors_at(self, log_tokens: Array, batches: Indices) -> Errors | None:
        """Return the errors of log T of some batches, `log_tokens` [b] being that of all, by the delta method.

        None where there are none, or rounding leaves nothing of them.
        """
        if self.covariance is None:
            return None
        curves = self._at(log_tokens)
        by_parameter = curves.derivatives(self.parameters[None])[0] / -curves.slopes(self.parameters[None])[0][:, None]
        covariance = by_parameter[batches] @ self.covariance @ by_parameter[batches].T
        return Errors(covariance, self.dof, self.contrast_dof) if np.all(np.diag(covariance) > 0) else None

    def _at(self, log_tokens: Array) -> Curves:
        """Return the law at one point a batch."""
        return Curves(np.arange(self.num_batches), log_tokens - self.log_centre, self.num_batches, self.mean_nats)

    def _floor(self, gamma: float) -> float | None:
        return _positive(self.mean_nats - 1 / gamma) if gamma > 0 else None

    def _exponents(self) -> tuple[Array, Array]:
        """Return β = γ s / c [b] and its derivatives by the parameters [b, p]."""
        gamma, batches = self.parameters[0], np.arange(self.num_batches)
        level, slope = self.parameters[1 + batches], self.parameters[1 + self.num_batches + batches]
        height = 1 + gamma * (level - self.mean_nats)
        gradient = np.zeros((self.num_batches, len(self.parameters)))
        gradient[:, 0] = slope / height**2
        gradient[batches, 1 + batches] = -(gamma**2) * slope / height**2
        gradient[batches, 1 + self.num_batches + batches] = gamma / height
        return gamma * slope / height, gradient

    def _half_width(self, gradient: Array, level: float) -> float | None:
        if self.covariance is None:
            return None
        return t_quantile(level, self.dof) * float(np.sqrt(gradient @ self.covariance @ gradient))


def fit_loss_law(batch: Indices, tokens: Array, losses: Array, errors: Errors | None = None) -> LossLaw:
    """Fit the law to final losses [n] at budgets `tokens` [n] by generalised least squares.

    Every batch, from 0 on, must have two budgets or more. Batches have exponents of their own where each has three
    budgets and three points are to spare, else one for all: with that, T(B) scales alike at every loss, so that no
    critical batch can change with it. Two budgets of one batch give a straight line in log D. Errors come from those of
    the losses, widened by a significant misfit, or else from the residuals where three points are to spare.

    Source: arXiv 2505.13738, there one law a batch.
    Assumption: one floor for all batches, for it belongs to the text and the model.
    """
    num_batches = int(batch.max()) + 1
    shared_exponent = _must_share(batch, num_batches)
    spare = len(losses) - (2 + num_batches if shared_exponent else 1 + 2 * num_batches)
    log_tokens = np.log(tokens)
    log_centre = np.bincount(batch, log_tokens) / np.bincount(batch)
    curves = Curves(batch, log_tokens - log_centre[batch], num_batches, float(np.mean(losses)))
    whitening = np.linalg.cholesky(np.linalg.inv(errors.covariance)).T if errors else np.eye(len(losses))
    found = _straight(curves, losses) if spare < 0 else _minimise(curves, losses, whitening, shared_exponent)
    scale = _scale(float(found.misfit[0]), spare, errors)
    return LossLaw(
        log_centre=log_centre,
        min_log_tokens=np.array([log_tokens[batch == b].min() for b in range(num_batches)]),
        max_log_tokens=np.array([log_tokens[batch == b].max() for b in range(num_batches)]),
        mean_nats=curves.mean_nats,
        parameters=found.parameters[0],
        residuals=losses - curves.losses(found.parameters)[0],
        shared_exponent=shared_exponent,
        covariance=found.covariance[0] * scale.variance if scale.dof else None,
        dof=scale.dof,
        contrast_dof=scale.contrast_dof,
        lack_of_fit_p=scale.lack_of_fit_p,
        birge_factor=float(np.sqrt(scale.variance)) if errors else 1.0,
    )


class _Found(NamedTuple):
    """Parameters [m, p] of least misfit [m], and their covariance [m, p, p] at unit variance."""

    parameters: Array
    misfit: Array
    covariance: Array


def _minimise(curves: Curves, losses: Array, whitening: Array, shared_exponent: bool) -> _Found:
    starts = _starts(curves, losses)
    if not shared_exponent:
        own = least_squares(curves.losses, curves.derivatives, losses[None], starts, whitening)
        return _Found(own.parameters, own.misfit, own.covariance())
    common = least_squares(
        lambda few: curves.losses(_spread(few, curves)),
        lambda few: curves.derivatives(_spread(few, curves)) @ _spread_slope(few, curves),
        losses[None],
        np.column_stack([starts[:, : 1 + curves.num_batches], _common_slope(starts, curves)]),
        whitening,
    )
    outer = _spread_slope(common.parameters, curves)
    covariance = outer @ common.covariance() @ np.swapaxes(outer, 1, 2)
    return _Found(_spread(common.parameters, curves), common.misfit, covariance)


def _spread(few: Array, curves: Curves) -> Array:
    """Return the parameters [m, p] of one exponent for all, given γ, ℓ_b and s [m, 2 + b]: s_b = s c_b."""
    height = 1 + few[:, :1] * (few[:, 1:-1] - curves.mean_nats)
    return np.column_stack([few[:, :-1], few[:, -1:] * height])


def _spread_slope(few: Array, curves: Curves) -> Array:
    """Return the derivatives of `_spread` [m, p, 2 + b]."""
    b, (gamma, level, slope) = curves.num_batches, (few[:, 0], few[:, 1:-1], few[:, -1])
    found = np.zeros((len(few), 1 + 2 * b, 2 + b))
    found[:, : 1 + b, : 1 + b] = np.eye(1 + b)
    found[:, 1 + b :, 0] = slope[:, None] * (level - curves.mean_nats)
    found[:, 1 + b :, 1 : 1 + b] = (slope * gamma)[:, None, None] * np.eye(b)
    found[:, 1 + b :, -1] = 1 + gamma[:, None] * (level - curves.mean_nats)
    return found


def _straight(curves: Curves, losses: Array) -> _Found:
    """Return a straight line in log D for each batch."""
    level, square = (np.bincount(curves.batch, x) for x in (losses, curves.z**2))
    slope = -np.bincount(curves.batch, curves.z * losses) / square
    parameters = np.concatenate([[0.0], level / np.bincount(curves.batch), slope])[None]
    return _Found(parameters, np.zeros(1), np.zeros((1, parameters.size, parameters.size)))


def _starts(curves: Curves, losses: Array) -> Array:
    """Return the straight lines, bent towards floors at several distances below the losses [starts, p]."""
    spread = max(float(np.ptp(losses)), np.finfo(float).eps)
    starts = np.tile(_straight(curves, losses).parameters, (len(_STARTS), 1))
    starts[:, 0] = 1 / (curves.mean_nats - losses.min() + spread * np.array(_STARTS))
    return starts


def _common_slope(starts: Array, curves: Curves) -> Array:
    """Return the mean of s_b / c_b of each start."""
    b = curves.num_batches
    height = 1 + starts[:, :1] * (starts[:, 1 : 1 + b] - curves.mean_nats)
    return np.asarray((starts[:, 1 + b :] / height).mean(axis=1))


def _must_share(batch: Indices, num_batches: int) -> bool:
    """Say whether exponents of their own would be too many numbers for the points."""
    spare = len(batch) - (1 + 2 * num_batches)
    return bool(np.bincount(batch).min() < MIN_BUDGETS_FOR_EXPONENT or spare < MIN_SPARE_POINTS)


class _Scale(NamedTuple):
    """The variance in units of the weights and its degrees of freedom; none where nothing tells it."""

    variance: float
    dof: float
    contrast_dof: float
    lack_of_fit_p: float | None


def _scale(misfit: float, spare: int, errors: Errors | None) -> _Scale:
    """Take the variance from replicates, if a point is to spare, or from residuals."""
    per_point = misfit / max(spare, 1)
    if errors is not None and spare > 0:
        p_value = lack_of_fit(per_point, spare, errors.contrast_dof)
        if p_value is not None and p_value < LACK_OF_FIT_LEVEL:
            return _Scale(per_point, min(errors.dof, spare), min(errors.contrast_dof, spare), p_value)
        return _Scale(1.0, errors.dof, errors.contrast_dof, p_value)
    if errors is None and spare >= MIN_SPARE_POINTS:
        return _Scale(per_point, spare, spare, None)
    return _Scale(1.0, 0.0, 0.0, None)


def _positive(value: float) -> float | None:
    return float(value) if value > 0 else None
