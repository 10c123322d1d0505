"""The learning rate of each cell: a quadratic in log rate, its curvature shared by the batches of an optimizer.

The best of three noisy rates looks better than it is, and on a flat optimum it often lies at the edge of the grid by
chance. So the choice uses the quadratic, the verdict on the grid uses the interval of its optimum, and a cell that was
confirmed on fresh seeds is estimated from those alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.inputs.records import Records
from analysis.quantities.targets import curves, targets
from analysis.statistics.noise import LACK_OF_FIT_LEVEL, MIN_DOF, Noise, lack_of_fit, t_quantile

Array = NDArray[np.float64]

#: A group of cells that share a curvature.
SERIES = ("model", "optimizer", "protocol", "target_loss_nats")
CELL = ("model", "optimizer", "protocol", "global_batch_tokens")


@dataclass(frozen=True)
class RateCurves:
    """log T = a_b + slope_b x + curvature x², x = log(rate / centre of batch b), for every batch b.

    `covariance` is that of (slope_b, curvature); None where there is neither replicate nor residual variance.
    """

    centres: dict[int, float]
    levels: dict[int, float]
    slopes: dict[int, float]
    curvature: float
    covariances: dict[int, Array]
    t: float | None

    def log_tokens(self, batch: int, peak_lr: float) -> float | None:
        """Return the fitted log T; None for a batch outside the fit, or if the curve has no minimum."""
        if batch not in self.slopes or self.curvature <= 0:
            return None
        x = np.log(peak_lr) - self.centres[batch]
        return float(self.levels[batch] + self.slopes[batch] * x + self.curvature * x**2)

    def optimum(self, batch: int) -> tuple[float | None, float | None, float | None]:
        """Return the rate at the minimum and its interval, by Fieller's theorem for the ratio -slope / 2 curvature.

        An end is None unless the curvature differs from zero beyond doubt: the interval is then unbounded.
        """
        if batch not in self.slopes or self.curvature <= 0:
            return None, None, None
        slope, curvature, centre = self.slopes[batch], self.curvature, self.centres[batch]
        best = float(np.exp(centre - slope / (2 * curvature)))
        if self.t is None:
            return best, None, None
        (v_ss, v_sc), (_, v_cc) = self.t**2 * self.covariances[batch]
        # all x at which the derivative slope + 2 curvature x could be zero: quadratic in x
        a, b, c = 4 * (curvature**2 - v_cc), 4 * (slope * curvature - v_sc), slope**2 - v_ss
        if a <= 0:
            return best, None, None
        half = np.sqrt(max(b**2 - 4 * a * c, 0.0))
        return best, float(np.exp(centre + (-b - half) / (2 * a))), float(np.exp(centre + (-b + half) / (2 * a)))


def summarize_rates(runs: pl.DataFrame) -> pl.DataFrame:
    """Return per batch and rate: how many runs, how many with a T and how many at the target too early for one.

    log_tokens is the mean of log T, null unless every run has one.
    """
    reached = pl.col("status") == "reached"
    return (
        runs.group_by("global_batch_tokens", "peak_lr", maintain_order=True)
        .agg(
            num_runs=pl.len(),
            num_reached=reached.sum().cast(pl.Int64),
            num_reached_at_first_eval=(pl.col("status") == "reached_at_first_eval").sum().cast(pl.Int64),
            log_tokens=pl.col("tokens_to_target").log().mean(),
        )
        .with_columns(log_tokens=pl.when(pl.col("num_reached") == pl.col("num_runs")).then("log_tokens"))
        .with_columns(tuning=pl.lit(""))
        .sort("global_batch_tokens", "peak_lr")
    )


def fit_rates(rates: pl.DataFrame, noise: Noise | None, level: float) -> RateCurves | None:
    """Fit quadratics to `summarize_rates`; None where no batch has three rates at which every run reached the target.

    A rate at which a run diverged or was censored has T = infinity: it takes no part and cannot be chosen. Curves that
    misfit beyond the noise (one curvature for all batches is too few, or no quadratic bends as they do) take their
    variance from the residuals.
    """
    points = rates.filter(pl.col("log_tokens").is_not_null())
    points = points.filter(pl.len().over("global_batch_tokens") >= 2)
    if not (points["global_batch_tokens"].value_counts()["count"] >= 3).any():
        return None
    batch_of, log_lr = points["global_batch_tokens"].to_numpy(), points["peak_lr"].log().to_numpy()
    batches = sorted({int(batch) for batch in batch_of})
    columns = {batch: index for index, batch in enumerate(batches)}
    centres = {batch: float(log_lr[batch_of == batch].mean()) for batch in batches}
    design = np.zeros((points.height, 2 * len(batches) + 1))
    for row, batch in enumerate(batch_of):
        x, index = log_lr[row] - centres[batch], columns[batch]
        design[row, [2 * index, 2 * index + 1, -1]] = 1.0, x, x**2
    weights = points["num_runs"].to_numpy().astype(float)
    y = points["log_tokens"].to_numpy()
    inverse: Array = np.linalg.inv(design.T @ (weights[:, None] * design)).astype(np.float64)
    solution = inverse @ design.T @ (weights * y)
    spare = points.height - design.shape[1]
    variance, dof = _variance(float(weights @ (y - design @ solution) ** 2), spare, noise)
    covariance = inverse * variance
    return RateCurves(
        centres=centres,
        levels={b: float(solution[2 * i]) for b, i in columns.items()},
        slopes={b: float(solution[2 * i + 1]) for b, i in columns.items()},
        curvature=float(solution[-1]),
        covariances={b: covariance[np.ix_([2 * i + 1, -1], [2 * i + 1, -1])] for b, i in columns.items()},
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


def best_rate(rates: pl.DataFrame, fitted: RateCurves | None, confirmed: Iterable[float] = ()) -> float | None:
    """Choose among the rates of one cell: the lowest fitted T, or the lowest mean where nothing could be fitted.

    Only rates at which every run reached the target compete; without one, those at which the largest share did; None
    where no run did. `confirmed` rates, run on fresh seeds, leave no others in the running.
    """
    confirmed = list(confirmed)
    candidates = rates.filter(pl.col("peak_lr").is_in(confirmed)) if confirmed else rates
    if len(confirmed) == 1:
        return confirmed[0]

    def rank(row: dict[str, Any]) -> tuple[float, float, float]:
        tokens = fitted.log_tokens(row["global_batch_tokens"], row["peak_lr"]) if fitted else None
        tokens = row["log_tokens"] if tokens is None else tokens
        return -row["num_reached"] / row["num_runs"], np.inf if tokens is None else tokens, row["peak_lr"]

    rows = [row for row in candidates.iter_rows(named=True) if row["num_reached"]]
    return float(min(rows, key=rank)["peak_lr"]) if rows else None


def rate_verdict(optimum: tuple[float | None, float | None, float | None], rates: list[float]) -> str:
    """Judge from the optimum's interval whether the rates tried bracket it; `rates` includes those that diverged."""
    _, low, high = optimum
    if len(rates) == 1:
        return "single_rate"
    if low is None or high is None:
        return "not_identified"
    if high < min(rates) or low > max(rates):
        return "edge_of_grid"
    return "ok" if min(rates) <= low and high <= max(rates) else "not_identified"


