"""The curves that are fitted to one series, and the findings that come of the fits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from analysis import format as fmt
from analysis.quantities.batch_series import Series, count_batches, series_of
from analysis.quantities.cell_verdicts import why_unreached
from analysis.quantities.cells import Cells
from analysis.quantities.learning_rates import SERIES
from analysis.statistics.families import (
    FREE_EXPONENT,
    KINK,
    NEARLY_SATURATING,
    SATURATING,
    VALLEY,
    Family,
    log_batch_at,
)
from analysis.statistics.fit import Fit, fit_family
from analysis.statistics.intervals import Estimate, Resamples
from analysis.statistics.noise import REFUTED
from analysis.statistics.resampled import fit_resamples
from analysis.statistics.residuals import gain_p_value
from analysis.verdicts import Finding

#: Replicates bear α = 1 out where they give it a p-value of this at least.
DOUBT = 0.5

#: A difference of AICc that counts as clear.
CLEAR_GAIN = 4.0


#: The curves of every series, by its names in the order of `SERIES`.
FitsBySeries = Mapping[tuple[Any, ...], "CurveFits"]


@dataclass(frozen=True)
class CurveFits:
    """All curves of one series, each fitted when it is asked for; None where there are no more points than parameters.

    `residuals` and `loss` are what least squares compares (`statistics.residuals`).
    """

    series: Series
    level: float
    residuals: str = "log"
    loss: str = "squares"

    @cached_property
    def saturating(self) -> Fit | None:
        """T = T_min (1 + B / B_crit)."""
        return self._fit(SATURATING)

    @cached_property
    def free_exponent(self) -> Fit | None:
        """T = T_min (1 + (B / B_crit)^α)."""
        return self._fit(FREE_EXPONENT)

    @cached_property
    def kink(self) -> Fit | None:
        """log T flat, then a straight line in log B."""
        return self._fit(KINK)

    @cached_property
    def against_saturation(self) -> float | None:
        """p-value of α = 1 against a free exponent; None without replicates, or batches enough to fit both."""
        plain, free, errors = self.saturating, self.free_exponent, self.series.errors
        if plain is None or free is None or errors is None:
            return None
        spare = len(free.residuals) - FREE_EXPONENT.num_parameters
        return gain_p_value(plain.misfit - free.misfit, free.scale, spare, errors)

    @property
    def label(self) -> str:
        """Name what least squares compares."""
        return self.residuals if self.loss == "squares" else f"{self.residuals}, {self.loss}"

    @cached_property
    def nearly_saturating(self) -> Fit | None:
        """T = T_min (1 + (B / B_crit)^α) with α near 1; None without replicates, or where these bear α = 1 out.

        Few batches never do: a choice between curves takes as many as an interval of α. None, too, where T falls.
        """
        if self.series.whole is not None:
            return None
        p_value, free = self.against_saturation, self.free_exponent
        borne_out = p_value is not None and p_value >= DOUBT and free is not None and free.allowed is not None
        return None if self.series.errors is None or borne_out else self._fit(NEARLY_SATURATING)

    @cached_property
    def valley(self) -> Fit | None:
        """A curve that falls and rises, where T does: T is twice its least at B_crit, on the rising branch.

        It takes in the batch before the cheapest one, which says where the least lies, unless the curve then misses the
        points: T may fall for reasons of its own. Without replicates to tell, the points alone decide its shape.
        """
        whole = self.series.whole
        if whole is None:
            return None
        start = len(whole.batches) - len(self.series.batches)
        if self.series.errors is None:
            return self._fit(replace(VALLEY, spread=None), whole.part(start - 1))
        both = self._fit(VALLEY, whole.part(start - 1))
        return both if both is None or both.scale.birge_factor == 1 else self._fit(VALLEY)

    @cached_property
    def headline(self) -> Fit | None:
        """The curve of the headline: with T twice its least at B_crit, whichever it is.

        Where T falls and rises, the valley. Else the saturating curve, or the one of a nearby exponent where replicates
        refute α = 1: by its p-value, or since B_crit of α = 1 lies outside the interval that a nearby exponent gives.
        """
        if self.series.whole is not None:
            return self.valley
        p_value, plain, nearly = self.against_saturation, self.saturating, self.nearly_saturating
        if plain is None or nearly is None or not nearly.allowed:
            return plain
        knee, around = plain.critical_batch_tokens.value, nearly.critical_batch_tokens
        outside = knee is not None and not (around.low or 0.0) <= knee <= (around.high or np.inf)
        return nearly if outside or (p_value is not None and p_value < REFUTED) else plain

    @cached_property
    def knee(self) -> Estimate:
        """The batch at which T is twice its least, on the rising branch."""
        return self.batch_at(1.0)

    def batch_at(self, rise: float, reference: float | None = None) -> Estimate:
        """Return the batch at which T of the headline's curve is `1 + rise` times T(reference), else its least.

        An interval that takes α = 1 for granted misses the batch at which T is doubled most of the time where the truth
        has α = 0.8 or 1.25, with four to nine batches and 5-10 % noise. So unless the replicates bear α = 1 out, the
        interval is that of a curve of nearly that exponent, and takes in the value.
        """
        return self._sure(lambda fit: fit.batch_of(log_batch_at(rise, reference, fit.family)))

    def t_min_tokens(self) -> Estimate:
        """Return T_min of the headline's curve, as sure as its B_crit."""
        return self._sure(lambda fit: fit.t_min_tokens)

    def bounded(self, estimate: Estimate, knee: Estimate) -> Estimate:
        """Return an estimate without the end on that side on which the knee lies beyond the batches.

        There the curve is extrapolated, and how it goes on is what is not known.
        """
        if knee.value is None:
            return estimate
        low = None if knee.value < self.series.batches[0] else estimate.low
        return Estimate(estimate.value, low, None if knee.value > self.series.batches[-1] else estimate.high)

    def judge(self, fit: Fit | None, knee: Estimate, family: Family) -> Iterator[Finding]:
        """Say what a fit leaves open; `knee` is its B_crit with the interval that is reported."""
        num = count_batches(self.series.batches)
        if fit is None and len(self.series.batches):
            yield Finding("few_points", f"{num} to fit, and the curve has {family.num_parameters} parameters")
        if fit is None:
            return
        yield from self._place(fit, knee)
        if fit.allowed is None:
            words = f"no interval: {num} for {family.num_parameters} parameters"
            yield Finding("few_points", words if family.is_bent else f"{words} and no usable replicate variance")
        if fit.scale.birge_factor > 1:
            missed = f"the curve misses the points by more than the seed noise (p = {fit.scale.lack_of_fit_p:.2g})"
            yield Finding("misfit", missed + self._widened(fit))

    def _widened(self, fit: Fit) -> str:
        """Say what is done about a curve that misses the points."""
        if not fit.allowed:
            return ""
        nearly = self.nearly_saturating if fit is self.headline else None
        if nearly is not None and nearly.allowed and nearly.scale.birge_factor == 1:
            return ", so the interval takes in other exponents"
        return ", so the interval is widened"

    def doubt(self) -> Iterator[Finding]:
        """Say where another curve than the saturating one is taken, or should be."""
        if self.series.whole is not None:
            yield from self._doubt_of_valley()
            return
        if self.headline is not self.saturating:
            p_value = "" if self.against_saturation is None else f" (p = {self.against_saturation:.2g})"
            yield Finding("ok", f"α is fitted, since the replicates speak against α = 1{p_value}")
        gain = self._gain_of_exponent()
        if self.series.errors is None and gain is not None and gain > CLEAR_GAIN:
            yield Finding("ok", f"a free exponent describes the points better: its AICc is {gain:.1f} lower")

    def _doubt_of_valley(self) -> Iterator[Finding]:
        whole, fit = self.series.whole, self.valley
        if whole is not None and fit is not None:
            first = whole.batches[-len(fit.residuals)]
            words = "the critical batch is where T is twice its least, by a curve that falls and rises"
            yield Finding("ok", f"{words}, from batch {fmt.tokens(first)} on")

    def compare_exponents(self) -> Iterator[Finding]:
        """Choose between α = 1 and a free exponent by AICc, where there are points enough."""
        gain = self._gain_of_exponent()
        if gain is not None:
            better = "the free exponent" if gain > 0 else "α = 1"
            yield Finding("ok", f"AICc is {abs(gain):.1f} lower for {better}")

    def _gain_of_exponent(self) -> float | None:
        """Return by how much a free exponent lowers AICc."""
        plain, free = (fit.aicc if fit else None for fit in (self.saturating, self.free_exponent))
        return None if plain is None or free is None else plain - free

    def _sure(self, quantity: Callable[[Fit], Estimate]) -> Estimate:
        """Return the headline's value with the interval of the nearly saturating curve, where there is one."""
        if self.headline is None:
            return Estimate(None)
        own = quantity(self.headline)
        nearly = self.nearly_saturating
        return own if nearly is None or not nearly.allowed else _within(own.value, quantity(nearly))

    def _place(self, fit: Fit, knee: Estimate) -> Iterator[Finding]:
        """Say where the knee lies if the batches do not bracket it."""
        first, last = self.series.batches[0], self.series.batches[-1]
        ends = (("below", knee.low), ("above", knee.high))
        sides = [side for side, end in ends if end is None and fit.allowed]
        if sides:
            words = f"the knee is not bracketed: it may lie {' or '.join(sides)} the batches tried"
            yield Finding("not_identified", words)
        elif knee.value is None:
            yield Finding("not_identified", "the knee is not bracketed by the batches tried")
        elif not first <= knee.value <= last:
            side = "below" if knee.value < first else "above"
            yield Finding("not_identified", f"extrapolated: the knee lies {side} all batches tried")

    def _fit(self, family: Family, series: Series | None = None) -> Fit | None:
        """Fit one curve, to this series or a longer one; None where there are no more points than parameters.

        Resamples decide the intervals where the curve goes through the points. Where it misses them, seeds drawn again
        do not show by how much, and the region that is scaled by the misfit decides. It also does for a valley, of
        which resamples would have to find the branches anew.
        """
        series = series or self.series
        if len(series.batches) <= family.num_parameters:
            return None
        kind = (series.errors, self.residuals, self.loss)
        fit = fit_family(family, series.batches, series.log_tokens, self.level, *kind)
        is_settled = fit.scale.allowed is None or fit.scale.birge_factor > 1 or family.falls
        if series.resamples is None or is_settled:
            return fit
        near = (fit.log_b_crit, fit.bend)
        drawn = fit_resamples(family, series.batches, series.resamples, *kind, prior=fit.scale.variance, near=near)
        log_t_min, log_b_crit, bend = drawn.T
        return fit.with_resamples(Resamples(log_b_crit, bend, log_t_min, self.level))


def curve_fits(estimated: Cells, level: float, residuals: str = "log", loss: str = "squares") -> FitsBySeries:
    """Return the curves of every series that has cells, to be fitted when they are asked for.

    Raises: ValueError, as they are fitted, for unknown residuals or loss.
    """
    fits = {}
    for key, cells in estimated.cells.group_by(SERIES, maintain_order=True):
        names = dict(zip(SERIES, key, strict=True))
        series, runs = series_of(estimated, names, cells, level), estimated.runs_of(names)
        unreached = None if len(series.batches) or runs.is_empty() else why_unreached(runs)
        series = replace(series, findings=(unreached,)) if unreached else series
        fits[key] = CurveFits(series, level, residuals, loss)
    return fits


def knee_of(fit: Fit | None) -> Estimate:
    """Return B_crit of a fit; nothing without one."""
    return fit.critical_batch_tokens if fit else Estimate(None)


def _within(value: float | None, interval: Estimate) -> Estimate:
    """Return the value with an interval that takes it in."""
    low, high = interval.low, interval.high
    if value is None:
        return Estimate(None, low, high)
    return Estimate(value, None if low is None else min(low, value), None if high is None else max(high, value))
