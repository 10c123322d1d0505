"""Ratios of the parameters of two curves T(B) = T_min (1 + (B / B_crit)^α), fitted jointly, with profile intervals.

Seeds that both sides share correlate their errors, so that the ratios are surer than either side alone says. Given both
B_crit the model is linear in both log T_min: what is left is a surface over the two log B_crit, searched as a whole.
Values are those of α = 1, unless that is refuted. Intervals take in what an α near 1, common to both, allows: real
curves leave it open, and a ratio of B_crit that rests on α = 1 alone would be too sure of itself.

Shapes: n points, those of the first side before those of the second; g points along either log B_crit; K of a cloud.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.statistics.families import EXPONENT_SPREAD, FREE_EXPONENT
from analysis.statistics.intervals import Estimate
from analysis.statistics.least_squares import ROUGH, Solution
from analysis.statistics.noise import REFUTED
from analysis.statistics.residuals import Concentrated, Scale, gain_p_value, scale_of
from analysis.statistics.two_curves import TwoCurves

Array = NDArray[np.float64]

#: Both T_min and both B_crit.
NUM_PARAMETERS = 4
_SURFACE_POINTS = 121
_ZOOMS = 4
#: Values of log α that intervals take in, in standard errors times t.
_SLICES = np.linspace(-1.3, 1.3, 13)
_LOG_EXPONENTS = np.linspace(*FREE_EXPONENT.bends, 33)
_SIGNS = np.array([1.0, -1.0])
_FIRST, _SECOND = 0, 1


@dataclass(frozen=True)
class Cloud:
    """Parameters [K] that the data allow: both log B_crit [2, K], α, and log T_min - log T_min' within ± `half`.

    `allows_tokens` says which count for what contains T_min, `allows_shape` for what rests on the B_crit alone.
    """

    log_b_crit: Array
    exponent: Array
    log_ratio: Array
    half: Array
    allows_tokens: NDArray[np.bool_]
    allows_shape: NDArray[np.bool_]

    def reaches(self, side: int, log_b_crit: float) -> bool:
        """Say whether B_crit of a side is allowed as far out as this."""
        return bool(np.any(self.log_b_crit[side] == log_b_crit))


@dataclass(frozen=True)
class JointFit:
    """Two curves: `best` holds log T_min and log B_crit of the first side, then of the second, and log α of both.

    `refutation` is the p-value of α = 1 where that is refuted and log α is not 0. `prior` is the variance that the
    spread of α is weighed against. `limits` are the ends of the search for log B_crit, and `spans` [2, 2] the smallest
    and the largest log B of each side: no interval has an end where its B_crit lies beyond them. Without a variance
    there is no `cloud`, and no interval.
    """

    best: Array
    refutation: float | None
    scale: Scale
    prior: float
    limits: Array
    spans: Array
    cloud: Cloud | None

    @property
    def ratio_small_batch(self) -> Estimate:
        """R_0, the ratio of T_min, which vanish with B_crit."""
        is_open = (self._reaches(_FIRST, 0), self._reaches(_SECOND, 0))
        return self._estimate(float(self.best[0] - self.best[2]), tokens=1.0, batches=0.0, is_open=is_open)

    @property
    def ratio_large_batch(self) -> Estimate:
        """R_∞, the limit of R: at α = 1 the ratio of S_min = T_min / B_crit, which vanish as B_crit grows."""
        is_open = (self._reaches(_FIRST, 1), self._reaches(_SECOND, 1))
        exponent = 0.0 if self.cloud is None else self.cloud.exponent
        value = self.best[0] - self.best[2] + np.exp(self.best[4]) * (self.best[3] - self.best[1])
        return self._estimate(float(value), tokens=1.0, batches=exponent, is_open=is_open)

    @property
    def critical_batch_ratio(self) -> Estimate:
        """B_crit of the second side over that of the first: at α = 1 it is R_∞ / R_0."""
        is_open = (
            self._reaches(_FIRST, 1) or self._reaches(_SECOND, 0),
            self._reaches(_FIRST, 0) or self._reaches(_SECOND, 1),
        )
        return self._estimate(float(self.best[3] - self.best[1]), tokens=0.0, batches=1.0, is_open=is_open)

    def batch_ratio_at_equal_tokens(self, slope: float) -> Estimate:
        """B_crit of the second side where its T_min is that of the first, over B_crit of the first.

        `slope` is d log B_crit / d log T_min of the second side over target losses, taken as given.
        """
        is_open = any(self._reaches(side, end) for side in (_FIRST, _SECOND) for end in (0, 1))
        value = self.best[3] - self.best[1] + slope * (self.best[0] - self.best[2])
        return self._estimate(float(value), tokens=slope, batches=1.0, is_open=(is_open, is_open))

    def knee(self, side: int) -> Estimate:
        """B_crit of one side."""
        own = np.zeros(1) if self.cloud is None else self.cloud.log_b_crit[side]
        is_open = (self._reaches(side, 0), self._reaches(side, 1))
        return self._within(float(self.best[1 + 2 * side]), own, 0.0, is_open)

    def _reaches(self, side: int, end: int) -> bool:
        """Say whether B_crit of a side is, or may be at the limit, beyond the batches on that end."""
        log_b_crit, (first, last) = self.best[1 + 2 * side], self.spans[side]
        is_beyond = log_b_crit < first if end == 0 else log_b_crit > last
        return self.cloud is not None and bool(is_beyond or self.cloud.reaches(side, float(self.limits[end])))

    def _estimate(self, value: float, tokens: float, batches: float | Array, is_open: tuple[bool, bool]) -> Estimate:
        """Estimate exp(value), which is (T_min / T_min')^tokens · (B_crit' / B_crit)^batches."""
        if self.cloud is None:
            return Estimate(float(np.exp(value)))
        log_batch_ratio = self.cloud.log_b_crit[_SECOND] - self.cloud.log_b_crit[_FIRST]
        return self._within(value, tokens * self.cloud.log_ratio + batches * log_batch_ratio, abs(tokens), is_open)

    def _within(self, value: float, centre: Array, tokens: float, is_open: tuple[bool, bool]) -> Estimate:
        """Take as ends the extremes of centre [K] ± tokens · half over the cloud, and the value in."""
        if self.cloud is None:
            return Estimate(float(np.exp(value)))
        allowed = self.cloud.allows_tokens if tokens else self.cloud.allows_shape
        half = tokens * self.cloud.half[allowed]
        low, high = np.min(centre[allowed] - half, initial=value), np.max(centre[allowed] + half, initial=value)
        ends = (None if is_open[0] else float(np.exp(low)), None if is_open[1] else float(np.exp(high)))
        return Estimate(float(np.exp(value)), *ends)


def fit_two(curves: TwoCurves, level: float) -> JointFit:
    """Fit two curves of one α to log T [n] by generalised least squares; deterministic.

    α is 1 for the values, and near 1 (`families.EXPONENT_SPREAD`) for intervals, and for values where the replicates
    refute 1: where a free α lowers the misfit by significantly more than they explain. That the curves miss the points
    whatever α is none of its doing. Without replicates, α is 1. The variance and the misfit allowed are those of a
    single curve (`residuals.scale_of`).
    """
    log_tokens = curves.observed.log_tokens[None]
    plain = curves.hold(log_tokens, np.zeros(1), curves.starts)
    errors = curves.observed.errors
    if errors is None:
        scale = _scale(curves, plain, NUM_PARAMETERS, level)
        cloud = _Surface(curves, 1.0).cloud(np.zeros(1), float(plain.misfit[0]), scale)
        return JointFit(plain.parameters[0], None, scale, 1.0, curves.limits, curves.spans, cloud)
    free = curves.free(log_tokens, plain.parameters)
    free_scale, spare = _scale(curves, free, NUM_PARAMETERS + 1, level), len(log_tokens[0]) - NUM_PARAMETERS - 1
    p_value = gain_p_value(float(plain.misfit[0] - free.misfit[0]), free_scale, spare, errors)
    prior, refuted = free_scale.variance, p_value < REFUTED
    near = curves.near_one(log_tokens, plain.parameters, prior)
    scale = _scale(curves, near, NUM_PARAMETERS, level)
    error = min(EXPONENT_SPREAD / np.sqrt(prior), float(np.sqrt(near.covariance()[0, 4, 4])))
    reach = error * np.sqrt(scale.variance * (scale.allowed or 0.0))
    cloud = _Surface(curves, prior).cloud(near.parameters[0, 4] + reach * _SLICES, float(near.misfit[0]), scale)
    best = (near if refuted else plain).parameters[0]
    return JointFit(best, p_value if refuted else None, scale, prior, curves.limits, curves.spans, cloud)


def resampled_ratios(curves: TwoCurves, fit: JointFit, log_tokens: Array) -> tuple[Array, Array, Array]:
    """Return R_0, R_∞ and B_crit' / B_crit of every row of resampled `log_tokens` [r, n], α near 1; deterministic."""
    parameters = curves.near_one(log_tokens, fit.best[None], fit.prior, ROUGH).parameters
    t_min, b_crit, other_t_min, other_b_crit, log_exponent = parameters.T
    small, log_batches = np.exp(t_min - other_t_min), other_b_crit - b_crit
    return small, small * np.exp(np.exp(log_exponent) * log_batches), np.exp(log_batches)