def choose_rates(records: Records, target_loss_nats: float | None = None) -> pl.DataFrame:
    """Return the rate to confirm on fresh seeds: (model, optimizer, protocol, global_batch_tokens, best_lr) per cell.

    Only grid runs vote. Without a given target, T of the lowest loss that more than half of the cells reached decides,
    by the rule of the estimates; a cell that did not reach it is decided by the next easier target, one that reached
    none by its loss at the last mark that its runs share. A cell of which every run diverged has no row.
    """
    grid = records.runs.filter(pl.col("stage") == "grid")
    runs = targets(records).filter(pl.col("stage") == "grid")
    order = _hardest_first(runs, target_loss_nats)
    rows = []
    for key, cell in grid.group_by(CELL, maintain_order=True):
        chosen = next((r for loss in order if (r := _rate_at(runs, key, loss)) is not None), None)
        chosen = _rate_by_loss(records, cell) if chosen is None else chosen
        if chosen is not None:
            rows.append((*key, chosen))
    schema = {name: runs.schema[name] for name in CELL} | {"best_lr": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row").sort(CELL)


def _hardest_first(runs: pl.DataFrame, target_loss_nats: float | None) -> list[float]:
    """Return the target that decides and, behind it, the easier ones."""
    if target_loss_nats is None:
        by_rate = runs.group_by(*CELL, "peak_lr", "target_loss_nats").agg((pl.col("status") == "reached").all())
        by_cell = by_rate.group_by(*CELL, "target_loss_nats").agg(pl.col("status").any())
        shares = by_cell.group_by("target_loss_nats").agg(pl.col("status").mean()).filter(pl.col("status") > 0.5)
        target_loss_nats = min(shares["target_loss_nats"], default=None)
    losses = runs["target_loss_nats"].unique().sort().to_list()
    return [loss for loss in losses if target_loss_nats is None or loss >= target_loss_nats]


def _rate_at(runs: pl.DataFrame, key: tuple[Any, ...], loss: float) -> float | None:
    """Choose a cell's rate at one target, if there is a rate at which every run reached it."""
    model, optimizer, protocol, batch = key
    series = runs.filter(model=model, optimizer=optimizer, protocol=protocol, target_loss_nats=loss)
    rates = summarize_rates(series)
    own = rates.filter(pl.col("global_batch_tokens") == batch, pl.col("log_tokens").is_not_null())
    return best_rate(own, fit_rates(rates, None, level=0.9))


def _rate_by_loss(records: Records, cell: pl.DataFrame) -> float | None:
    """Choose the rate of lowest mean loss at the last mark that all runs of the cell but the diverged ones reached."""
    alive = cell.filter(~(pl.col("status") == "diverged").any().over("peak_lr"))
    curve = curves(records).join(alive.select("run_id"), on="run_id", how="semi")
    shared = curve.filter(pl.col("run_id").n_unique().over("tokens_seen") == alive.height)
    last = shared.filter(pl.col("tokens_seen") == pl.col("tokens_seen").max())
    means = last.group_by("peak_lr", maintain_order=True).agg(pl.col("loss_nats").mean()).sort("loss_nats", "peak_lr")
    return float(means["peak_lr"][0]) if means.height else None
