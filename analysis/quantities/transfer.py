"""The best learning rate of each width, and how it moves with the width.

A series is one optimizer and parametrization at one batch and budget; its runs differ in width, rate and seed. The
optimum of a width is that of a quadratic of final loss in log rate, through the rates around the best one.
"""

import json
from typing import Any

import numpy as np
import polars as pl

from analysis.inputs.records import Records
from analysis.quantities.final_losses import final_runs
from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import t_quantile
from analysis.statistics.surfaces import Surface, fit_surface
from analysis.statistics.weighted_fit import weighted_fit

SERIES = ("optimizer", "parametrization", "global_batch_tokens", "token_budget")

#: The quadratic is fitted to rates within this factor of the best one.
WINDOW_FACTOR = 4.5
_LEAST_VARIANCE = 1e-12


def width_losses(records: Records) -> pl.DataFrame:
    """Return SERIES, width, tuning, peak_lr and loss_nats of the runs; loss_nats is null for one that diverged.

    Where other settings were tuned beside the rate, those of the lowest loss of a width are kept.

    Raises: ValueError when the records do not say how wide the models are, or all have one width.
    """
    shapes = [(run_id, *_shape(config)) for run_id, config in records.runs.select("run_id", "config_json").iter_rows()]
    schema = {"run_id": pl.String, "width": pl.Int64, "parametrization": pl.String}
    of_runs = pl.DataFrame(shapes, schema=schema, orient="row")
    found = final_runs(records).join(of_runs, on="run_id").filter(pl.col("width").is_not_null())
    widths = found["width"].unique().sort().to_list()
    if len(widths) < 2:
        known = f"all have the width {widths[0]}" if widths else "none with a final loss says its width"
        raise ValueError(f"a transfer of rates needs runs of two widths or more; of these {known}")
    tuning, by_loss = pl.col("tuning"), pl.col("tuning").sort_by("loss_nats", nulls_last=True)
    found = found.filter(tuning == by_loss.first().over(*SERIES, "width"))
    return found.select(*SERIES, "width", "tuning", "peak_lr", "loss_nats").sort(*SERIES, "width", "peak_lr")


def best_rates(losses: pl.DataFrame, level: float = 0.9) -> pl.DataFrame:
    """Return a row per series and width: best_lr, best_lr_low, best_lr_high, lowest_loss_nats, verdict.

    verdict: ok; edge_of_grid, where the optimum is not between the rates tried; not_identified, without a minimum;
    diverged, where no run has a loss.
    """
    rows = []
    for key, own in losses.group_by(*SERIES, "width", maintain_order=True):
        rows.append(dict(zip((*SERIES, "width"), key, strict=True)) | _best(own, level))
    return pl.DataFrame(rows)


def rate_slopes(losses: pl.DataFrame, level: float = 0.9) -> pl.DataFrame:
    """Return a row per series: slope of log best rate in log width with its interval, and the widths it is over.

    Widths without an interior optimum take no part; null from fewer than two.
    """
    rows = []
    for key, own in losses.group_by(*SERIES, maintain_order=True):
        widths = [(width, _surface(runs), runs) for (width,), runs in own.group_by("width", maintain_order=True)]
        known = [(width, found) for width, found, runs in widths if found is not None and _is_inside(found, runs)]
        slope = _slope(known, level)
        ends = {"slope": slope.value, "slope_low": slope.low, "slope_high": slope.high, "num_widths": len(known)}
        rows.append(dict(zip(SERIES, key, strict=True)) | ends)
    return pl.DataFrame(rows, infer_schema_length=None)


def _best(own: pl.DataFrame, level: float) -> dict[str, Any]:
    known = own.filter(pl.col("loss_nats").is_not_null())
    row: dict[str, Any] = {"best_lr": None, "best_lr_low": None, "best_lr_high": None, "lowest_loss_nats": None}
    if known.is_empty():
        return row | {"verdict": "diverged"}
    best = known.group_by("peak_lr").agg(pl.col("loss_nats").mean()).sort("loss_nats").row(0)
    row |= {"best_lr": best[0], "lowest_loss_nats": best[1]}
    surface = _surface(own)
    if surface is None:
        at_edge = best[0] in (own["peak_lr"].min(), own["peak_lr"].max())
        return row | {"verdict": "edge_of_grid" if at_edge else "not_identified"}
    if not _is_inside(surface, own):
        return row | {"verdict": "edge_of_grid"}
    centre = float(surface.optimum[0])
    half = t_quantile(level, surface.dof) * float(np.sqrt(surface.covariance[0, 0]))
    low, high = np.exp(centre - half), np.exp(centre + half)
    return row | {"best_lr": float(np.exp(centre)), "best_lr_low": low, "best_lr_high": high, "verdict": "ok"}


def _surface(own: pl.DataFrame) -> Surface | None:
    known = own.filter(pl.col("loss_nats").is_not_null())
    if known.is_empty():
        return None
    best = known.group_by("peak_lr").agg(pl.col("loss_nats").mean()).sort("loss_nats")["peak_lr"][0]
    near = known.filter((pl.col("peak_lr") / best).log().abs() <= np.log(WINDOW_FACTOR))
    return fit_surface(near["peak_lr"].log().to_numpy()[:, None], near["loss_nats"].to_numpy())


def _is_inside(surface: Surface, own: pl.DataFrame) -> bool:
    rates = own["peak_lr"].log().to_numpy()
    return bool(rates.min() <= surface.optimum[0] <= rates.max())


def _slope(known: list[tuple[Any, Surface]], level: float) -> Estimate:
    if len(known) < 2:
        return Estimate(None)
    widths = np.log([width for width, _ in known])
    optima = np.array([surface.optimum[0] for _, surface in known])
    variances = np.array([max(surface.covariance[0, 0], _LEAST_VARIANCE) for _, surface in known])
    design = np.column_stack([np.ones(len(known)), widths])
    dof = min(surface.dof for _, surface in known)
    return weighted_fit(design, optima, variances, np.array([[0.0, 1.0]]), level, dof)[0]


def _shape(config: str | None) -> tuple[int | None, str]:
    model = json.loads(config or "{}").get("model", {})
    return model.get("width"), model.get("parametrization", {}).get("kind", "standard")
