"""What the runs of a cell say of its best learning rate, and at which rates more runs would say most.

A cell is looked at through the rates around its best one: a parabola in log rate holds there, and not further out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import polars as pl

from analysis.quantities.cell_verdicts import MAX_EXCESS_TOKENS
from analysis.quantities.learning_rates import SERIES, SETTING, RateCurves, fit_rates, ranked
from analysis.quantities.run_groups import group_runs
from analysis.statistics.noise import Noise, t_quantile

#: A parabola is fitted to the rates within this many factors of the grid from the best one tried.
WINDOW_FACTORS = 2.5

#: Neighbours of the optimum that lie nearer together than this power of the grid's factor need no rate between them.
FINEST_FACTOR = 0.5

#: A run is stopped where it needs more tokens than the best rate with this confidence, one-sided ...
STOP_LEVEL = 0.98
#: ... and by this factor on top, so that rates next to the best still tell the curvature.
STOP_FACTOR = 1.25

#: A new seed is run at this many rates, those nearest to the optimum.
RATES_OF_A_SEED = 3

Why = Literal["start", "edge", "between", "seeds"]

#: (model, optimizer, protocol, global_batch_tokens, tuning)
Cell = tuple[Any, ...]
CELL = ("model", "optimizer", "protocol", "global_batch_tokens", "tuning")


@dataclass(frozen=True)
class RateState:
    """A cell at one target. Rates are sorted; at `usable` ones every run reached the target.

    best: the rate tried that is chosen; the one of lowest loss where none reached the target.
    optimum, low, high, curvature: of the parabola of log T in log rate, as far as they are known.
    log_tokens: the fitted log T at the best rate; stop_log_tokens: a run not at the target by then cannot win.
    deviation: of log T of one run, without what its seed adds at all rates alike.
    has_noise: whether repeated runs or residuals say how much T varies.
    """

    tried: tuple[float, ...]
    usable: tuple[float, ...]
    best: float | None
    optimum: float | None = None
    low: float | None = None
    high: float | None = None
    curvature: float | None = None
    log_tokens: float | None = None
    stop_log_tokens: float | None = None
    deviation: float | None = None
    has_noise: bool = False

    @property
    def excess(self) -> float | None:
        """Return how much log T is lost at worst, if the optimum lies at an end of its interval."""
        if self.low is None or self.high is None or self.optimum is None or self.curvature is None:
            return None
        return self.curvature * float(np.log([self.high / self.optimum, self.optimum / self.low]).max() ** 2)

    @property
    def is_interior(self) -> bool:
        """Whether the rates tried bracket the optimum with its whole interval."""
        known = self.low is not None and self.high is not None
        return known and self.tried[0] <= (self.low or 0.0) and (self.high or np.inf) <= self.tried[-1]

    @property
    def is_settled(self) -> bool:
        """Whether the optimum is interior, and so well known that no more than a few tokens hang on it."""
        return self.is_interior and self.excess is not None and self.excess <= MAX_EXCESS_TOKENS

    def nearest(self) -> tuple[float, ...]:
        """Return the rates at which a new seed says most: the usable ones next to the optimum, nearest first."""
        centre = self.optimum if self.is_interior and self.optimum else self.best
        if centre is None:
            return ()
        rates = self.usable or (self.best or centre,)
        return tuple(sorted(rates, key=lambda rate: abs(np.log(rate / centre)))[:RATES_OF_A_SEED])

    def log_tokens_at(self, rate: float) -> float | None:
        """Return log T at a rate by the parabola; None without one."""
        if self.log_tokens is None or self.best is None or self.optimum is None or self.curvature is None:
            return None
        here, best = (np.log(each / self.optimum) ** 2 for each in (rate, self.best))
        return float(self.log_tokens + self.curvature * (here - best))


@dataclass(frozen=True)
class Wanted:
    """Rates at which runs are wanted, why, and the same in words; `seeds`: on a fresh seed, else on the cell's own."""

    rates: tuple[float, ...]
    why: Why
    words: str


