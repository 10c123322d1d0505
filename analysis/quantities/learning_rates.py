"""The learning rate of each cell: a quadratic in log rate, its curvature shared by the batches of an optimizer.

The best of three noisy rates looks better than it is, and on a flat optimum it often lies at the edge of the grid by
chance. So the choice uses the quadratic, the verdict on the grid uses the interval of its optimum, and a cell that was
confirmed on fresh seeds is estimated from those alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.inputs.records import Records
from analysis.quantities.targets import curves, targets
from analysis.statistics.noise import LACK_OF_FIT_LEVEL, MIN_DOF, Noise, lack_of_fit, t_quantile
from analysis.statistics.quadratics import Quadratics

Array = NDArray[np.float64]

#: A group of cells that share a curvature.
SERIES = ("model", "optimizer", "protocol", "target_loss_nats")
CELL = ("model", "optimizer", "protocol", "global_batch_tokens")
#: A rate beyond exp of this, or below its inverse, is no bound.
MAX_LOG_RATE = 100.0
#: What is chosen in a cell, one row a candidate.
SETTING = ("global_batch_tokens", "tuning", "peak_lr")


class Setting(NamedTuple):
    """What is chosen for a cell: a learning rate, unless the table states none, and further settings."""

    peak_lr: float | None
    tuning: str


@dataclass(frozen=True)
class RateCurves:
    """Quadratics in log rate, one for every batch and tuning that has two rates or more: log T = level + slope x + ...

    `curves` numbers them; `centres` [curves] are the log rates at x = 0; `points` are the rows of the summary that were
    fitted; `variance` is that of a point of weight 1; `t` is None where there is neither replicate nor residual
    variance.
    """

    quadratics: Quadratics
    curves: Mapping[tuple[int, str], int]
    centres: Array
    points: Array
    coefficients: Array
    variance: float
    t: float | None

    @property
    def curvature(self) -> float:
        return float(self.coefficients[-1])

    def log_tokens(self, batch: int, peak_lr: float | None, tuning: str = "") -> float | None:
        """Return the fitted log T; None off the curves, or if they have no minimum."""
        curve = self.curves.get((batch, tuning))
        if curve is None or peak_lr is None or self.curvature <= 0:
            return None
        x = np.log(peak_lr) - self.centres[curve]
        level, slope = self.coefficients[2 * curve : 2 * curve + 2]
        return float(level + slope * x + self.curvature * x**2)

    def optimum(self, batch: int, tuning: str = "") -> tuple[float | None, float | None, float | None]:
        """Return the rate at the minimum and its interval, by Fieller's theorem for the ratio -slope / 2 curvature.

        An end is None unless the curvature differs from zero beyond doubt: the interval is then unbounded.
        """
        curve = self.curves.get((batch, tuning))
        if curve is None or self.curvature <= 0:
            return None, None, None
        slope, curvature, centre = float(self.coefficients[2 * curve + 1]), self.curvature, float(self.centres[curve])
        best = float(np.exp(np.clip(centre - slope / (2 * curvature), -MAX_LOG_RATE, MAX_LOG_RATE)))
        if self.t is None:
            return best, None, None
        places = [2 * curve + 1, -1]
        (v_ss, v_sc), (_, v_cc) = self.t**2 * self.variance * self.quadratics.covariance[np.ix_(places, places)]
        # all x at which the derivative slope + 2 curvature x could be zero: quadratic in x
        a, b, c = 4 * (curvature**2 - v_cc), 4 * (slope * curvature - v_sc), slope**2 - v_ss
        if a <= 0:
            return best, None, None
        half = np.sqrt(max(b**2 - 4 * a * c, 0.0))
        low, high = (centre + (-b + side * half) / (2 * a) for side in (-1, 1))
        if max(abs(low), abs(high)) > MAX_LOG_RATE:
            return best, None, None
        return best, float(np.exp(low)), float(np.exp(high))


def summarize_rates(runs: pl.DataFrame) -> pl.DataFrame:
    """Return per batch and setting how many runs there are, by what became of them; and the mean of log T.

    log_tokens is null unless every run has one; `likely_log_tokens` is the mean of those that have one.
    """
    status = pl.col("status")
    return (
        runs.group_by(*SETTING, maintain_order=True)
        .agg(
            num_runs=pl.len().cast(pl.Int64),
            num_reached=(status == "reached").sum().cast(pl.Int64),
            num_reached_at_first_eval=(status == "reached_at_first_eval").sum().cast(pl.Int64),
            likely_log_tokens=pl.col("tokens_to_target").log().mean(),
        )
        .with_columns(log_tokens=pl.when(pl.col("num_reached") == pl.col("num_runs")).then("likely_log_tokens"))
        .sort(SETTING)
    )


def fit_rates(rates: pl.DataFrame, noise: Noise | None, level: float) -> RateCurves | None:
    """Fit quadratics to `summarize_rates`; None where no batch has three rates at which every run reached the target.

    A rate at which a run diverged or was censored has T = infinity: it takes no part and cannot be chosen. Every batch
    and every tuning has its own level and slope, all share one curvature. Curves that misfit beyond the noise (one
    curvature for all batches is too few, or no quadratic bends as they do) take their variance from the residuals.
    """
    if "tuning" not in rates.columns:
        rates = rates.with_columns(tuning=pl.lit(""))
    curve = ["global_batch_tokens", "tuning"]
    points = rates.with_row_index("point").filter(pl.col("log_tokens").is_not_null() & pl.col("peak_lr").is_not_null())
    points = points.filter(pl.len().over(curve) >= 2).sort(*curve, "peak_lr", maintain_order=True)
    if points.filter(pl.len().over(curve) >= 3).is_empty():
        return None
    points = points.with_columns(
        curve=pl.struct(curve).rle_id(), log_rate=pl.col("peak_lr").log(), log_batch=pl.col("global_batch_tokens").log()
    )
    number, log_rate = points["curve"].to_numpy().astype(int), points["log_rate"].to_numpy()
    centres = np.bincount(number, log_rate) / np.bincount(number)
    scale = noise.scale_at(points["log_batch"].to_numpy()) if noise else np.ones(points.height)
    quadratics = Quadratics(log_rate - centres[number], number, points["num_runs"].to_numpy() / scale)
    values = points["log_tokens"].to_numpy()
    variance, dof = _variance(quadratics.misfit(values), quadratics.num_spare, noise)
    return RateCurves(
        quadratics=quadratics,
        curves={key: index for index, key in enumerate(points.select(curve).unique(maintain_order=True).iter_rows())},
        centres=centres,
        points=points["point"].to_numpy(),
        coefficients=quadratics.solution @ values,
        variance=variance,
        t=t_quantile(level, dof) if dof else None,
    )


def _variance(misfit: float, spare: int, noise: Noise | None) -> tuple[float, float]:
    """Return the variance of one run about the curves and its degrees of freedom, 0 where nothing tells them."""
    residual = misfit / max(spare, 1)
    if noise is None:
        return (residual, spare) if spare >= MIN_DOF else (0.0, 0)
    own = noise.variance - noise.same_cell  # the seeds are the same at every rate of a cell: what they share cancels
    p_value = lack_of_fit(residual / own, spare, noise.contrast_dof) if own > 0 else None
    if p_value is not None and p_value < LACK_OF_FIT_LEVEL:
        return residual, min(spare, noise.contrast_dof)
    return own, noise.contrast_dof


def ranked(rates: pl.DataFrame, fitted: RateCurves | None) -> pl.DataFrame:
    """Add `value`, what a setting is chosen by, and whether it `competes` in its batch: one that none reached does not.

    The value is the fitted log T, or the mean where nothing could be fitted. Only settings of which the fewest runs
    fell short or diverged compete: a rate must not win on its survivors.
    """
    curves = [
        fitted.log_tokens(*row) if fitted else None
        for row in rates.select("global_batch_tokens", "peak_lr", "tuning").iter_rows()
    ]
    lost = 1 - (pl.col("num_reached") + pl.col("num_reached_at_first_eval")) / pl.col("num_runs")
    return (
        rates.with_columns(lost=lost, fitted=pl.Series(curves, dtype=pl.Float64))
        .with_columns(value=pl.coalesce("fitted", "likely_log_tokens"))
        .with_columns(lost=pl.when(pl.col("num_reached") > 0).then("lost"))
        .with_columns(
            competes=(pl.col("lost") == pl.col("lost").min().over("global_batch_tokens")).fill_null(value=False)
        )
    )


def best_settings(rates: pl.DataFrame) -> dict[int, Setting]:
    """Return the best setting of each batch in `ranked` rates; a batch at which no run reached the target has none."""
    best = (
        rates.filter("competes")
        .sort("global_batch_tokens", "value", "tuning", "peak_lr", nulls_last=True)
        .unique("global_batch_tokens", keep="first", maintain_order=True)
    )
    return {batch: Setting(rate, tuning) for batch, tuning, rate in best.select(SETTING).iter_rows()}


def rate_verdict(optimum: tuple[float | None, float | None, float | None], rates: list[float]) -> str:
    """Judge from the optimum's interval whether the rates tried bracket it; `rates` includes those that diverged."""
    _, low, high = optimum
    if len(rates) <= 1:
        return "single_rate"
    if low is None or high is None:
        return "not_identified"
    if high < min(rates) or low > max(rates):
        return "edge_of_grid"
    return "ok" if min(rates) <= low and high <= max(rates) else "not_identified"


