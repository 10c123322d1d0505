"""What is drawn inside one panel: a frame and an axes in, marks on the axes out.

Hollow markers carry a verdict that is not `ok`. An arrow at the top edge stands for runs that fell short of the target,
one at the bottom edge for runs that were there before their first evaluation.
"""

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import polars as pl
import seaborn
from matplotlib.axes import Axes

from analysis import format as fmt
from analysis.page import figure_style as style
from analysis.page.figure_style import OptimizerStyle, OrderedStyle

TOP_EDGE, BOTTOM_EDGE = 0.96, 0.04
HEADROOM = 0.12
OFF_FRONTIER: dict[str, Any] = {"mfc": "white", "ms": 2.5, "mew": 0.6, "alpha": 0.4}
RING: dict[str, Any] = {"ls": "", "marker": "o", "ms": 9.0, "mfc": "none", "mec": style.INK, "mew": 0.8}
#: A panel's inside, a little smaller than it will be laid out, and the room that a marker takes.
PANEL_POINTS, MARK_POINTS = (180.0, 155.0), 6.0
#: Centre and size, in points.
Box = tuple[float, float, float, float]
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


def target_lines(ax: Axes, targets: Sequence[float]) -> None:
    """Draw a thin line at each target loss and write its value at the right edge, where neighbours leave room."""
    low, high = ax.get_ylim()
    last = -math.inf
    for target in sorted(targets):
        ax.axhline(target, color=style.MUTED, lw=0.6, zorder=0)
        if low <= target <= high and target - last > (high - low) / 18:
            last = target
            edge = ax.get_yaxis_transform()
            ax.text(
                1.01,
                target,
                fmt.loss(target),
                transform=edge,
                va="center_baseline",
                color=style.MUTED,
                fontsize="x-small",
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
        zorder=2.7,
    )
    # over the star, which may be wider than the interval
    ax.plot(ends, [2 * least] * len(ends), color=style.INK, lw=1.0, marker="|", ms=7, mew=1.2, zorder=2.8)


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
    """Draw tokens to target against learning rate, a mark a rate, and the fit; at an edge rates without a number."""
    reached = rates.filter(pl.col("tokens_to_target").is_not_null())
    if reached.is_empty():
        style.empty_panel(ax, "no learning rate at which\nevery run reached the target")
    else:
        for (size,), own in reached.group_by("global_batch_tokens", maintain_order=True):
            marker, colour = batches.markers[size], batches.palette[size]
            ax.plot(own["peak_lr"], own["tokens_to_target"], ls="", marker=marker, color=colour, zorder=3)
    for (size,), own in rates.group_by("global_batch_tokens", maintain_order=True):
        _fitted_quadratic(ax, own.drop_nulls("fitted_tokens"), batches.palette[size])
    unknown = rates.filter(pl.col("tokens_to_target").is_null()).with_columns(at_once=at_once())
    for (lr, bottom), group in unknown.group_by(["peak_lr", "at_once"], maintain_order=True):
        sizes = group["global_batch_tokens"].sort().to_list()
        for place, size in enumerate(sizes):
            aside = style.dodge(place, len(sizes), octaves=0.2)
            at_edge(ax, lr * aside, batches.palette[size], bottom=bottom)


def chosen_rates(ax: Axes, cells: pl.DataFrame, rates: pl.DataFrame) -> None:
    """Ring the marks of the rates that were chosen."""
    chosen = cells.join(
        rates.drop_nulls("tokens_to_target").select("global_batch_tokens", "tokens_to_target", best_lr="peak_lr"),
        on=["global_batch_tokens", "best_lr"],
        suffix="_on_grid",
    )
    ax.plot(chosen["best_lr"], chosen["tokens_to_target_on_grid"], **RING, zorder=4)


def _fitted_quadratic(ax: Axes, fitted: pl.DataFrame, colour: Any) -> None:
    """Draw the parabola of log tokens in log rate on which the fitted tokens lie, where there are enough of them."""
    if fitted.height < 3:
        return
    log_rates = fitted["peak_lr"].log().to_numpy()
    centre = log_rates.mean()
    parabola = np.polynomial.Polynomial.fit(log_rates - centre, fitted["fitted_tokens"].log().to_numpy(), 2)
    grid = np.linspace(log_rates.min(), log_rates.max(), 50)
    ax.plot(np.exp(grid), np.exp(parabola(grid - centre)), color=colour, zorder=2)


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
    ax.set(ylim=(-0.7, len(batches.values) - 0.3))
    ax.set_yticks(range(len(batches.values)), [fmt.tokens(size) for size in batches.values])


def ratios(ax: Axes, frame: pl.DataFrame, targets: OrderedStyle) -> None:
    """Draw token ratios against batch, a line per target, with a line where both optimizers need the same tokens."""
    ax.axhline(1.0, color=style.INK, lw=0.8, zorder=1)
    _name_equal_tokens(ax, frame)
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


