"""What is drawn inside one panel: a frame and an axes in, marks on the axes out.

Hollow markers carry a verdict that is not `ok`. An arrow at the top edge stands for runs that fell short of the target,
one at the bottom edge for runs that were there before their first evaluation.
"""

import math
from itertools import pairwise
from typing import Any

import polars as pl
import seaborn
from matplotlib.axes import Axes

from analysis import figure_style as style
from analysis import format as fmt
from analysis.figure_style import OptimizerStyle, OrderedStyle

TOP_EDGE, BOTTOM_EDGE = 0.96, 0.04
HEADROOM = 0.12
UP, DOWN = r"$\uparrow$", r"$\downarrow$"


def loss_curves(ax: Axes, curves: pl.DataFrame, batches: OrderedStyle) -> None:
    """Draw a line for each run, coloured by batch: columns tokens_seen, loss_nats, global_batch_tokens, run_id."""
    seaborn.lineplot(
        data=style.mapping(curves),
        x="tokens_seen",
        y="loss_nats",
        hue="global_batch_tokens",
        style="global_batch_tokens",
        units="run_id",
        estimator=None,
        palette=batches.palette,
        markers=batches.markers,
        dashes=False,
        markersize=3.0,
        markeredgewidth=0.2,
        lw=0.9,
        legend=False,
        ax=ax,
    )


def fitted_curve(ax: Axes, curve: pl.DataFrame, quantity: str, optimizers: OptimizerStyle, name: str) -> None:
    """Draw the fitted curve of one optimizer and its band."""
    colour = optimizers.colour(name)
    curve = curve.drop_nulls(quantity).sort("global_batch_tokens")
    ax.plot(curve["global_batch_tokens"], curve[quantity], color=colour, ls=optimizers.line_style(name), zorder=2)
    band = curve.drop_nulls([f"{quantity}_low", f"{quantity}_high"])
    ax.fill_between(
        band["global_batch_tokens"],
        band[f"{quantity}_low"],
        band[f"{quantity}_high"],
        color=colour,
        alpha=0.15,
        lw=0,
        zorder=1,
    )


def critical_batch(ax: Axes, critical: dict[str, Any], quantity: str, colour: Any) -> None:
    """Mark B_crit on the curve, at twice the least tokens or steps, with its interval, unless it is off the axis."""
    size = critical["critical_batch_tokens"]
    least = critical["t_min_tokens" if quantity == "tokens_to_target" else "s_min_steps"]
    first, last = ax.get_xlim()
    if size is None or least is None or not first <= size <= last:
        return
    ends = _known_ends(critical, "critical_batch_tokens")
    ax.plot(ends, [2 * least] * len(ends), color=colour, lw=4, alpha=0.45, solid_capstyle="butt", zorder=2.5)
    face = colour if critical["verdict"] == "ok" else "white"
    ax.plot(
        size,
        2 * least,
        marker="*",
        ms=11,
        color=colour,
        mfc=face,
        mec=style.INK if face == colour else colour,
        mew=0.7,
        zorder=4,
    )


def points(ax: Axes, cells: pl.DataFrame, quantity: str, optimizers: OptimizerStyle, name: str) -> None:
    """Draw one optimizer's estimates against batch, moved a little aside, with the intervals that there are."""
    colour = optimizers.colour(name)
    for row in cells.filter(pl.col(quantity).is_not_null()).iter_rows(named=True):
        x = row["global_batch_tokens"] * optimizers.dodge(name)
        whisker(ax, x, row, quantity, colour)
        face = colour if row.get("verdict", "ok") == "ok" else "white"
        ax.plot(x, row[quantity], marker=optimizers.marker(name), color=colour, mfc=face, zorder=3)


def without_tokens(ax: Axes, cells: pl.DataFrame, optimizers: OptimizerStyle, name: str) -> None:
    """Put an arrow at the edge beyond which the tokens lie, for each cell without an estimate of them."""
    missing = cells.filter(pl.col("tokens_to_target").is_null()).select("global_batch_tokens", "verdict")
    for size, verdict in missing.iter_rows():
        at_edge(ax, size * optimizers.dodge(name), optimizers.colour(name), bottom=verdict == "reached_at_first_eval")


def at_edge(ax: Axes, x: float, colour: Any, *, bottom: bool = False) -> None:
    """Draw an arrow that points out of the panel."""
    ax.plot(
        x,
        BOTTOM_EDGE if bottom else TOP_EDGE,
        marker=DOWN if bottom else UP,
        ms=8,
        color=colour,
        mew=0.4,
        transform=ax.get_xaxis_transform(),
        zorder=3,
    )


def whisker(ax: Axes, x: float, row: dict[str, Any], quantity: str, colour: Any) -> None:
    """Draw the interval of a row's quantity; of one that is bounded on one side only, that side."""
    ends = _known_ends(row, quantity)
    ax.plot([x] * len(ends), ends, color=colour, lw=1.1, zorder=2.9)