def resampled_exponent(curves: TwoCurves, fit: JointFit, log_tokens: Array) -> Array:
    """Return α of every row of resampled `log_tokens` [r, n], within the limits of the search; deterministic."""
    free = curves.free(log_tokens, fit.best[None], ROUGH)
    return np.asarray(np.exp(np.clip(free.parameters[:, 4], *FREE_EXPONENT.bends)))


def common_exponent(curves: TwoCurves, fit: JointFit, level: float) -> tuple[Estimate, Scale]:
    """Return α of both curves with the interval of its profile; no end where that reaches the end of the search."""
    tokens = np.broadcast_to(curves.observed.log_tokens, (len(_LOG_EXPONENTS), len(curves.observed.log_tokens)))
    held = curves.hold(tokens, _LOG_EXPONENTS, fit.best[None])
    free = curves.free(tokens[:1], held.parameters[[np.argmin(held.misfit)]])
    scale = _scale(curves, free, NUM_PARAMETERS + 1, level)
    best, least = float(free.parameters[0, 4]), float(free.misfit[0])
    place = int(np.searchsorted(_LOG_EXPONENTS, best))
    if scale.allowed_batch is None or place in (0, len(_LOG_EXPONENTS)):
        return Estimate(float(np.exp(best)) if scale.allowed_batch is None else None), scale
    depth = np.sqrt(np.maximum(held.misfit - least, 0.0) / scale.variance)
    limit = float(np.sqrt(scale.allowed_batch))
    low = _crossing(limit, np.r_[0.0, depth[:place][::-1]], np.r_[best, _LOG_EXPONENTS[:place][::-1]])
    high = _crossing(limit, np.r_[0.0, depth[place:]], np.r_[best, _LOG_EXPONENTS[place:]])
    return Estimate(float(np.exp(best)), low, high), scale


