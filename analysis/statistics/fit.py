"""One curve T(B) fitted to the batches of a series, with intervals: arrays in, a Fit out.

A curve has a height T_min, a place B_crit and perhaps a bend. The best height for a given place and bend is a weighted
mean, so that only place and bend are searched, over a grid. An interval is the range of values over all parameters
that fit nearly as well as the best ones; from ten seeds on it comes from resamples of the seeds instead.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from analysis.statistics.families import FREE_EXPONENT, SATURATING, Array, Family
from analysis.statistics.intervals import Estimate, Region, Resamples
from analysis.statistics.noise import Errors
from analysis.statistics.residuals import MIN_SPARE_POINTS, Observed, Scale, scale_of
from analysis.statistics.search import Search, edge

__all__ = ["MIN_SPARE_POINTS", "NUM_PARAMETERS", "Array", "Estimate", "Fit", "fit_family", "fit_saturating"]

NUM_PARAMETERS = SATURATING.num_parameters

#: A function of log B_crit and the bend.
Shape = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Fit:
    """T(B) of one family at its best parameters.

    `limits` [2, 2] are the ends of the search for log B_crit and for the bend; `residuals` [n] of log T; `misfit` the
    least sum of squares, in units of the weights. There are no intervals where `allowed` is None.
    """

    family: Family
    log_b_crit: float
    bend: float
    log_t_min: float
    limits: Array
    residuals: Array
    misfit: float
    scale: Scale
    profile: Callable[[], Region | None]
    resamples: Resamples | None = None

    @cached_property
    def allowed(self) -> Region | Resamples | None:
        """The parameters that intervals range over: the resamples if there are any, else those that fit well enough.

        The latter are searched for at the first use.
        """
        return self.profile() if self.resamples is None else self.resamples

    @property
    def critical_batch_tokens(self) -> Estimate:
        """B_crit; its value or an end of its interval is None if the search found it at its own limit."""
        low, high = self._ends(lambda log_b, _: log_b)
        start, last = self.limits[0]
        return Estimate(
            _exp(self.log_b_crit if start < self.log_b_crit < last else None),
            _exp(None if low is None or low <= start else low),
            _exp(None if high is None or high >= last else high),
        )

    @property
    def bend_estimate(self) -> Estimate:
        """The third parameter; an end of its interval is None if it is the limit of the search."""
        low, high = self._ends(lambda _, bend: bend)
        start, last = self.limits[1]
        return Estimate(
            self.bend, None if low is None or low <= start else low, None if high is None or high >= last else high
        )

    @property
    def t_min_tokens(self) -> Estimate:
        """T_min; without a lower end if B_crit has none, since a curve of vanishing B_crit has vanishing T_min."""
        return self._bounded_by(self.limits[0][0], self._of_tokens(lambda log_b, _: 0.0 * log_b[None])[0])

    @property
    def s_min_steps(self) -> Estimate:
        """S_min = T_min / B_crit of a saturating curve; without a lower end if B_crit has no upper one.

        Curves of other families are given none.
        """
        if self.family is not SATURATING:
            return Estimate(None)
        return self._bounded_by(self.limits[0][1], self._of_tokens(lambda log_b, _: -log_b[None])[0])

    @property
    def aicc(self) -> float | None:
        """Akaike's criterion, corrected for few points.

        None with fewer points than k + 3, the variance among the k parameters, and for a family with an assumed spread
        of its bend: that is neither a free parameter nor a fixed one.
        """
        num, k = len(self.residuals), self.family.num_parameters + 1
        if self.family.spread is not None:
            return None
        if num < k + MIN_SPARE_POINTS or not self.scale.is_likelihood or self.misfit <= 0:
            return None
        return float(num * np.log(self.misfit / num) + 2 * k + 2 * k * (k + 1) / (num - k - 1))

    def tokens_at(self, global_batch_tokens: Array) -> list[Estimate]:
        """Return the fitted T(B) at every batch [m]."""
        log_batch = np.log(global_batch_tokens)[:, None]
        return self._of_tokens(lambda log_b, bend: self.family.log_excess(log_batch, log_b, bend))

    def batch_of(self, log_batch: Shape) -> Estimate:
        """Return the batch exp(log_batch(log B_crit, bend)); value and ends are None where those of B_crit are."""
        knee, best = self.critical_batch_tokens, log_batch(np.array(self.log_b_crit), np.array(self.bend))
        values = (float(best), *self._ends(log_batch))
        known = zip(values, (knee.value, knee.low, knee.high), strict=True)
        return Estimate(*(None if end is None else _exp(value) for value, end in known))

    def with_resamples(self, resamples: Resamples) -> "Fit":
        """Return the same fit with intervals from the parameters of resamples."""
        return replace(self, resamples=resamples)

    def _ends(self, shape: Shape) -> tuple[float | None, float | None]:
        if self.allowed is None:
            return None, None
        low, high = self.allowed.of_shape(shape(self.allowed.log_b_crit, self.allowed.bend))
        return float(low), float(high)

    def _of_tokens(self, shift: Shape) -> list[Estimate]:
        """Estimate exp(log T_min + shift) for every row of the shift [m, K]."""
        values = self.log_t_min + shift(np.array([self.log_b_crit]), np.array([self.bend]))[:, 0]
        if self.allowed is None:
            return [Estimate(value) for value in np.exp(values).tolist()]
        ends = self.allowed.of_tokens(shift(self.allowed.log_b_crit, self.allowed.bend))
        return [Estimate(*each) for each in np.exp([values, *ends]).T.tolist()]

    def _bounded_by(self, limit: float, estimate: Estimate) -> Estimate:
        """Return the estimate without value or lower end where B_crit is at this limit of its search."""
        value = None if self.log_b_crit == limit else estimate.value
        is_open = self.allowed is not None and self.allowed.reaches(limit)
        return Estimate(value, None if is_open else estimate.low, estimate.high)


def fit_family(
    family: Family,
    global_batch_tokens: Array,
    log_tokens: Array,
    level: float,
    errors: Errors | None = None,
    residuals: str = "log",
    loss: str = "squares",
) -> Fit:
    """Fit one curve to log T [n] by (generalised) least squares; deterministic.

    Intervals need the variance of log T. It comes from replicates, as `errors`, if there are any. If the curve misses
    the points by significantly more than these say (F test), the variance is multiplied by misfit / (n - k), and then
    is known to n - k degrees of freedom only. Without replicates, and for residuals of T or S or a robust loss, the
    variance comes from the residuals. That takes n >= k + 3 points, the variance among the k parameters. With fewer
    there is no interval, and in no case for a family with three free parameters.

    Raises: ValueError for unknown residuals or loss.
    Source: the scale factor is R. T. Birge's, Phys. Rev. 40 (1932) 207.
    Assumption: profile regions {misfit <= best + t²} have their level: exact for linear models, to first order here.
    """
    log_batch = np.log(np.asarray(global_batch_tokens, float))
    observed = Observed(log_batch, np.asarray(log_tokens, float), errors, residuals, loss)
    spare = len(log_batch) - family.num_parameters
    assert spare >= 0, log_batch
    free = Scale(1.0) if family.spread is None else _free_scale(observed, level)
    search = Search(family, observed, free.variance)
    best = search.best()
    at_best = search.at(best[None])
    scale = scale_of(at_best, spare, level, observed)
    is_scaled = free.allowed is not None if family.spread else not family.is_bent or spare - 1 >= MIN_SPARE_POINTS
    if not is_scaled:
        scale = replace(scale, allowed=None, allowed_batch=None)
    fitted = at_best.log_t_min[0] + family.log_excess(log_batch, best[:1], best[1:])
    return Fit(
        family=family,
        log_b_crit=float(best[0]),
        bend=float(best[1]),
        log_t_min=float(at_best.log_t_min[0]),
        limits=search.limits,
        residuals=observed.log_tokens - fitted,
        misfit=float((at_best.residuals[0] ** 2).sum()),
        scale=scale,
        profile=partial(_region, search, best, scale),
    )


def fit_saturating(global_batch_tokens: Array, log_tokens: Array, level: float, errors: Errors | None = None) -> Fit:
    """Fit T(B) = T_min (1 + B / B_crit) to log T [n].

    Source: arXiv 1812.06162, eq. 2.11.
    """
    return fit_family(SATURATING, global_batch_tokens, log_tokens, level, errors)


def _free_scale(observed: Observed, level: float) -> Scale:
    """Return the variance of the points around the curve of free exponent.

    A family with an assumed spread of its bend weighs that spread against the points, in units of this variance.
    """
    search = Search(FREE_EXPONENT, observed)
    spare = len(observed.log_batch) - FREE_EXPONENT.num_parameters
    return scale_of(search.at(search.best()[None]), spare, level, observed)


def _region(search: Search, best: Array, scale: Scale) -> Region | None:
    """Return the parameters whose misfit is allowed; None without a variance.

    These are the points of a grid, and those where the lines of the grid pass the limits of what is allowed.
    """
    if scale.allowed is None or scale.allowed_batch is None:
        return None
    limits = sorted({scale.allowed, scale.allowed_batch})
    grid = search.region(best, limits[-1] * scale.variance)
    least = search.at(best[None]).misfit[0]
    height = np.maximum(search.at(grid.reshape(-1, 2)).misfit - least, 0.0).reshape(grid.shape[:2]) / scale.variance
    parts = [best[None], grid[height <= limits[-1]]]
    heights = [np.zeros(1), height[height <= limits[-1]]]
    for limit in limits:
        parts.append(edge(grid, np.sqrt(height), float(np.sqrt(limit))))
        heights.append(np.full(len(parts[-1]), limit))
    points, misfit = np.concatenate(parts), np.concatenate(heights)
    found = search.at(points)
    return Region(
        log_b_crit=points[:, 0],
        bend=points[:, 1],
        log_t_min=found.log_t_min,
        half=np.sqrt(np.maximum(scale.allowed - misfit, 0.0) * scale.variance / found.curvature),
        misfit=misfit,
        allowed_shape=scale.allowed_batch,
        allowed_tokens=scale.allowed,
    )


def _exp(value: float | None) -> float | None:
    return None if value is None else float(np.exp(value))