def rate_states(targets: pl.DataFrame, factors: Mapping[Cell, float], level: float) -> dict[Cell, RateState]:
    """Return what is known of each cell of `targets` (one target loss, the grid's runs).

    `factors` are the ratios of neighbouring rates in the grid of each cell. One curvature holds for all cells of a
    model and optimizer.
    """
    if targets.is_empty():
        return {}
    groups = group_runs(targets)
    states: dict[Cell, RateState] = {}
    for series, own in groups.frame.group_by(SERIES, maintain_order=True):
        noise, rates = groups.noise[series], ranked(own.sort(SETTING), None)
        lowest = _lowest_losses(targets.filter(**dict(zip(SERIES[:3], series[:3], strict=True))))
        best = {cell: _best(cell_rates) or lowest.get(cell) for cell, cell_rates in _by_cell(rates).items()}
        near = pl.concat(
            [
                cell_rates.filter(_within(best[cell], factors[*series[:3], *cell]))
                for cell, cell_rates in _by_cell(rates).items()
            ]
        )
        fitted = fit_rates(near.sort(SETTING), noise, level)
        for cell, cell_rates in _by_cell(rates).items():
            states[*series[:3], *cell] = _state(cell_rates, best[cell], cell, fitted, noise)
    return states


def wanted_rates(state: RateState, factor: float) -> Wanted | None:
    """Say which runs the cell needs next; None where it is settled, or where nothing would help.

    `factor` is the ratio of neighbouring rates in the cell's grid: by it the grid is extended, while the optimum or an
    end of its interval may lie outside the rates tried.
    """
    if state.is_settled or state.best is None:
        return None
    outside = _outside(state, factor)
    if outside is not None:
        return outside
    if not state.usable:
        return None
    between = _between(state, factor)
    if between is not None:
        return between
    return Wanted(state.nearest(), "seeds", _seeds_in_words(state))


def _outside(state: RateState, factor: float) -> Wanted | None:
    """Extend the grid on each side on which the optimum may lie, unless runs at that end failed: that is a wall."""
    first, last = state.tried[0], state.tried[-1]
    below, above = rounded(first / factor), rounded(last * factor)
    if len(state.tried) == 1:
        return Wanted((below, above), "start", "one rate shows no optimum")
    wall_below = bool(state.usable) and first not in state.usable
    wall_above = bool(state.usable) and last not in state.usable
    if state.low is not None and state.high is not None:
        words = f"the optimum may lie outside {first:.3g} to {last:.3g}: {state.low:.3g} to {state.high:.3g}"
        lower, upper = state.low < first, state.high > last
    else:
        words = f"the best rate, {state.best:.3g}, is at the edge of {first:.3g} to {last:.3g}"
        lower, upper = state.best == first, state.best == last
    rates = [below] * (lower and not wall_below) + [above] * (upper and not wall_above)
    return Wanted(tuple(rates), "edge", words) if rates else None


def _between(state: RateState, factor: float) -> Wanted | None:
    """Halve the widest gap next to the optimum, as long as it is wider than half a step of the grid."""
    centre = state.optimum if state.is_interior and state.optimum else state.best
    assert centre is not None
    below = [rate for rate in state.tried if rate < centre]
    above = [rate for rate in state.tried if rate > centre]
    ends = [max(below, default=centre), *([centre] if centre in state.tried else []), min(above, default=centre)]
    gaps = [(high / low, low, high) for low, high in pairwise(ends)]
    ratio, low, high = max(gaps, default=(1.0, centre, centre))
    if ratio <= factor**FINEST_FACTOR * 1.05:
        return None
    words = f"the optimum is not known well enough between {low:.3g} and {high:.3g}"
    return Wanted((rounded(np.sqrt(low * high)),), "between", words)


