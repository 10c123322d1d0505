"""Telescoping: the loss surface of each level over its hyperparameters, and the optimum that moves with the width."""

from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from analysis.page import figure_style as style

_NAMES = {"optimizer.peak_lr": "Peak learning rate"}
#: Losses within this of the best of a level are told apart by colour.
_LEAST_EXCESS, _MOST_EXCESS = 1e-3, 1.0
_MARGIN = 1.5


def surfaces(points: pl.DataFrame, levels: pl.DataFrame) -> Figure:
    """Draw a panel per family and width. One hyperparameter: loss against it. Several: the first two, loss as colour.

    `points`: family, width, loss_nats and a column per hyperparameter. `levels`: family, width, hyperparameter,
    optimum.
    """
    cells = levels.select("family", "width").unique(maintain_order=True).rows()
    keys = levels["hyperparameter"].unique(maintain_order=True).to_list()
    with style.theme():
        figure, axes = style.panels(len(cells), note_lines=1)
        colours = ScalarMappable(LogNorm(_LEAST_EXCESS, _MOST_EXCESS), "viridis_r")
        for ax, (family, width) in zip(axes, cells, strict=True):
            own, optima = points.filter(family=family, width=width), levels.filter(family=family)
            if len(keys) == 1:
                _curve(ax, own, optima.filter(width=width), keys[0])
            else:
                _map(ax, own, optima, width, keys, colours)
            several = f", {family}" * (levels["family"].n_unique() > 1)
            style.heading(ax, f"Width {width}{several}", [f"{own.height} point{'s' * (own.height > 1)}"])
            ax.set(xlabel=_name(keys[0]), ylabel="")
        _axes(axes[0], points, keys)
        style.y_label(axes, "Final loss (nats/token)" if len(keys) == 1 else _name(keys[1]))
        cues = [style.cue("best point", marker="o", mfc="none"), style.cue("optimum", marker="*", ms=9.0)]
        if len(keys) > 1:
            figure.colorbar(colours, ax=axes, label="Loss above the level's best (nats/token)", shrink=0.6)
            cues.append(style.cue("of narrower levels", color=style.MUTED, ls="-"))
        style.side_legend(figure, cues)
    return figure


def _axes(ax: Axes, points: pl.DataFrame, keys: list[str]) -> None:
    """Set up the axes that all panels share, with half a step of the grid as margin."""
    for which, key in zip(("x", "y"), keys, strict=False):
        values = points[key].to_numpy()
        ax.set(**{f"{which}scale": "log", f"{which}lim": (values.min() / _MARGIN, values.max() * _MARGIN)})
        style.log_axis(ax, "x" if which == "x" else "y")


def _curve(ax: Axes, points: pl.DataFrame, optima: pl.DataFrame, key: str) -> None:
    known = points.filter(pl.col("loss_nats").is_not_null()).sort(key)
    ax.plot(known[key], known["loss_nats"], marker="o", ms=3.5, color=style.INK, lw=0.9)
    best = known.sort("loss_nats").head(1)
    ax.plot(best[key], best["loss_nats"], **_ring())
    ax.plot(optima["optimum"], best["loss_nats"], **_star())


def _map(
    ax: Axes, points: pl.DataFrame, optima: pl.DataFrame, width: int, keys: list[str], colours: ScalarMappable
) -> None:
    """Draw the points coloured by loss, the best one ringed, and the path of the optimum up to this width."""
    first, second = keys[:2]
    known = points.filter(pl.col("loss_nats").is_not_null())
    excess = (known["loss_nats"] - known["loss_nats"].min()).to_numpy()
    shown = colours.to_rgba(np.clip(excess, _LEAST_EXCESS, _MOST_EXCESS))
    ax.scatter(known[first], known[second], c=shown, s=60.0, marker="s")
    lost = points.filter(pl.col("loss_nats").is_null())
    ax.scatter(lost[first], lost[second], color=style.MUTED, s=20.0, marker="x")
    best = known.sort("loss_nats").head(1)
    ax.plot(best[first], best[second], **_ring())
    path = optima.filter(pl.col("width") <= width)
    x, y = (path.filter(hyperparameter=key)["optimum"] for key in (first, second))
    ax.plot(x, y, color=style.MUTED, lw=0.9)
    ax.plot(x[-1:], y[-1:], **_star())


def _ring() -> dict[str, Any]:
    return {"ls": "", "marker": "o", "ms": 10.0, "mfc": "none", "mec": style.INK, "mew": 0.8}


def _star() -> dict[str, Any]:
    return {"ls": "", "marker": "*", "ms": 9.0, "color": style.INK, "mec": "white", "mew": 0.5}


def _name(key: str) -> str:
    return _NAMES.get(key, key.removeprefix("optimizer."))
