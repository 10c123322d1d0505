"""Time against compute to a target: measured on the devices that ran, projected over device counts by a cost model.

Every point is a cell's T times seconds per token: those of the runs at the chosen rate (measured) or of the cost model
(projected). Time per token is nearly exact, so the interval of T carries over; a measured one is widened by the spread
of seconds per token between runs. Runs of different devices make different points and different frontiers.
Assumption: the steps to the target do not depend on the number of devices.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import stdtrit

from analysis import format as fmt
from analysis.inputs.records import Records
from analysis.quantities.cells import Cells
from analysis.quantities.cost_model import CostOptions, Place, StepCost, constants
from analysis.quantities.step_costs import busy_clocks, step_costs, with_device
from analysis.schemas import COST_MODEL, FRONTIER, polars_schema, table
from analysis.statistics.noise import MIN_DOF
from analysis.statistics.pareto import undominated
from analysis.verdicts import Finding, findings_of, verdict_columns

_CELL = ["model", "optimizer", "target_loss_nats", "protocol", "global_batch_tokens"]

#: Points alike in these are compared with each other.
GROUP = ["model", "optimizer", "target_loss_nats", "protocol", "kind", "device"]

#: The column that marks the frontier of each cost.
MARKS = {"device_seconds": "on_frontier", "train_flops": "on_flops_frontier"}

_VERDICT = ("verdict", "reasons", "explanation")

Array = NDArray[np.float64]


def frontier(
    records: Records,
    cells: Cells,
    level: float,
    options: CostOptions = CostOptions(),  # noqa: B008  frozen
    timings: pl.DataFrame | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the tables `frontier` and `cost_model`; a cell without T, or without timed steps, gives no point."""
    costs = step_costs(records, timings)
    known = cells.cells.filter(pl.col("tokens_to_target").is_not_null())
    measured = _measured(known, with_device(records.runs), cells.chosen, level)
    measured = measured.with_columns(
        model_error=_modelled_seconds(measured, costs, options) / pl.col("train_seconds") - 1
    )
    points = pl.concat([measured, _projected(known, costs, options)], how="diagonal")
    points = _with_verdicts(_with_costs(points), known, costs, busy_clocks(records))
    frame = _marked(points).select(pl.col(name).cast(kind) for name, kind in polars_schema(FRONTIER).items())
    table_of_costs = table(constants(costs, _errors_in_words(measured), options), COST_MODEL)
    return frame.sort(frame.columns, nulls_last=True), table_of_costs


def _measured(known: pl.DataFrame, runs: pl.DataFrame, chosen: pl.DataFrame, level: float) -> pl.DataFrame:
    """Return a point for each cell, device and device count, with seconds per token from the chosen runs there."""
    tokens = pl.col("tokens_to_target")
    timed = chosen.filter(pl.col("train_seconds_to_target") > 0, tokens > 0).join(
        runs.select("run_id", "device"), on="run_id"
    )
    rate, place = (pl.col("train_seconds_to_target") / tokens).log(), [*_CELL, "device", "num_devices"]
    points = timed.group_by(place, maintain_order=True).agg(
        rate=rate.mean(),
        squares=(rate - rate.mean()).pow(2).sum(),
        num_runs=pl.len(),
        flops_per_token=(pl.col("flops_to_target") / tokens).mean(),
    )
    seconds = tokens * pl.col("rate").exp()
    points = points.join(known, on=_CELL).with_columns(kind=pl.lit("measured"), train_seconds=seconds)
    spread = _half_width(points, level)
    return points.with_columns(
        train_seconds_low=pl.col("train_seconds") * (-_beyond(tokens, pl.col("tokens_to_target_low"), spread)).exp(),
        train_seconds_high=pl.col("train_seconds") * _beyond(pl.col("tokens_to_target_high"), tokens, spread).exp(),
        train_flops=tokens * pl.col("flops_per_token"),
    )


def _half_width(points: pl.DataFrame, level: float) -> pl.Series:
    """Return the half width of the interval of log seconds per token, its variance pooled over batches.

    With too few repeated runs to tell it is 0: time per token hardly varies beside T.
    """
    series = [name for name in _CELL if name != "global_batch_tokens"] + ["device"]
    pooled = points.select(
        "num_runs", squares=pl.col("squares").sum().over(series), dof=(pl.col("num_runs") - 1).sum().over(series)
    )
    dof = pooled["dof"].to_numpy().astype(float)
    variance = pooled["squares"].to_numpy() / np.maximum(dof, 1) / pooled["num_runs"].to_numpy()
    half = stdtrit(np.maximum(dof, 1), 0.5 + level / 2) * np.sqrt(variance)
    return pl.Series(np.where(dof >= MIN_DOF, half, 0.0))


def _beyond(larger: pl.Expr, smaller: pl.Expr, spread: pl.Series) -> pl.Expr:
    """Return how far an end of the interval lies from the number, in logs; errors of T and of seconds per token are
    independent.
    """
    return ((larger / smaller).log().pow(2) + spread**2).sqrt()


