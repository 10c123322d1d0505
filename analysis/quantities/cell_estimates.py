"""T of the cells of one series: its value, its interval, its errors, and its resamples where there are seeds enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.quantities.cell_verdicts import Choice, Row
from analysis.quantities.learning_rates import RateCurves
from analysis.quantities.run_groups import RunGroups
from analysis.statistics.censored import Samples, information, profile_interval
from analysis.statistics.noise import Errors, Noise, t_quantile
from analysis.statistics.resampling import (
    MIN_SEEDS_TO_RESAMPLE,
    NUM_RESAMPLES,
    Candidates,
    normal_draws,
    spread_factor,
)

Array = NDArray[np.float64]
Ints = NDArray[np.int_]


class Number(NamedTuple):
    """log T of a cell, its interval, and what the choice of its setting had made it too low by."""

    log_tokens: float
    low: float | None
    high: float | None
    luck: float


@dataclass(frozen=True)
class SeriesEstimate:
    """log T of cells, its interval and what the choice of the setting made it too low by, all [cells].

    The ends are not numbers, and there are no errors, where the noise is not known; `resamples` [resamples, cells].
    """

    log_tokens: Array
    low: Array
    high: Array
    luck: Array
    errors: Errors | None
    resamples: Array | None

    @property
    def numbers(self) -> list[Number]:
        """Cell by cell."""
        low, high = ([float(x) if np.isfinite(x) else None for x in ends] for ends in (self.low, self.high))
        return list(map(Number, self.log_tokens.tolist(), low, high, self.luck.tolist()))


@dataclass(frozen=True)
class Chosen:
    """The cells of one series that have a T, with all that was chosen from: `rates`, `ranked`, and their fit."""

    choices: Sequence[Choice]
    rates: pl.DataFrame
    fitted: RateCurves | None
    groups: RunGroups
    noise: Noise | None

    @property
    def used(self) -> list[Row]:
        return [choice.used for choice in self.choices if choice.used is not None]

    def column(self, name: str) -> Array:
        """Return a number of the groups used [cells]."""
        return np.array([row[name] for row in self.used], float)

    def setting_column(self, name: str) -> Array:
        """Return a number of the settings of the grid [settings], not a number where it is null."""
        return self.rates[name].cast(pl.Float64).fill_null(np.nan).to_numpy()

    @property
    def is_fresh(self) -> NDArray[np.bool_]:
        return np.array([choice.fresh for choice in self.choices], bool)

    @property
    def samples(self) -> Samples:
        return self.groups.samples.at(self.column("sample").astype(int))

    @property
    def log_batch(self) -> Array:
        return np.log(self.column("global_batch_tokens"))


def estimate_series(chosen: Chosen, context: str, level: float) -> SeriesEstimate:
    """Estimate T of every cell at its setting; T means that setting, not the best one between those tried.

    `context` names the model and protocol, within which a seed is the same for all optimizers. From ten seeds on at
    every cell, resamples of the seeds decide the interval; below, the t distribution with the pooled spread.
    """
    mean = chosen.column("likely_log_tokens")
    if chosen.noise is None or not len(mean):
        nothing = np.full(len(mean), np.nan)
        return SeriesEstimate(mean, nothing, nothing, np.zeros(len(mean)), None, None)
    noise, log_batch, samples = chosen.noise, chosen.log_batch, chosen.samples
    deviation = noise.deviation_at(log_batch)
    t = np.array([t_quantile(level, dof) for dof in noise.dof_at(log_batch)])
    low, high = profile_interval(samples, mean, deviation, t)
    errors = noise.of_means(
        [row["seeds"] for row in chosen.used],
        log_batch,
        lost=1 / (information(samples, mean, deviation) * deviation**2) - 1 / samples.weight.sum(axis=1),
    )
    count = chosen.column("num_runs")
    resampled = bool(count.min() >= MIN_SEEDS_TO_RESAMPLE)
    moves = _seed_moves(chosen, noise, context) if resampled else _normal_moves(chosen, noise)
    luck = np.where(chosen.is_fresh, 0.0, -moves.mean(axis=0))
    if not resampled:
        return SeriesEstimate(mean + luck, low + luck, high + luck, luck, errors, None)
    resamples = mean + luck + spread_factor(count, level) * (moves - moves.mean(axis=0))
    low, high = np.quantile(resamples, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return SeriesEstimate(mean + luck, low, high, luck, errors, resamples)


def _normal_moves(chosen: Chosen, noise: Noise) -> Array:
    """Draw what noise adds to log T at the setting that is chosen under it [resamples, cells].

    What a seed adds at all settings of a cell alike cannot sway the choice, and fresh seeds do not choose.
    """
    scale = noise.scale_at(np.log(chosen.setting_column("global_batch_tokens")))
    own = np.sqrt((noise.variance - noise.same_cell) * scale / chosen.setting_column("num_runs"))
    moves = np.zeros((NUM_RESAMPLES, len(chosen.choices)))
    moves[:, ~chosen.is_fresh] = _moves_of_choice(chosen, own * normal_draws(len(own)))
    return moves


def _seed_moves(chosen: Chosen, noise: Noise, context: str) -> Array:
    """Draw what other seeds add to log T, at the setting that is chosen with them where it is not fresh."""
    moves = _seed_noise(chosen.used, chosen, noise, context)
    settings = [row | ({} if row["competes"] else {"sample": None}) for row in chosen.rates.iter_rows(named=True)]
    moves[:, ~chosen.is_fresh] = _moves_of_choice(chosen, _seed_noise(settings, chosen, noise, context))
    return moves


def _seed_noise(rows: Sequence[Row], chosen: Chosen, noise: Noise, context: str) -> Array:
    """Return what other seeds add to the mean log T of groups [resamples, rows]; not a number without a sample."""
    known = [place for place, row in enumerate(rows) if row["sample"] is not None]
    own = [rows[place] for place in known]
    deviation = noise.deviation_at(np.log([row["global_batch_tokens"] for row in own]))
    drawn = chosen.groups.resampled_means([row["sample"] for row in own], deviation, context)
    moves = np.full((len(drawn), len(rows)), np.nan)
    moves[:, known] = drawn - np.array([row["likely_log_tokens"] for row in own])
    return moves


def _moves_of_choice(chosen: Chosen, noise: Array) -> Array:
    """Return the `noise` [resamples, settings] of the setting that is chosen under it, in cells without fresh seeds.

    Taken for true is what settings are chosen by, the fit: it varies less from the truth than their means do. The noise
    of each setting has mean 0 over the resamples, so that what is left of it is due to the choice.
    """
    open_ = [choice.batch for choice in chosen.choices if not choice.fresh]
    if not open_:
        return np.zeros((len(noise), 0))
    noise = noise - noise.mean(axis=0)
    values = chosen.setting_column("value") + noise
    if chosen.fitted is not None:
        points = chosen.fitted.points
        values[:, points] = chosen.fitted.quadratics.fitted(values[:, points])
    batch = chosen.setting_column("global_batch_tokens")
    rows = np.flatnonzero(np.isin(batch, open_))
    candidates = Candidates(np.unique(batch[rows], return_inverse=True)[1], chosen.rates["competes"].to_numpy()[rows])
    return np.take_along_axis(noise[:, rows], candidates.lowest(values[:, rows]), axis=1)