def choose_rates(records: Records, target_loss_nats: float | None = None) -> pl.DataFrame:
    """Return the setting to confirm on fresh seeds, (model, optimizer, protocol, global_batch_tokens, best_lr, tuning).

    Only grid runs vote. Without a given target, T of the lowest loss that more than half of the cells reached decides,
    by the rule of the estimates; a cell that did not reach it is decided by the next easier target, one that reached
    none by its loss at the last mark that its runs share. A cell of which every run diverged has no row.
    """
    grid = records.runs.filter(pl.col("stage") == "grid")
    runs = targets(records).filter(pl.col("stage") == "grid")
    cells = dict(grid.group_by(CELL, maintain_order=True))
    chosen: dict[tuple[Any, ...], Setting] = {}
    for loss in _hardest_first(runs, target_loss_nats):
        if chosen.keys() != cells.keys():
            chosen = _settings_at(runs.filter(target_loss_nats=loss)) | chosen
    for key in cells.keys() - chosen.keys():
        setting = _setting_by_loss(records, cells[key])
        chosen |= {} if setting is None else {key: setting}
    rows = [(*key, *setting) for key, setting in chosen.items()]
    schema = {name: runs.schema[name] for name in CELL} | {"best_lr": pl.Float64, "tuning": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row").sort(CELL)


def _hardest_first(runs: pl.DataFrame, target_loss_nats: float | None) -> list[float]:
    """Return the target that decides and, behind it, the easier ones."""
    if target_loss_nats is None:
        by_rate = runs.group_by(*CELL, "tuning", "peak_lr", "target_loss_nats").agg(
            (pl.col("status") == "reached").all()
        )
        by_cell = by_rate.group_by(*CELL, "target_loss_nats").agg(pl.col("status").any())
        shares = by_cell.group_by("target_loss_nats").agg(pl.col("status").mean()).filter(pl.col("status") > 0.5)
        target_loss_nats = min(shares["target_loss_nats"], default=None)
    losses = runs["target_loss_nats"].unique().sort().to_list()
    return [loss for loss in losses if target_loss_nats is None or loss >= target_loss_nats]


def _settings_at(runs: pl.DataFrame) -> dict[tuple[Any, ...], Setting]:
    """Choose the setting of each cell at one target, where there is one at which every run reached it."""
    chosen: dict[tuple[Any, ...], Setting] = {}
    for series, own in runs.group_by(*CELL[:-1], maintain_order=True):
        rates = summarize_rates(own)
        complete = ranked(rates, fit_rates(rates, None, level=0.9)).filter(pl.col("log_tokens").is_not_null())
        chosen |= {(*series, batch): setting for batch, setting in best_settings(complete).items()}
    return chosen


def _setting_by_loss(records: Records, cell: pl.DataFrame) -> Setting | None:
    """Choose the setting of lowest mean loss at the last mark that all its runs reached, but the diverged ones."""
    setting = ["tuning", "peak_lr"]
    alive = cell.filter(~(pl.col("status") == "diverged").any().over(setting))
    curve = curves(records).drop(setting, strict=False).join(alive.select("run_id", *setting), on="run_id")
    shared = curve.filter(pl.col("run_id").n_unique().over("tokens_seen") == alive.height)
    last = shared.filter(pl.col("tokens_seen") == pl.col("tokens_seen").max())
    means = last.group_by(setting, maintain_order=True).agg(pl.col("loss_nats").mean())
    best = means.sort("loss_nats", "peak_lr", "tuning").head(1)
    return Setting(best["peak_lr"][0], best["tuning"][0]) if best.height else None