def _name_equal_tokens(ax: Axes, frame: pl.DataFrame) -> None:
    """Name the line at 1 on its side without points or, where both have some, outside of the panel."""
    low, high = (frame.select(pl.coalesce(f"token_ratio{end}", "token_ratio")).to_series() for end in ("_low", "_high"))
    free_below, free_above = (low > 1).all(), (high < 1).all()
    if free_below or free_above:
        text, x, across = "equal tokens", 0.99, "right"
        shift, up = (-2, "top") if free_below else (2, "bottom")
        ax.margins(y=0.1)  # room for the words
    else:
        text, x, across = "equal\ntokens", 1.01, "left"
        shift, up = 0, "center"
    ax.annotate(
        text,
        (x, 1.0),
        (0, shift),
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
        ha=across,
        va=up,
        color=style.INK,
        fontsize="x-small",
    )


def frontier(ax: Axes, frame: pl.DataFrame, cost: str, optimizers: OptimizerStyle) -> None:
    """Draw cost against time: measured points filled, projected ones open, a line along each projected frontier."""
    for name in optimizers.names:
        own = frame.filter(pl.col("optimizer") == name).sort("train_seconds", cost)
        measured, projected = (own.filter(pl.col("kind") == kind) for kind in ("measured", "projected"))
        look = {"ls": "", "marker": optimizers.marker(name), "color": optimizers.colour(name)}
        off, edge = projected.filter(~pl.col("on_frontier")), projected.filter("on_frontier")
        ax.plot(off["train_seconds"], off[cost], **(look | OFF_FRONTIER), zorder=1.5)
        ax.plot(
            edge["train_seconds"], edge[cost], mfc="white", zorder=3, **(look | {"ls": optimizers.line_style(name)})
        )
        ax.plot(measured["train_seconds"], measured[cost], zorder=4, **look)


def frontier_ends(ax: Axes, frame: pl.DataFrame, cost: str, optimizers: OptimizerStyle) -> None:
    """Write batch × devices at both ends of each frontier, beside what is drawn; the axes' limits must be final."""
    projected = frame.filter(pl.col("kind") == "projected", "on_frontier").sort("train_seconds", cost)
    edges = {name: projected.filter(pl.col("optimizer") == name) for name in optimizers.names}
    taken = [(*point, MARK_POINTS, MARK_POINTS) for point in _in_points(ax, frame, cost)]
    for edge in edges.values():
        for (x, y), (next_x, next_y) in pairwise(_in_points(ax, edge, cost)):
            taken += [(x + t * (next_x - x), y + t * (next_y - y), 1.0, 1.0) for t in np.linspace(0, 1, 30)]
    for name, edge in edges.items():
        for end in (edge[:1], edge[1:][-1:]):
            for row, point in zip(end.iter_rows(named=True), _in_points(ax, end, cost), strict=True):
                text = f"{fmt.tokens(row['global_batch_tokens'])} × {row['num_devices']}"
                _write_beside(ax, text, point, taken, optimizers.colour(name))


def _in_points(ax: Axes, frame: pl.DataFrame, cost: str) -> list[tuple[float, float]]:
    """Return where the points will lie in a panel of PANEL_POINTS, before it is laid out."""
    inside = (ax.transScale + ax.transLimits).transform(frame.select("train_seconds", cost).to_numpy())
    return [(x * PANEL_POINTS[0], y * PANEL_POINTS[1]) for x, y in inside]


def _write_beside(ax: Axes, text: str, point: tuple[float, float], taken: list[Box], colour: Any) -> None:
    """Write in the first free place around a point, and take that place; without one, write nothing."""
    width, height = 4.1 * len(text), 9.0
    for across, up in product((1, -1, 0), (0, 1, -1)):
        shift = across * (width / 2 + 5), up * (height / 2 + (5 if across == 0 else 2))
        box = point[0] + shift[0], point[1] + shift[1], width, height
        if (across, up) != (0, 0) and _inside(box) and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            ax.annotate(
                text,
                (point[0] / PANEL_POINTS[0], point[1] / PANEL_POINTS[1]),
                shift,
                xycoords="axes fraction",
                textcoords="offset points",
                ha="center",
                va="center",
                color=colour,
                fontsize="x-small",
            )
            return


def _inside(box: Box) -> bool:
    return all(
        size / 2 <= centre <= room - size / 2 for centre, size, room in zip(box[:2], box[2:], PANEL_POINTS, strict=True)
    )


def _overlap(box: Box, other: Box) -> bool:
    return all(abs(box[axis] - other[axis]) < (box[axis + 2] + other[axis + 2]) / 2 for axis in (0, 1))


def _octaves_apart(batches: pl.Series) -> float:
    """Return the smallest distance between two of the batch sizes, in octaves; 2 where there is only one."""
    sizes = sorted(batches.unique())
    return min((math.log2(larger / smaller) for smaller, larger in pairwise(sizes)), default=2.0)


def _known_ends(row: dict[str, Any], quantity: str) -> list[float]:
    """Return the ends of the interval that are known, and the number itself in place of one that is not."""
    ends = [row.get(f"{quantity}{end}") for end in ("_low", "_high")]
    return [row[quantity] if end is None else end for end in ends] if any(end is not None for end in ends) else []
