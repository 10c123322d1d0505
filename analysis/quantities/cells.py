"""One estimate a cell: T at the chosen setting, with the interval that its seeds and the pooled noise support."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.quantities.cell_estimates import Chosen, Number, estimate_series
from analysis.quantities.cell_verdicts import (
    Choice,
    Row,
    also_diverged,
    caveats,
    lowest_seen,
    rate_reservations,
    rates_tried,
    why_no_tokens,
    why_unreached,
)
from analysis.quantities.learning_rates import (
    SERIES,
    SETTING,
    RateCurves,
    Setting,
    best_settings,
    fit_rates,
    ranked,
    rate_verdict,
)
from analysis.quantities.run_groups import complete_groups, group_runs
from analysis.schemas import CELLS, RATES, table
from analysis.statistics.noise import Errors, Noise
from analysis.verdicts import Finding, verdict_columns

__all__ = [
    "Cells",
    "SeriesErrors",
    "SeriesResamples",
    "complete_groups",
    "estimate_cells",
    "lowest_seen",
    "why_unreached",
]

Array = NDArray[np.float64]
Key = tuple[Any, ...]

_TO_TARGET = (
    "tokens_to_target",
    "tokens_to_target_low",
    "tokens_to_target_high",
    "steps_to_target",
    "flops_to_target",
    "train_seconds_to_target",
)


@dataclass(frozen=True)
class SeriesErrors:
    """Errors of log T of the cells of a series that have a T, in the order of `batches`."""

    batches: tuple[int, ...]
    errors: Errors


@dataclass(frozen=True)
class SeriesResamples:
    """log T of the same cells in every resample of the seeds: `log_tokens` [resamples, batches]."""

    batches: tuple[int, ...]
    log_tokens: Array


@dataclass(frozen=True)
class Cells:
    """Tables `rates` and `cells`; all runs by target, those that were chosen for a T; errors and resamples by series.

    `runs` and `chosen` are rows of the table `targets` with what `run_groups.with_values` adds.
    A series without an entry in `errors` has too few repeated runs to tell; one with an entry in `resampled` has so
    many seeds that these decide its intervals; a resample has the same seeds for all optimizers of a model and
    protocol. `noise` is that of single runs, None where it is not known.
    """

    rates: pl.DataFrame
    cells: pl.DataFrame
    runs: pl.DataFrame
    chosen: pl.DataFrame
    errors: Mapping[Key, SeriesErrors]
    resampled: Mapping[Key, SeriesResamples]
    noise: Mapping[Key, Noise | None]

    def runs_of(self, names: Mapping[str, Any]) -> pl.DataFrame:
        """Return the runs of a series, rows of `runs`."""
        return self._runs_by_series.get(_key(names), self.runs.clear())

    def chosen_of(self, names: Mapping[str, Any]) -> pl.DataFrame:
        """Return the runs that were chosen for a T of a series, rows of `chosen`."""
        return self._chosen_by_series.get(_key(names), self.chosen.clear())

    @cached_property
    def _runs_by_series(self) -> dict[Key, pl.DataFrame]:
        return self.runs.partition_by(SERIES, as_dict=True)

    @cached_property
    def _chosen_by_series(self) -> dict[Key, pl.DataFrame]:
        return self.chosen.partition_by(SERIES, as_dict=True)

    def errors_of(self, names: Mapping[str, Any], batches: Sequence[int]) -> Errors | None:
        """Return the errors of log T of a series' cells at `batches`; None where the noise is not known."""
        known = self.errors.get(_key(names))
        if known is None or not len(batches):
            return None
        return known.errors.at([known.batches.index(int(batch)) for batch in batches])

    def resamples_of(self, names: Mapping[str, Any], batches: Sequence[int]) -> Array | None:
        """Return log T [resamples, batches] of a series' cells; None where it has too few seeds for a bootstrap."""
        known = self.resampled.get(_key(names))
        if known is None or not len(batches):
            return None
        return known.log_tokens[:, [known.batches.index(int(batch)) for batch in batches]]

    def joined_with(self, other: "Cells") -> "Cells":
        """Return the cells of both; no series may be in both."""
        assert not self.noise.keys() & other.noise.keys()
        frames = {
            name: pl.concat([getattr(self, name), getattr(other, name)])
            for name in ("rates", "cells", "runs", "chosen")
        }
        errors, resampled = {**self.errors, **other.errors}, {**self.resampled, **other.resampled}
        return Cells(**frames, errors=errors, resampled=resampled, noise={**self.noise, **other.noise})


def _key(names: Mapping[str, Any]) -> Key:
    return tuple(names[name] for name in SERIES)


def estimate_cells(targets: pl.DataFrame, level: float) -> Cells:
    """Choose each cell's setting at each target and estimate T there.

    A cell with fresh seeds is estimated from those, since the seeds that chose the setting flatter it; without them, T
    is corrected for that luck. Runs that fell short, or were at the target too early, take part by their bounds.
    """
    groups = group_runs(targets)
    runs_of = dict(groups.runs.group_by(*SERIES, "global_batch_tokens", maintain_order=True))
    rates: list[Row] = []
    rows: list[Row] = []
    used: list[int] = []
    errors, resampled = {}, {}
    for key, own in groups.frame.group_by(SERIES, maintain_order=True):
        names = dict(zip(SERIES, key, strict=True))
        grid = own.filter(pl.col("stage") == "grid").sort(SETTING)
        fitted = fit_rates(grid, groups.noise[key], level)
        grid = ranked(grid, fitted)
        rates += [names | row for row in _rate_rows(grid)]
        choices = {choice.batch: choice for choice in _choices(own, grid, fitted)}
        lacking = {batch: why_no_tokens(choice, runs_of[*key, batch]) for batch, choice in choices.items()}
        known = tuple(batch for batch, why in lacking.items() if why is None)
        chosen = Chosen([choices[batch] for batch in known], grid, fitted, groups, groups.noise[key])
        estimate = estimate_series(chosen, f"{names['model']} {names['protocol']}", level)
        numbers = dict(zip(known, estimate.numbers, strict=True))
        rows += [names | _cell_row(c, lacking[b], numbers.get(b), runs_of[*key, b]) for b, c in choices.items()]
        used += [row["group"] for row in chosen.used]
        if estimate.errors is not None:
            errors[key] = SeriesErrors(known, estimate.errors)
        if estimate.resamples is not None:
            resampled[key] = SeriesResamples(known, estimate.resamples)
    runs = groups.runs.drop("group")
    chosen_runs = groups.runs.filter(pl.col("group").is_in(used)).drop("group")
    return Cells(table(rates, RATES), table(rows, CELLS), runs, chosen_runs, errors, resampled, groups.noise)