def _seeds_in_words(state: RateState) -> str:
    if not state.has_noise:
        return "too few repeated runs say how much T varies"
    if state.excess is None:
        return "the rates differ by less than the noise"
    return f"rates within the noise of each other differ by up to {np.expm1(state.excess):.0%} of the tokens"


def _by_cell(rates: pl.DataFrame) -> dict[tuple[int, str], pl.DataFrame]:
    return {
        (int(batch), str(tuning)): own
        for (batch, tuning), own in rates.group_by("global_batch_tokens", "tuning", maintain_order=True)
    }


def _best(rates: pl.DataFrame) -> float | None:
    """Return the rate with the least mean T, of those of which the fewest runs fell short."""
    competing = rates.filter(pl.col("num_reached") > 0)
    competing = competing.filter(pl.col("lost") == pl.col("lost").min()).sort("likely_log_tokens", "peak_lr")
    return float(competing["peak_lr"][0]) if competing.height else None


def _lowest_losses(targets: pl.DataFrame) -> dict[tuple[int, str], float]:
    """Return the rate of lowest loss of each cell: it points to where the target might be reached."""
    means = (
        targets.filter((pl.col("status") != "diverged") & pl.col("lowest_loss_nats").is_not_null())
        .group_by("global_batch_tokens", "tuning", "peak_lr")
        .agg(pl.col("lowest_loss_nats").mean())
        .sort("lowest_loss_nats", "peak_lr", descending=[True, False])
    )
    return {(batch, tuning): rate for batch, tuning, rate, _ in means.iter_rows()}


def _within(best: float | None, factor: float) -> pl.Expr:
    if best is None:
        return pl.lit(value=False)
    return (pl.col("peak_lr") / best).log().abs() <= WINDOW_FACTORS * float(np.log(factor))


def _state(
    rates: pl.DataFrame, best: float | None, cell: tuple[int, str], fitted: RateCurves | None, noise: Noise | None
) -> RateState:
    tried = tuple(rates["peak_lr"].sort().to_list())
    usable = tuple(rates.filter(pl.col("log_tokens").is_not_null())["peak_lr"].sort().to_list())
    if best is None or not usable:
        return RateState(tried, usable, best)
    own = rates.filter(pl.col("peak_lr") == best)
    log_tokens = fitted.log_tokens(cell[0], best, cell[1]) if fitted else None
    if log_tokens is None:
        log_tokens = own["likely_log_tokens"][0]
    known = fitted if fitted and (cell in fitted.curves) and fitted.curvature > 0 else None
    optimum, low, high = known.optimum(*cell) if known else (None, None, None)
    return RateState(
        tried=tried,
        usable=usable,
        best=best,
        optimum=optimum,
        low=low,
        high=high,
        curvature=known.curvature if known else None,
        log_tokens=log_tokens,
        stop_log_tokens=stop_log_tokens(log_tokens, own["num_runs"][0], np.log(cell[0]), noise),
        deviation=_deviation(noise, np.log(cell[0])) if noise else None,
        has_noise=fitted.t is not None if fitted else noise is not None,
    )


def stop_log_tokens(log_tokens: float | None, num_runs: int, log_batch: float, noise: Noise | None) -> float | None:
    """Return the log tokens at which a run that is not at the target cannot win; None where the noise is not known."""
    if log_tokens is None or noise is None:
        return None
    beyond = t_quantile(2 * STOP_LEVEL - 1, noise.contrast_dof) * _deviation(noise, log_batch)
    return float(log_tokens + beyond * np.sqrt(1 + 1 / num_runs) + np.log(STOP_FACTOR))


def _deviation(noise: Noise, log_batch: float) -> float:
    """Return the standard deviation of log T of one run, without what its seed adds at all rates alike."""
    return float(np.sqrt((noise.variance - noise.same_cell) * noise.scale_at(log_batch)))


def rounded(rate: float) -> float:
    """Return a rate to four significant digits, as a run's name prints it."""
    return float(f"{rate:.4g}")
