"""Transfer: final loss against learning rate for every width, and the best rate against width."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import format as fmt
from analysis.page import figure_style as style
from analysis.page.coordinates_figure import slope_in_words
from analysis.page.figure_style import OrderedStyle
from analysis.quantities.transfer import SERIES

_KINDS = {"standard": "standard", "mup": "muP"}


def transfer(losses: pl.DataFrame, rates: pl.DataFrame, slopes: pl.DataFrame) -> Figure:
    """Draw a panel per series over a strip of its best rates; tables as of `analysis.quantities.transfer`."""
    series = slopes.select(SERIES).rows()
    several = slopes["global_batch_tokens"].n_unique() > 1
    with style.theme():
        widths = OrderedStyle(losses["width"].unique().sort().to_list())
        figure, pairs = style.panels_with_strips(len(series))
        for (upper, lower), key in zip(pairs, series, strict=True):
            own = dict(zip(SERIES, key, strict=True))
            _curves(upper, losses.filter(**own), widths)
            _optima(lower, rates.filter(**own), widths)
            batch = f", {fmt.tokens(own['global_batch_tokens'])}" * several
            title = f"{fmt.optimizer_name(own['optimizer'])}, {_KINDS[own['parametrization']]}{batch}"
            style.heading(upper, title, [f"slope of the best rate in width {slope_in_words(slopes.filter(**own))}"])
            style.log_axis(lower, "x")
            lower.set(xlabel="Peak learning rate", yscale="log", ylabel="")
            lower.set_yticks(widths.values, [str(width) for width in widths.values], minor=False)
            lower.minorticks_off()
        uppers, lowers = zip(*pairs, strict=True)
        style.y_label(uppers, "Final loss (nats/token)")
        style.y_label(lowers, "Width")
        ring = style.cue("best rate, 90 %", marker="o", mfc="none")
        style.side_legend(figure, [*widths.handles(str, widths.values), ring], "Width")
    return figure


def _curves(ax: Axes, losses: pl.DataFrame, widths: OrderedStyle) -> None:
    means = losses.group_by("width", "peak_lr", maintain_order=True).agg(pl.col("loss_nats").mean())
    for (width,), own in means.filter(pl.col("loss_nats").is_not_null()).group_by("width", maintain_order=True):
        ax.plot(own["peak_lr"], own["loss_nats"], color=widths.palette[width], marker=widths.markers[width], ms=3.5)


def _optima(ax: Axes, rates: pl.DataFrame, widths: OrderedStyle) -> None:
    for row in rates.filter(pl.col("best_lr").is_not_null()).iter_rows(named=True):
        colour, width = widths.palette[row["width"]], row["width"]
        interval = row["verdict"] == "ok"
        if interval:
            ax.plot([row["best_lr_low"], row["best_lr_high"]], [width, width], color=colour)
        ax.plot(row["best_lr"], width, color=colour, marker="o", mfc="none" if interval else colour, ls="")