def _rate_rows(rates: pl.DataFrame) -> Iterator[Row]:
    reached = pl.col("num_reached") == pl.col("num_runs")
    yield from rates.select(
        *SETTING,
        "num_runs",
        "num_reached",
        "num_reached_at_first_eval",
        tokens_to_target=pl.when(reached).then(pl.col("log_tokens").exp()),
        fitted_tokens=pl.col("fitted").exp(),
    ).iter_rows(named=True)


def _choices(groups: pl.DataFrame, rates: pl.DataFrame, fitted: RateCurves | None) -> Iterator[Choice]:
    """Choose the setting of each batch: the best of the grid, or the one run on fresh seeds."""
    best = best_settings(rates)
    grid = _by_batch(rates)
    for batch, own in _by_batch(groups).items():
        fresh = {_setting(row): row for row in own if row["stage"] == "confirm"}
        known = {_setting(row): row for row in grid.get(batch, []) if row["num_reached"]}
        values = {setting: row["value"] for setting, row in known.items() if row["value"] is not None}
        setting = min(fresh, key=lambda setting: values.get(setting, np.inf)) if fresh else best.get(batch)
        used = (fresh or known).get(setting) if setting else None
        optimum = fitted.optimum(batch, setting.tuning) if fitted and setting else (None, None, None)
        verdict = rate_verdict(optimum, rates_tried(own, setting))
        yield Choice(batch, own, grid.get(batch, []), setting, used, bool(fresh), optimum, verdict)


def _by_batch(frame: pl.DataFrame) -> dict[int, list[Row]]:
    rows: dict[int, list[Row]] = {}
    for row in frame.iter_rows(named=True):
        rows.setdefault(row["global_batch_tokens"], []).append(row)
    return rows


def _setting(row: Row) -> Setting:
    return Setting(row["peak_lr"], row["tuning"])


def _cell_row(choice: Choice, lacking: Finding | None, number: Number | None, runs: pl.DataFrame) -> Row:
    setting, used = choice.setting or Setting(None, ""), choice.used or _in_all(choice)
    row: Row = {
        "global_batch_tokens": choice.batch,
        "best_lr": setting.peak_lr,
        "tuning": setting.tuning,
        **dict(zip(("optimal_lr", "optimal_lr_low", "optimal_lr_high"), choice.optimum, strict=True)),
        "lr_verdict": choice.lr_verdict,
        "lr_reason": "",
        "seeds_from": "fresh" if choice.fresh else "grid",
        "num_seeds": used["num_runs"],
        "num_reached": used["num_reached"],
        "num_censored": used["num_bounds"],
        "num_diverged": used["num_diverged"],
    }
    if number is None:
        assert lacking is not None
        own = runs.filter(group=choice.used["group"]) if choice.used else runs
        bounds = dict(zip(_TO_TARGET[1:3], _bounds(own), strict=True))
        findings = [lacking, *also_diverged(lacking, used)]
        return row | dict.fromkeys(_TO_TARGET) | bounds | verdict_columns(findings)
    findings = [*caveats(choice, runs["protocol"][0], number.luck, has_interval=number.low is not None)]
    return row | {"lr_reason": rate_reservations(choice)} | _to_target(choice, number) | verdict_columns(findings)


def _in_all(choice: Choice) -> Row:
    """Count all runs of a cell in which no setting could be chosen."""
    counts = ("num_runs", "num_reached", "num_bounds", "num_diverged")
    return {name: sum(group[name] for group in choice.groups) for name in counts}


def _bounds(runs: pl.DataFrame) -> tuple[float | None, float | None]:
    """Return the ends of T that runs without a common T give: they fell short, or were at the target too early.

    A diverged run takes for ever.
    """
    known = runs.filter(pl.col("value").is_not_null())
    if known.is_empty():
        return None, None
    tokens = known["value"].exp()
    if (known["side"] >= 0).all():
        return tokens.min(), None  # type: ignore[return-value]
    return None, tokens.max() if (runs["side"] == -1).all() and known.height == runs.height else None  # type: ignore


def _to_target(choice: Choice, number: Number) -> dict[str, float | None]:
    """Return tokens with their interval, and what they take; FLOPs and seconds per token are those of the runs."""
    assert choice.used is not None
    tokens = float(np.exp(number.log_tokens))
    per_token = (choice.used[f"{name}_per_token"] for name in _TO_TARGET[4:])
    ends = (None if end is None else float(np.exp(end)) for end in (number.low, number.high))
    costs = (None if log_cost is None else tokens * float(np.exp(log_cost)) for log_cost in per_token)
    return dict(zip(_TO_TARGET, (tokens, *ends, tokens / choice.batch, *costs), strict=True))
