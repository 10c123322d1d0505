"""Marks that several figures share: estimates with their intervals, arrows for what lies beyond a panel.

Hollow markers carry a verdict that is not `ok`. An arrow at the top edge stands for runs that fell short of the target,
one at the bottom edge for runs that were there before their first evaluation.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl
from matplotlib.axes import Axes

from analysis.page.figure_style import OptimizerStyle

TOP_EDGE, BOTTOM_EDGE = 0.96, 0.04
#: Room for the arrows, as a share of an axis.
HEADROOM = 0.12
UP, DOWN = r"$\uparrow$", r"$\downarrow$"


def points(ax: Axes, frame: pl.DataFrame, quantity: str, optimizers: OptimizerStyle, name: str) -> None:
    """Draw one optimizer's estimates against batch, moved a little aside, with the intervals that there are."""
    for row in frame.filter(pl.col(quantity).is_not_null()).iter_rows(named=True):
        x = row["global_batch_tokens"] * optimizers.dodge(name)
        estimate(ax, x, row, quantity, optimizers.colour(name), optimizers.marker(name))


def estimate(ax: Axes, x: float, row: Mapping[str, Any], quantity: str, colour: Any, marker: str) -> None:
    """Draw one estimate at `x` with its interval, hollow where its verdict is not ok."""
    whisker(ax, x, row, quantity, colour)
    ax.plot(x, row[quantity], marker=marker, color=colour, mfc=face(row, colour), zorder=3)


def face(row: Mapping[str, Any], colour: Any) -> Any:
    """Return the inside of a marker: the colour, or white where a caveat stands against the number."""
    return colour if row.get("verdict", "ok") == "ok" else "white"


def whisker(ax: Axes, x: float, row: Mapping[str, Any], quantity: str, colour: Any) -> None:
    """Draw the interval of a row's quantity; of one that is bounded on one side only, that side."""
    ends = known_ends(row, quantity)
    ax.plot([x] * len(ends), ends, color=colour, lw=1.1, zorder=2.9)


def known_ends(row: Mapping[str, Any], quantity: str) -> list[float]:
    """Return the ends of the interval that are known, and the number itself in place of one that is not."""
    ends = [row.get(f"{quantity}{end}") for end in ("_low", "_high")]
    if all(end is None for end in ends):
        return []
    return [end for end in (row[quantity] if end is None else end for end in ends) if end is not None]


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
