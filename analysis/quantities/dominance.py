"""On which deadlines a challenger's frontier costs less than the baseline's, and by how much.

A frontier is a step function: the least cost of a point that is within a deadline. Two are compared on the axis of log
deadlines, from the shortest that both meet to the longest at which either still steps down: beyond, nothing changes.
`share` is the part of that axis on which the challenger costs less, `cost_ratio` the geometric mean over it of the
baseline's cost over the challenger's.

A cell's T moves all of its points by one factor, in time and in cost. So the intervals are quantiles over draws of log
T of all cells of both sides together, from their t distribution, each with a comparison of its own; with ten seeds or
more, over resamples of the seeds. Assumption: the cost of a step is exact beside T.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis import format as fmt
from analysis.quantities.frontier import MARKS
from analysis.quantities.pairs import CONTEXT, Pair, Sides
from analysis.schemas import DOMINANCE, table
from analysis.statistics.noise import NO_NOISE, Errors
from analysis.statistics.pareto import Points, compare, undominated
from analysis.verdicts import Finding, names_of, verdict_columns

Array = NDArray[np.float64]

NUM_DRAWS = 1_000
_SEED = 0

_PLACE = ("kind", "device")
_JUDGED = ("optimizer", "global_batch_tokens", "reasons")


def dominance(frontier: pl.DataFrame, compared: Sequence[Pair], level: float) -> pl.DataFrame:
    """Return the table `dominance`: every optimizer against the baseline, at each target, kind, device and cost."""
    by_series = frontier.partition_by(*CONTEXT, "optimizer", as_dict=True)
    rows: list[dict[str, Any]] = []
    for pair in compared:
        points = [by_series.get(tuple(series[name] for name in (*CONTEXT, "optimizer"))) for series in pair.series]
        if points[0] is not None and points[1] is not None:
            rows += [pair.names | row for row in _rows(pair, points[0], points[1], level)]
    return table(rows, DOMINANCE)


def _rows(pair: Pair, ours: pl.DataFrame, theirs: pl.DataFrame, level: float) -> Iterator[dict[str, Any]]:
    batches = [points["global_batch_tokens"].unique().sort().to_list() for points in (ours, theirs)]
    sides = pair.sides(*batches)
    shifts = np.split(_shifts(sides), [len(batches[0])], axis=1)
    by_batch = [dict(zip(own, each.T, strict=True)) for own, each in zip(batches, shifts, strict=True)]
    for kind, device in sorted(set(ours.select(_PLACE).rows()) & set(theirs.select(_PLACE).rows())):
        of_place = {"kind": kind, "device": device}
        for cost in MARKS:
            compared = [points.filter(**of_place).drop_nulls(cost) for points in (ours, theirs)]
            if all(points.height for points in compared):
                yield of_place | {"cost": cost} | _compared(compared, by_batch, cost, level)


def _compared(points: list[pl.DataFrame], shifts: list[dict[int, Array]], cost: str, level: float) -> dict[str, Any]:
    """Compare the points of baseline and challenger in every draw; the first draw is the estimate."""
    found = compare(*(_in_logs(own, by_batch, cost) for own, by_batch in zip(points, shifts, strict=True)))
    findings = _caveats(pl.concat([own.filter(MARKS[cost]).select(_JUDGED) for own in points]))
    if len(found.share) == 1:
        findings.append(Finding("few_points", NO_NOISE))
    start, end = (float(np.exp(side[0])) for side in (found.start, found.end))
    if start == end:
        words = f"no frontier steps down beyond {fmt.seconds(end)}: that one deadline is compared"
        findings.append(Finding("ok", words))
    return {
        **_interval("share", found.share, level),
        **_interval("cost_ratio", np.exp(found.log_ratio), level),
        "from_seconds": start,
        "to_seconds": end,
        **verdict_columns(findings),
    }


def _shifts(sides: Sides) -> Array:
    """Return log T of all cells in every draw, less the estimate, which is the first draw [1 + draws, cells]."""
    draws = np.empty((0, len(sides.log_tokens)))
    if sides.resamples is not None:
        draws = sides.resamples - sides.log_tokens
    elif sides.errors is not None:
        draws = _drawn(sides.errors)
    return np.concatenate([np.zeros((1, len(sides.log_tokens))), draws])


def _drawn(errors: Errors) -> Array:
    """Draw errors of log T [draws, cells] from the multivariate t distribution."""
    rng = np.random.default_rng(_SEED)
    normal = rng.standard_normal((NUM_DRAWS, len(errors.covariance)))
    scale = np.sqrt(errors.dof / rng.chisquare(errors.dof, NUM_DRAWS))
    values, vectors = np.linalg.eigh(errors.covariance)
    return np.asarray((normal * np.sqrt(np.maximum(values, 0))) @ vectors.T * scale[:, None])


def _in_logs(points: pl.DataFrame, shifts: Mapping[int, Array], cost: str) -> Points:
    """Return the points in every draw; of a cell, those that others of the same cell do not beat in any."""
    seconds, costs = (points[name].log().to_numpy() for name in ("train_seconds", cost))
    batches = points["global_batch_tokens"].to_numpy()
    kept: list[Points] = []
    for batch, shift in shifts.items():
        own = np.flatnonzero(batches == batch)
        own = own[undominated(seconds[own], costs[own])]
        kept.append(Points(*(values[own] + shift[:, None] for values in (seconds, costs))))
    return Points(*(np.concatenate(parts, axis=1) for parts in zip(*kept, strict=True)))


def _interval(name: str, drawn: Array, level: float) -> dict[str, float | None]:
    estimate, draws = float(drawn[0]), drawn[1:]
    ends = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2]).tolist() if len(draws) else (None, None)
    return {name: estimate, f"{name}_low": ends[0], f"{name}_high": ends[1]}


def _caveats(points: pl.DataFrame) -> list[Finding]:
    """Return what stands against the points on the frontiers: each finding once, with the cells that have it.

    That a cell by itself has no interval is none about the comparison.
    """
    cells: dict[str, dict[str, list[int]]] = {}
    for optimizer, batch, reasons in points.unique().sort(pl.all()).iter_rows():
        for name in sorted({*names_of(reasons)} - {"few_points"}):
            cells.setdefault(name, {}).setdefault(optimizer, []).append(batch)
    return [Finding(name, f"{fmt.verdict(name)}: {_places(places)}") for name, places in cells.items()]


def _places(cells: Mapping[str, list[int]]) -> str:
    return ", ".join(
        f"{fmt.optimizer_name(optimizer)} at {fmt.listed([fmt.tokens(batch) for batch in batches])}"
        for optimizer, batches in cells.items()
    )