def _crossing(limit: float, depth: Array, places: Array) -> float | None:
    """Return the exponential of the farthest place where the depth passes `limit` on its way out, None without one."""
    inside = int(np.flatnonzero(depth <= limit)[-1])
    if inside == len(depth) - 1:
        return None
    return float(np.exp(np.interp(limit, depth[inside : inside + 2], places[inside : inside + 2])))


def _scale(curves: TwoCurves, solution: Solution, num_parameters: int, level: float) -> Scale:
    observed = curves.observed
    residuals = observed.root @ (observed.log_tokens - curves.fitted(solution.parameters)[0])
    none = np.zeros(1)
    return scale_of(Concentrated(none, none, none, residuals[None]), len(residuals) - num_parameters, level, observed)


class _Surface:
    """The misfit over both log B_crit, with both log T_min at their best: separable up to one product of matrices."""

    def __init__(self, curves: TwoCurves, prior: float) -> None:
        self.prior = prior
        observed, num = curves.observed, curves.num_first
        sides = np.zeros((len(observed.log_tokens), 2))
        sides[:num, _FIRST] = sides[num:, _SECOND] = 1.0
        whitened = observed.root @ sides
        variance = np.linalg.inv(whitened.T @ whitened)
        solve = variance @ whitened.T @ observed.root
        self.limits = curves.limits
        self._ratio_variance = float(_SIGNS @ variance @ _SIGNS)
        self._log_tokens, self._log_batch = (
            np.split(each, [num]) for each in (observed.log_tokens, observed.log_batch)
        )
        self._ratio = np.split(_SIGNS @ solve, [num])
        self._residual = np.split(observed.root - whitened @ solve, [num], axis=1)

    def at(self, axes: Array, log_exponent: float) -> tuple[Array, Array]:
        """Return misfit and log T_min - log T_min' [g, g] at the log B_crit of both sides, `axes` [2, g]."""
        excess = [
            log_tokens - FREE_EXPONENT.log_excess(log_batch, axis[:, None], np.array(log_exponent))
            for log_tokens, log_batch, axis in zip(self._log_tokens, self._log_batch, axes, strict=True)
        ]
        residuals = [own @ matrix.T for own, matrix in zip(excess, self._residual, strict=True)]
        squares = [(own**2).sum(axis=1) for own in residuals]
        misfit = squares[0][:, None] + squares[1][None, :] + 2 * residuals[0] @ residuals[1].T
        ratios = [own @ row for own, row in zip(excess, self._ratio, strict=True)]
        return misfit, np.asarray(ratios[0][:, None] + ratios[1][None, :])

    def cloud(self, log_exponents: Array, least: float, scale: Scale) -> Cloud | None:
        """Return what is allowed above the `least` misfit at some α; None without a variance.

        α is weighed as one more observation, of log α = 0 ± EXPONENT_SPREAD in units of the `prior` variance.
        """
        if scale.allowed is None or scale.allowed_batch is None:
            return None
        slices = [self._slice(float(own), least, scale) for own in log_exponents]
        knees, *rest = (np.concatenate(part, axis=-1) for part in zip(*slices, strict=True))
        exponent, log_ratio, above = rest
        half = np.sqrt(np.maximum(scale.allowed - above, 0.0) * scale.variance * self._ratio_variance)
        return Cloud(knees, exponent, log_ratio, half, above <= scale.allowed, above <= scale.allowed_batch)

    def _slice(self, log_exponent: float, least: float, scale: Scale) -> tuple[Array, Array, Array, Array]:
        """Return both log B_crit, α, the log ratio of T_min and the misfit above the least, where any allows it."""
        base = least - self.prior * (log_exponent / EXPONENT_SPREAD) ** 2
        widest = max(scale.allowed or 0.0, scale.allowed_batch or 0.0)
        axes = self._region(log_exponent, base + widest * scale.variance)
        misfit, log_ratio = self.at(axes, log_exponent)
        above = np.maximum(misfit - base, 0.0) / scale.variance
        kept = above <= widest
        knees = np.stack(np.meshgrid(*axes, indexing="ij"))[:, kept]
        return knees, np.full(knees.shape[1], np.exp(log_exponent)), log_ratio[kept], above[kept]

    def _region(self, log_exponent: float, bound: float) -> Array:
        """Return axes [2, g] over the box where the misfit is within a bound, or around its least; by zooming in."""
        axes = np.array([self._around(self.limits, 0.0)] * 2)
        for _ in range(_ZOOMS):
            misfit, _ = self.at(axes, log_exponent)
            inside = misfit <= max(bound, float(misfit.min()))
            filled = [axes[side][np.any(inside, axis=1 - side)] for side in (_FIRST, _SECOND)]
            axes = np.array([self._around(own, axis[1] - axis[0]) for own, axis in zip(filled, axes, strict=True)])
        return axes

    def _around(self, filled: Array, margin: float) -> Array:
        low, high = np.clip([filled.min() - margin, filled.max() + margin], *self.limits)
        return np.linspace(float(low), float(high), _SURFACE_POINTS)
