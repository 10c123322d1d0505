"""Coordinate check: sizes of each layer against width, with the slope of the hidden matrices in words."""

from typing import Any

import polars as pl
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import format as fmt
from analysis.page import figure_style as style
from analysis.page.figure_style import OrderedStyle

_LABELS = {
    "activation_rms": "RMS of the activation h",
    "change_rms": "RMS of the change of h",
    "update_rms": "RMS of the update's effect ΔW·x",
}
_KINDS = {"standard": "standard", "mup": "muP"}
_DASHES: dict[str, Any] = {"standard": (2, 1), "mup": ""}


def coordinates(sizes: pl.DataFrame, slopes: pl.DataFrame, size: str) -> Figure:
    """Draw one of the sizes against width: a panel per optimizer, a colour per kind of layer, standard dashed.

    `sizes` and `slopes` as in `analysis.quantities.width_slopes`.
    """
    drawn = sizes.filter(pl.col(size) > 0).with_columns(kind=pl.col("layer").str.replace(r"^blocks\.\d+\.", ""))
    parametrizations = drawn["parametrization"].unique(maintain_order=True).to_list()
    with style.theme():
        kinds = OrderedStyle(drawn["kind"].unique(maintain_order=True).to_list())
        optimizers = drawn["optimizer"].unique(maintain_order=True).to_list()
        figure, axes = style.panels(len(optimizers), note_lines=len(parametrizations))
        for ax, optimizer in zip(axes, optimizers, strict=True):
            _lines(ax, drawn.filter(optimizer=optimizer), size, kinds)
            hidden = slopes.filter(pl.col("layer").is_null(), optimizer=optimizer, role="hidden", size=size)
            notes = [
                f"{_KINDS[each]}: slope of hidden layers {slope_in_words(hidden.filter(parametrization=each))}"
                for each in parametrizations
            ]
            style.heading(ax, _title(optimizer), notes)
            style.batch_axis(ax, drawn["width"].unique().sort().to_list())
            ax.set(xlabel="Width", ylabel="")
        style.log_axis(axes[0], "y")
        style.y_label(axes, _LABELS[size])
        lines = [style.cue(_KINDS[each], ls="-" if each == "mup" else "--", lw=0.9) for each in parametrizations]
        style.side_legend(figure, [*kinds.handles(str, kinds.values), *lines], "Layer")
    return figure


def slope_in_words(slope: pl.DataFrame) -> str:
    """Write a slope of one row, `0.48 [0.46, 0.50]`."""
    value, low, high = slope.select("slope", "slope_low", "slope_high").row(0)
    if value is None:
        return fmt.MISSING
    return f"{value:.2f}" if low is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _lines(ax: Axes, drawn: pl.DataFrame, size: str, kinds: OrderedStyle) -> None:
    seaborn.lineplot(
        data=style.mapping(drawn),
        x="width",
        y=size,
        hue="kind",
        style="parametrization",
        palette=kinds.palette,
        dashes=_DASHES,
        errorbar=None,
        lw=0.9,
        legend=False,
        ax=ax,
    )
    for kind, own in drawn.group_by("kind", maintain_order=True):
        means = own.group_by("parametrization", "width").agg(pl.col(size).mean())
        ax.plot(means["width"], means[size], ls="", marker=kinds.markers[kind[0]], color=kinds.palette[kind[0]], ms=3.5)


def _title(optimizer: str) -> str:
    name, comma, settings = optimizer.partition(",")
    return fmt.optimizer_name(name) + (f" ({settings})" if comma else "")
