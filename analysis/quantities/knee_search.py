"""How well a critical batch size is known so far, and at which batches more runs would tell most about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.quantities.batch_series import Series, series_of
from analysis.quantities.cells import estimate_cells
from analysis.quantities.critical_batch import emin_over_smin
from analysis.quantities.curve_fits import CurveFits
from analysis.quantities.learning_rates import SERIES
from analysis.statistics.families import NEARLY_SATURATING
from analysis.statistics.fit import Fit, fit_family
from analysis.statistics.informative import Information, most_informative
from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import MIN_DOF, Noise

Array = NDArray[np.float64]

#: Place of log B_crit among the parameters log T_min, log B_crit and log α.
_LOG_B_CRIT = 1

#: A curve with a free exponent goes through any three points.
LEAST_BATCHES = 4

#: Spread of log T of a run where it is not known yet: common seed noise.
_USUAL_NOISE = 0.1


@dataclass(frozen=True)
class Knee:
    """B_crit of one series, T(B) = T_min (1 + (B / B_crit)^α) with α near 1, from runs so far.

    The interval leaves α open whatever its p-value, since it decides when to stop: a lucky one must not.
    runs, rates: by batch, those that T was estimated from, and their learning rate.
    noise: of log T of one run, None where it is not known.
    """

    estimate: Estimate
    series: Series
    fit: Fit
    runs: Mapping[int, int]
    rates: Mapping[int, float]
    noise: Noise | None

    @property
    def ratio(self) -> float | None:
        """Return the upper end of the interval over the lower one; None where an end is open."""
        low, high = self.estimate.low, self.estimate.high
        return None if self.estimate.value is None or low is None or high is None else high / low

    @cached_property
    def information(self) -> Information:
        """What the runs say of log T_min, log B_crit and log α; α has its prior spread."""
        batches = np.array(list(self.runs), float)
        precision = np.array(list(self.runs.values()), float) * self._precision(batches)
        return Information.of(self._slopes(batches), precision, self._prior)

    def log_tokens(self, batch: float) -> float:
        """Return the fitted log T."""
        place = np.log(np.array([batch]))
        log_excess = self.fit.family.log_excess(place, np.array([self.fit.log_b_crit]), np.array([self.fit.bend]))
        return float(self.fit.log_t_min + log_excess[0])

    def deviation(self, batch: float) -> float:
        """Return the standard deviation of log T of one run."""
        return float(self.noise.deviation_at(np.log(batch))) if self.noise else _USUAL_NOISE

    def seeds_of_full_grid(self, batches: Sequence[int]) -> int:
        """Return how many seeds at the best rate of every batch would know B_crit as well."""
        places = np.array(batches, float)
        slopes, precision, goal = self._slopes(places), self._precision(places), self.information.deviation(_LOG_B_CRIT)
        numbers = range(1, sum(self.runs.values()) + 2)
        known = (Information.of(slopes, number * precision, self._prior).deviation(_LOG_B_CRIT) for number in numbers)
        return next((n for n, deviation in zip(numbers, known, strict=True) if deviation <= goal), numbers[-1])

    def best_batches(self, candidates: Sequence[int], cost_tokens: Sequence[float], most: int, num: int) -> list[int]:
        """Return the batches of the next `num` runs: the most expected shrinking of the interval per token.

        A batch gets at most `most` runs in all.
        """
        batches = np.array(candidates, float)
        left = np.array([most - self.runs.get(batch, 0) for batch in candidates])
        precision, cost = self._precision(batches), np.array(cost_tokens, float)
        chosen = most_informative(self.information, self._slopes(batches), precision, cost, _LOG_B_CRIT, left, num)
        return [candidates[place] for place in chosen]

    @property
    def _prior(self) -> Array:
        assert NEARLY_SATURATING.spread is not None
        return np.array([0.0, 0.0, NEARLY_SATURATING.spread**-2])

    def _precision(self, batches: Array) -> Array:
        """Return the inverse variance of one run's log T, without what its seed adds at all batches alike."""
        if self.noise is None:
            return np.full(len(batches), _USUAL_NOISE**-2)
        own = (self.noise.variance - self.noise.other_cell) * self.noise.scale_at(np.log(batches))
        return np.asarray(1 / own)

    def _slopes(self, batches: Array) -> Array:
        log_b_crit, bend = (np.full(len(batches), each) for each in (self.fit.log_b_crit, self.fit.bend))
        return np.column_stack([np.ones(len(batches)), *self.fit.family.slopes(np.log(batches), log_b_crit, bend)])


def knee_so_far(targets: pl.DataFrame, level: float) -> Knee | None:
    """Return B_crit of the one series in `targets`; None below four batches with a T."""
    with np.errstate(over="ignore"):  # intervals of single cells, while next to nothing is known of the noise
        estimated = estimate_cells(targets, level)
    if estimated.cells.is_empty():
        return None
    names = estimated.cells.select(SERIES).unique().row(0, named=True)
    series = _with_known_errors(series_of(estimated, names, estimated.cells, level))
    if len(series.batches) < LEAST_BATCHES:
        return None
    known = {row["global_batch_tokens"]: row for row in estimated.cells.iter_rows(named=True)}
    fit = fit_family(NEARLY_SATURATING, series.batches, series.log_tokens, level, series.errors)
    return Knee(
        estimate=_united(_reported(series, level), fit.critical_batch_tokens),
        series=series,
        fit=fit,
        runs={int(batch): known[int(batch)]["num_seeds"] for batch in series.batches},
        rates={int(batch): known[int(batch)]["best_lr"] for batch in series.batches},
        noise=estimated.noise[tuple(names[name] for name in SERIES)],
    )


def _with_known_errors(series: Series) -> Series:
    """Return the series without errors that too few repeated runs tell at its batches: they bound nothing."""
    errors = series.errors
    return series if errors is None or min(errors.dof, errors.contrast_dof) >= MIN_DOF else replace(series, errors=None)


def _reported(series: Series, level: float) -> Estimate:
    """Return B_crit as the report has it."""
    row = emin_over_smin(CurveFits(series, level))
    return Estimate(*(row[f"critical_batch_tokens{end}"] for end in ("", "_low", "_high")))


def _united(reported: Estimate, open_: Estimate) -> Estimate:
    """Return the reported value with the wider of both intervals; nothing bounds it on a side that one leaves open."""
    low = None if reported.low is None or open_.low is None else min(reported.low, open_.low)
    high = None if reported.high is None or open_.high is None else max(reported.high, open_.high)
    return Estimate(reported.value, low, high)
