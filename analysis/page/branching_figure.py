"""Critical batches of branches over training: how the batch that costs no loss grows from checkpoint to checkpoint."""

from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import contents, marks
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OptimizerStyle

_QUANTITY = "critical_batch_tokens"
#: Of a batch that is at least so large, in factors of two above its lower end.
_ARROW_OCTAVES = 0.7


def branched_batches(estimates: Estimates) -> Drawing:
    """Draw the critical batch against the tokens of training at which branches start, with its interval."""
    rows = estimates.critical_batches.filter(pl.col("branch_tokens").is_not_null())
    drawn = rows.filter(pl.any_horizontal(pl.col(_QUANTITY, f"{_QUANTITY}_low").is_not_null())).sort("branch_tokens")
    if drawn.is_empty():
        return "No branches at several batch sizes from points of training."
    with style.theme():
        optimizers = contents.optimizers(estimates)
        figure, (ax,) = style.panels(1, height_inches=optimizers.panel_height_inches)
        for name in contents.values(drawn, "optimizer"):
            _draw(ax, drawn.filter(optimizer=name), optimizers, name)
        style.log_axis(ax, "x")
        _batch_axis(ax)
        style.heading(ax, "from checkpoints of training")
        ax.set(xlabel="Tokens of training before the branches", ylabel="Critical batch size (tokens)")
        open_above = drawn[_QUANTITY].is_null()
        cues = contents.occurring(
            (contents.interval_cue(estimates), contents.any_interval(drawn.filter(~open_above), _QUANTITY)),
            (contents.caveat_cue(), contents.any_caveat(drawn.filter(~open_above))),
            (style.cue("no harm at any\nbatch tried", marker=marks.UP, ms=8), bool(open_above.any())),
        )
        style.side_legend(figure, [*optimizers.handles(contents.values(drawn, "optimizer")), *cues])
    return figure


def _batch_axis(ax: Axes) -> None:
    """Set up the log2 axis of batch sizes, over at least a factor of four."""
    low, high = ax.get_ylim()
    ax.set_yscale("log", base=2)
    middle = (low * high) ** 0.5
    ax.set_ylim(min(low, middle / 2) / 1.1, max(high, middle * 2) * 1.1)
    ax.yaxis.set_major_locator(LogLocator(2, numticks=9))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.tokens(value)))
    ax.yaxis.set_minor_locator(NullLocator())


def _draw(ax: Axes, rows: pl.DataFrame, optimizers: OptimizerStyle, name: str) -> None:
    """Draw one optimizer: a line through its numbers, and an arrow up from the lower end where there is none."""
    colour = optimizers.colour(name)
    known = rows.drop_nulls(_QUANTITY)
    ax.plot(known["branch_tokens"], known[_QUANTITY], color=colour, ls=optimizers.line_style(name), zorder=2)
    for row in rows.iter_rows(named=True):
        x = row["branch_tokens"] * optimizers.dodge(name)
        if row[_QUANTITY] is None:
            _arrow(ax, x, row[f"{_QUANTITY}_low"], colour)
        else:
            marks.estimate(ax, x, row, _QUANTITY, colour, optimizers.marker(name))


def _arrow(ax: Axes, x: float, low: float, colour: Any) -> None:
    top = low * 2.0**_ARROW_OCTAVES
    ax.plot([x, x], [low, top], color=colour, lw=1.1, zorder=2.9)
    ax.plot(x, top, color=colour, marker="^", ms=4.0, zorder=2.9)
    ax.plot(x, low, color=colour, marker="_", ms=7.0, zorder=2.9)