def _projected(known: pl.DataFrame, costs: Mapping[Place, StepCost], options: CostOptions) -> pl.DataFrame:
    """Return a point for each cell, device and power of two of devices of which the cost of a step is known."""
    powers = pl.DataFrame({"num_devices": [2**k for k in range(options.max_devices.bit_length())]})
    places = pl.DataFrame(list(costs), schema=dict.fromkeys(Place._fields, pl.String), orient="row")
    pairs = known.join(places, on=["model", "optimizer"]).join(powers, how="cross")
    seconds = _modelled_seconds(pairs, costs, options, known_only=True)
    points = pairs.with_columns(
        kind=pl.lit("projected"), train_seconds=seconds, train_flops="flops_to_target"
    ).drop_nulls("train_seconds")
    ends = (pl.col(f"tokens_to_target_{end}") / pl.col("tokens_to_target") for end in ("low", "high"))
    low, high = (pl.col("train_seconds") * end for end in ends)
    return points.with_columns(train_seconds_low=low, train_seconds_high=high)


def _modelled_seconds(
    points: pl.DataFrame, costs: Mapping[Place, StepCost], options: CostOptions, known_only: bool = False
) -> pl.Series:
    """Return the time to the target by the cost model; null where it has none, or none it would project to."""
    batches, devices = (
        points[name].fill_null(0).to_numpy().astype(np.int64) for name in ("global_batch_tokens", "num_devices")
    )
    steps, seconds = points["tokens_to_target"].to_numpy() / batches, np.full(points.height, np.nan)
    for place, cost in costs.items():
        own = _is_at(points, place) & (devices > 0)
        if known_only:
            own[own] = cost.is_known(batches[own], devices[own])
        seconds[own] = steps[own] * cost.step_seconds(batches[own], devices[own], options)
    return pl.Series(seconds).fill_nan(None)


def _is_at(points: pl.DataFrame, place: Place) -> NDArray[np.bool_]:
    same = pl.all_horizontal(pl.col(name) == part for name, part in zip(Place._fields, place, strict=True))
    return points.select(same).to_series().to_numpy()


def _with_costs(points: pl.DataFrame) -> pl.DataFrame:
    ends = ("train_seconds", "train_seconds_low", "train_seconds_high")
    return points.with_columns(
        (pl.col(name) * pl.col("num_devices")).alias(name.replace("train", "device")) for name in ends
    )


def _with_verdicts(
    points: pl.DataFrame,
    known: pl.DataFrame,
    costs: Mapping[Place, StepCost],
    clocks: Mapping[Place, tuple[Finding, ...]],
) -> pl.DataFrame:
    """Add what stands against the cell, the clock that timed the point, and a device count that is not stated."""
    keys = [*_CELL, "kind", "device"]
    unstated = pl.col("num_devices").is_null().alias("unstated")
    cases = points.select(*keys, unstated).unique(maintain_order=True)
    of_cells = known.select(*_CELL, "reasons", "explanation")
    rows = []
    for case in cases.join(of_cells, on=_CELL, how="left", maintain_order="left").iter_rows(named=True):
        place = Place(case["model"], case["optimizer"], case["device"])
        clock = clocks.get(place, ()) if case["kind"] == "measured" else costs[place].findings
        findings = [*findings_of(case["reasons"], case["explanation"]), *clock]
        if case["unstated"]:
            findings.append(Finding("ok", "the number of devices is not stated: no device-seconds"))
        rows.append({name: case[name] for name in cases.columns} | verdict_columns(findings))
    judged = pl.DataFrame(rows, schema=cases.schema | dict.fromkeys(_VERDICT, pl.String))
    return points.drop(_VERDICT).with_columns(unstated).join(judged, on=cases.columns, how="left")


def _marked(points: pl.DataFrame) -> pl.DataFrame:
    """Mark the points that no other of their group beats; a point without a cost is neither on nor off."""
    return points.with_columns(
        pl.when(pl.col(cost).is_not_null())
        .then(pl.struct("train_seconds", cost).map_batches(_undominated, pl.Boolean).over(GROUP))
        .alias(mark)
        for cost, mark in MARKS.items()
    )


def _undominated(points: pl.Series) -> pl.Series:
    x, y = (points.struct.field(name).fill_null(np.inf).to_numpy() for name in points.struct.fields)
    return pl.Series(undominated(x, y))


def _errors_in_words(measured: pl.DataFrame) -> dict[Place, str]:
    """Say for each place how far the cost model is off the measured points."""
    errors = measured.drop_nulls("model_error").group_by(*Place._fields, maintain_order=True)
    sizes = pl.col("model_error").sort_by(pl.col("model_error").abs())
    summed = errors.agg(num=pl.len(), median=pl.col("model_error").median(), worst=sizes.last())
    return {
        Place(*place): f"against {fmt.count(num, 'measured point')}: median error {median:+.1%}, worst {worst:+.1%}"
        for *place, num, median, worst in summed.iter_rows()
    }
