"""Learning rates: tokens to target over the rates tried, each batch's optimum, and the ratio under rules of rate."""

from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from analysis import format as fmt
from analysis.estimate import Estimates, headline_target
from analysis.page import contents, marks
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OrderedStyle

_RING: dict[str, Any] = {"ls": "", "marker": "o", "ms": 9.0, "mfc": "none", "mec": style.INK, "mew": 0.8}


def learning_rates(estimates: Estimates) -> Drawing:
    """Draw tokens to the headline target against learning rate and, below, each batch's optimum with its interval."""
    target = headline_target(estimates)
    if target is None:
        return contents.nothing_reached(estimates)
    at_target = pl.col("target_loss_nats") == target
    cells = estimates.cells.filter(at_target, pl.col("best_lr").is_not_null())
    rates = _at_chosen_tuning(estimates.rates.filter(at_target, pl.col("peak_lr").is_not_null()), cells)
    if rates.is_empty():
        return "No learning rates: the runs record none."
    with style.theme():
        optimizers = contents.optimizers(estimates)
        batches = OrderedStyle(contents.values(rates, "global_batch_tokens"))
        figure, pairs = style.panels_with_strips(len(optimizers.names))
        for (upper, lower), name in zip(pairs, optimizers.names, strict=True):
            own_rates, own_cells = (frame.filter(pl.col("optimizer") == name) for frame in (rates, cells))
            _rate_curves(upper, own_rates, batches)
            _chosen_rates(upper, own_cells, own_rates)
            _optima(lower, own_cells, batches)
            style.heading(upper, f"{fmt.optimizer_name(name)}, target {fmt.loss(target)} nats/token")
            style.log_axis(lower, "x")
            lower.set(xlabel="Peak learning rate")
        uppers, lowers = zip(*pairs, strict=True)
        style.log_axis(uppers[0], "y", headroom=marks.HEADROOM)
        style.y_label(uppers, "Tokens to target")
        style.y_label(lowers, "Batch (tokens)")
        handles = [*batches.handles(fmt.tokens, batches.values), *_cues(rates, cells)]
        style.side_legend(figure, handles, "Global batch (tokens)")
    return figure


def _at_chosen_tuning(rates: pl.DataFrame, cells: pl.DataFrame) -> pl.DataFrame:
    """Leave out what was tuned beside the rate and not chosen: one panel holds one curve a batch."""
    cell = ["optimizer", "global_batch_tokens"]
    chosen = rates.join(cells.select(*cell, chosen="tuning"), on=cell, how="left", maintain_order="left")
    return chosen.filter(pl.col("tuning") == pl.coalesce("chosen", "tuning")).drop("chosen")


def _rate_curves(ax: Axes, rates: pl.DataFrame, batches: OrderedStyle) -> None:
    """Draw tokens to target against learning rate, a mark a rate, and the fit; at an edge rates without a number."""
    reached = rates.filter(pl.col("tokens_to_target").is_not_null())
    if reached.is_empty():
        style.empty_panel(ax, "no learning rate at which\nevery run reached the target")
    for (size,), own in rates.group_by("global_batch_tokens", maintain_order=True):
        marker, colour = batches.markers[size], batches.palette[size]
        ax.plot(own["peak_lr"], own["tokens_to_target"], ls="", marker=marker, color=colour, zorder=3)
        _fitted_quadratic(ax, own.drop_nulls("fitted_tokens"), colour)
    unknown = rates.filter(pl.col("tokens_to_target").is_null()).with_columns(at_once=_at_once())
    for (lr, bottom), group in unknown.group_by(["peak_lr", "at_once"], maintain_order=True):
        sizes = group["global_batch_tokens"].unique().sort().to_list()
        for place, size in enumerate(sizes):
            aside = style.dodge(place, len(sizes), octaves=0.2)
            marks.at_edge(ax, lr * aside, batches.palette[size], bottom=bottom)


def _chosen_rates(ax: Axes, cells: pl.DataFrame, rates: pl.DataFrame) -> None:
    """Ring the marks of the rates that were chosen."""
    on_grid = rates.select("global_batch_tokens", on_grid="tokens_to_target", best_lr="peak_lr").drop_nulls()
    chosen = cells.join(on_grid, on=["global_batch_tokens", "best_lr"])
    ax.plot(chosen["best_lr"], chosen["on_grid"], **_RING, zorder=4)


def _fitted_quadratic(ax: Axes, fitted: pl.DataFrame, colour: Any) -> None:
    """Draw the parabola of log tokens in log rate on which the fitted tokens lie, where there are enough of them."""
    if fitted.height < 3:
        return
    log_rates = fitted["peak_lr"].log().to_numpy()
    centre = log_rates.mean()
    parabola = np.polynomial.Polynomial.fit(log_rates - centre, fitted["fitted_tokens"].log().to_numpy(), 2)
    grid = np.linspace(log_rates.min(), log_rates.max(), 50)
    ax.plot(np.exp(grid), np.exp(parabola(grid - centre)), color=colour, zorder=2)


def _at_once() -> pl.Expr:
    """Say of a learning rate without tokens whether runs that were early are why, and none that fell short."""
    return pl.col("num_reached") + pl.col("num_reached_at_first_eval") == pl.col("num_runs")


def _optima(ax: Axes, cells: pl.DataFrame, batches: OrderedStyle) -> None:
    """Draw the optimal learning rate of each batch with its interval, a row per batch.

    Where none is identified, an open mark stands at the best rate that was run.
    """
    for row in cells.iter_rows(named=True):
        size = row["global_batch_tokens"]
        place, colour = batches.values.index(size), batches.palette[size]
        ends = marks.known_ends(row, "optimal_lr")
        ax.plot(ends, [place] * len(ends), color=colour, lw=1.1)
        known = row["optimal_lr"] is not None
        sound = known and row["lr_verdict"] == "ok"
        centre = row["optimal_lr"] if known else row["best_lr"]
        ax.plot(centre, place, marker=batches.markers[size], color=colour, mfc=colour if sound else "white")
    ax.set(ylim=(-0.7, len(batches.values) - 0.3))
    ax.set_yticks(range(len(batches.values)), [fmt.tokens(size) for size in batches.values])


def _cues(rates: pl.DataFrame, cells: pl.DataFrame) -> list[Any]:
    doubtful = cells.filter(pl.col("optimal_lr").is_null() | (pl.col("lr_verdict") != "ok"))
    unknown = rates.filter(pl.col("tokens_to_target").is_null())
    return contents.occurring(
        (style.cue("a run fell short", marker=marks.UP, ms=8), unknown.filter(~_at_once()).height > 0),
        (contents.at_once_cue(), unknown.filter(_at_once()).height > 0),
        (style.cue("fitted quadratic", ls="-"), rates["fitted_tokens"].is_not_null().any()),
        (style.cue("chosen rate", **_RING), cells.height > 0),
        (style.cue("optimum, interval", marker="o", ls="-"), cells.height > 0),
        (contents.caveat_cue(), doubtful.height > 0),
    )
