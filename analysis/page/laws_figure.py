"""Scaling laws: the critical batch over parameters, tokens or loss, with the power law through it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import contents, marks
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OptimizerStyle

#: The variables of laws of one variable: how their axis is labelled, and its values written.
_AXES = {
    "num_params_nonembedding": ("Parameters without embedding", fmt.tokens),
    "tokens_to_target": ("Tokens to target at the critical batch", fmt.tick),
    "target_loss_nats": ("Target loss (nats/token)", fmt.loss),
}


_TICKS_AT_VALUES, _MAX_TICKS = ("num_params_nonembedding", "target_loss_nats"), 5
#: The definitions that are drawn; a law by any other is in the table alone.
_DEFINITIONS = ("emin_over_smin", "overhead_20pct")


def laws(estimates: Estimates) -> Drawing:
    """Draw critical batches against the variable of each law of one variable, a panel per variable and definition."""
    of_one = estimates.laws.filter(pl.col("by").is_in(list(_AXES)), pl.col("exponent").is_not_null())
    drawn = of_one.filter(pl.col("definition").is_in(_DEFINITIONS))
    if drawn.is_empty():
        return "No scaling law: it takes critical batches of several sizes, token counts or losses."
    with style.theme():
        optimizers = contents.optimizers(estimates)
        places = drawn.select("by", "definition").unique(maintain_order=True).rows()
        notes = {place: _notes(drawn, *place) for place in places}
        lines = max(len(style.wrapped(own)) for own in notes.values())
        figure, axes = style.panels(len(places), share=False, note_lines=lines)
        for ax, (variable, definition) in zip(axes, places, strict=True):
            for law in _of(drawn, variable, definition).iter_rows(named=True):
                _draw_law(ax, _points(estimates, law), law, optimizers)
            label, write = _AXES[variable]
            values = _values(estimates, _of(drawn, variable, definition))
            few = variable in _TICKS_AT_VALUES and len(values) <= _MAX_TICKS
            _ticks_at(ax, values, write) if few else style.log_axis(ax, "x", write)
            style.log_axis(ax, "y", fmt.tick)
            ax.set(xlabel=label, ylabel="Critical batch size (tokens)")
            style.heading(ax, definition, notes[variable, definition], lines)
        points = pl.concat(_points(estimates, law) for law in drawn.iter_rows(named=True))
        cues = contents.occurring(
            (style.cue("power law", ls="-"), True),
            (contents.interval_cue(estimates), contents.any_interval(points, "critical_batch_tokens")),
            (contents.caveat_cue(), contents.any_caveat(points)),
        )
        style.side_legend(figure, [*optimizers.handles(contents.values(drawn, "optimizer")), *cues])
    return figure


def _of(drawn: pl.DataFrame, variable: str, definition: str) -> pl.DataFrame:
    return drawn.filter(pl.col("by") == variable, pl.col("definition") == definition)


def _notes(drawn: pl.DataFrame, variable: str, definition: str) -> list[str]:
    rows = _of(drawn, variable, definition).iter_rows(named=True)
    return [f"{_owner(law)}: exponent {fmt.estimate(law, 'exponent')}{_caveat(law)}" for law in rows]


def _owner(law: Mapping[str, Any]) -> str:
    target = law["target_loss_nats"]
    parts = [fmt.optimizer_name(law["optimizer"]), law["model"], None if target is None else fmt.loss(target)]
    return ", ".join(part for part in parts if part)


def _caveat(law: Mapping[str, Any]) -> str:
    return "" if law["verdict"] == "ok" else f" ({fmt.short_verdict(law['verdict'])})"


def _points(estimates: Estimates, law: Mapping[str, Any]) -> pl.DataFrame:
    """Return the critical batches that a law goes through, with its variable as `x`."""
    names = ("definition", "optimizer", "model", "target_loss_nats")
    own = [pl.col(name) == law[name] for name in names if law[name] is not None]
    rows = estimates.critical_batches.filter(*own, pl.col("critical_batch_tokens").is_not_null())
    if law["by"] == "num_params_nonembedding":
        sizes = estimates.records.runs.group_by("model").agg(pl.col("num_params_nonembedding").max())
        rows = rows.join(sizes, on="model", how="left", maintain_order="left")
    rows = rows.sort(pl.col("residuals") != "log", maintain_order=True).unique(names, keep="first", maintain_order=True)
    rows = rows.with_columns(x=pl.col(law["by"]).cast(pl.Float64)).drop_nulls("x").sort("x")
    return rows.select("x", "verdict", pl.selectors.starts_with("critical_batch_tokens"))


def _values(estimates: Estimates, laws: pl.DataFrame) -> list[float]:
    return sorted({x for law in laws.iter_rows(named=True) for x in _points(estimates, law)["x"]})


def _ticks_at(ax: Axes, values: Sequence[float], write: Callable[[float], str]) -> None:
    """Set up a log axis with a tick at each of a few values."""
    ax.set_xscale("log")
    ax.set_xticks(values, [write(value) for value in values])
    ax.xaxis.set_minor_locator(NullLocator())


def _draw_law(ax: Axes, points: pl.DataFrame, law: Mapping[str, Any], optimizers: OptimizerStyle) -> None:
    """Draw the critical batches with their intervals and the law between the outermost of them."""
    name = law["optimizer"]
    colour = optimizers.colour(name)
    for row in points.iter_rows(named=True):
        marks.estimate(ax, row["x"], row, "critical_batch_tokens", colour, optimizers.marker(name))
    if points.height and law["prefactor"] is not None:
        ends = np.array([points["x"][0], points["x"][-1]])
        heights = law["prefactor"] * ends ** law["exponent"]
        ax.plot(ends, heights, color=colour, ls=optimizers.line_style(name), zorder=2)