def rate_curves(ax: Axes, rates: pl.DataFrame, batches: OrderedStyle) -> None:
    """Draw tokens to target against learning rate, a line per batch; at an edge rates that have no number."""
    reached = rates.filter(pl.col("tokens_to_target").is_not_null())
    if reached.is_empty():
        style.empty_panel(ax, "no learning rate at which\nevery run reached the target")
    else:
        seaborn.lineplot(
            data=style.mapping(reached),
            x="peak_lr",
            y="tokens_to_target",
            hue="global_batch_tokens",
            style="global_batch_tokens",
            palette=batches.palette,
            markers=batches.markers,
            dashes=False,
            markeredgewidth=0.3,
            legend=False,
            ax=ax,
        )
    unknown = rates.filter(pl.col("tokens_to_target").is_null()).with_columns(at_once=at_once())
    for (lr, bottom), group in unknown.group_by(["peak_lr", "at_once"], maintain_order=True):
        sizes = group["global_batch_tokens"].sort().to_list()
        for place, size in enumerate(sizes):
            aside = style.dodge(place, len(sizes), octaves=0.2)
            at_edge(ax, lr * aside, batches.palette[size], bottom=bottom)


def at_once() -> pl.Expr:
    """Say of a learning rate without tokens whether runs that were early are why, and none that fell short."""
    return pl.col("num_reached") + pl.col("num_reached_at_first_eval") == pl.col("num_runs")


def optima(ax: Axes, cells: pl.DataFrame, batches: OrderedStyle) -> None:
    """Draw the optimal learning rate of each batch with its interval, a row per batch.

    Where none is identified, an open mark stands at the best rate that was run.
    """
    for row in cells.iter_rows(named=True):
        size = row["global_batch_tokens"]
        place, colour, marker = batches.values.index(size), batches.palette[size], batches.markers[size]
        ends = _known_ends(row, "optimal_lr")
        ax.plot(ends, [place] * len(ends), color=colour, lw=1.1)
        known = row["optimal_lr"] is not None
        centre = row["optimal_lr"] if known else row["best_lr"]
        if centre is not None:
            ax.plot(
                centre,
                place,
                marker=marker,
                color=colour,
                mfc=colour if known and row["lr_verdict"] == "ok" else "white",
            )
    ax.set(ylim=(-0.7, len(batches.values) - 0.3), ylabel="Batch")
    ax.set_yticks(range(len(batches.values)), [fmt.tokens(size) for size in batches.values])


def ratios(ax: Axes, frame: pl.DataFrame, targets: OrderedStyle) -> None:
    """Draw token ratios against batch, a line per target, with a line where both optimizers need the same tokens."""
    ax.axhline(1.0, color=style.INK, lw=0.8, zorder=1)
    for place, target in enumerate(targets.values):
        rows = frame.filter(pl.col("target_loss_nats") == target).sort("global_batch_tokens")
        aside = style.dodge(place, len(targets.values), octaves=0.12 * _octaves_apart(frame["global_batch_tokens"]))
        colour, places = targets.palette[target], rows["global_batch_tokens"] * aside
        ax.plot(places, rows["token_ratio"], color=colour, lw=0.9, zorder=2)
        for x, row in zip(places, rows.iter_rows(named=True), strict=True):
            whisker(ax, x, row, "token_ratio", colour)
            ax.plot(
                x,
                row["token_ratio"],
                marker=targets.markers[target],
                color=colour,
                mfc=colour if row["verdict"] == "ok" else "white",
                zorder=3,
            )


def frontier(ax: Axes, frame: pl.DataFrame, cost: str, optimizers: OptimizerStyle) -> None:
    """Draw cost against time: measured points filled, projected ones open, a line along each projected frontier."""
    for name in optimizers.names:
        own = frame.filter(pl.col("optimizer") == name).sort("train_seconds", cost)
        measured, projected = (own.filter(pl.col("kind") == kind) for kind in ("measured", "projected"))
        look = {"ls": "", "marker": optimizers.marker(name), "color": optimizers.colour(name)}
        off, edge = projected.filter(~pl.col("on_frontier")), projected.filter("on_frontier")
        ax.plot(off["train_seconds"], off[cost], mfc="white", ms=3.5, alpha=0.45, zorder=2, **look)
        ax.plot(
            edge["train_seconds"], edge[cost], mfc="white", zorder=3, **(look | {"ls": optimizers.line_style(name)})
        )
        ax.plot(measured["train_seconds"], measured[cost], zorder=4, **look)


def _octaves_apart(batches: pl.Series) -> float:
    """Return the smallest distance between two of the batch sizes, in octaves; 2 where there is only one."""
    sizes = sorted(batches.unique())
    return min((math.log2(larger / smaller) for smaller, larger in pairwise(sizes)), default=2.0)


def _known_ends(row: dict[str, Any], quantity: str) -> list[float]:
    """Return the ends of the interval that are known, and the number itself in place of one that is not."""
    ends = [row.get(f"{quantity}{end}") for end in ("_low", "_high")]
    return [row[quantity] if end is None else end for end in ends] if any(end is not None for end in ends) else []
