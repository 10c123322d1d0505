"""The gradient noise scale over training: a panel for each batch, with the batch itself as a line."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import contents
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OptimizerStyle
from analysis.quantities.chosen_runs import chosen_runs
from analysis.quantities.noise_scales import best_estimates

_NAME = "noise_scale_tokens"


def noise_scales(estimates: Estimates) -> Drawing:
    """Draw the noise scale of the whole gradient against tokens, a line per optimizer at its chosen rate."""
    drawn = _drawn(estimates)
    if drawn.is_empty():
        return "No gradient noise scales: no run at a chosen learning rate has measured any."
    with style.theme():
        optimizers, batches = contents.optimizers(estimates), contents.values(drawn, "global_batch_tokens")
        figure, axes = style.panels(len(batches), height_inches=optimizers.panel_height_inches)
        for ax, batch in zip(axes, batches, strict=True):
            for name in optimizers.names:
                _line(ax, drawn.filter(global_batch_tokens=batch, optimizer=name), optimizers, name)
            ax.axhline(batch, color=style.MUTED, ls="--", lw=0.9, zorder=1)
            style.heading(ax, f"batch {fmt.tokens(batch)} tokens")
            ax.set(xlabel="Training tokens", ylabel="")
        style.y_label(axes, "Gradient noise scale (tokens)")
        axes[0].set_ylim(_range(drawn))
        style.log_axis(axes[0], "x")
        style.log_axis(axes[0], "y")
        band = Patch(color=style.MUTED, alpha=0.3, lw=0, label=f"{estimates.level:.0%} interval")
        with_band = drawn.drop_nulls(f"{_NAME}_low").height > 0 and not optimizers.is_crowded
        cues = contents.occurring(
            (style.cue("the batch itself", color=style.MUTED, ls="--", lw=0.9), True), (band, with_band)
        )
        style.side_legend(figure, [*optimizers.handles(contents.values(drawn, "optimizer")), *cues])
    return figure


def _drawn(estimates: Estimates) -> pl.DataFrame:
    runs = chosen_runs(estimates.records.runs, estimates.cells)
    setting = ["model", "optimizer", "protocol", "global_batch_tokens", "peak_lr", "tuning"]
    scales = best_estimates(estimates.noise_scales).filter(pl.col(_NAME).is_not_null())
    return scales.join(runs, on=setting, how="semi", nulls_equal=True, maintain_order="left")


def _range(drawn: pl.DataFrame) -> tuple[float, float]:
    """Return the ends of the axis: of the estimates and the batches, not of intervals that go far beyond."""
    values = [*drawn[_NAME], *drawn["global_batch_tokens"].unique()]
    return min(values) / 2, max(values) * 2


def _line(ax: Axes, own: pl.DataFrame, optimizers: OptimizerStyle, name: str) -> None:
    """Draw one optimizer's estimates with their intervals; where one has no end, its band goes to the panel's edge."""
    look = {"color": optimizers.colour(name), "ls": optimizers.line_style(name), "marker": optimizers.marker(name)}
    ax.plot(own["tokens_seen"], own[_NAME], ms=3, **look)
    if optimizers.is_crowded:
        return
    known = own.filter(pl.any_horizontal(pl.col(f"{_NAME}_low", f"{_NAME}_high").is_not_null()))
    low, high = known[f"{_NAME}_low"].fill_null(1e-9), known[f"{_NAME}_high"].fill_null(1e18)
    ax.fill_between(known["tokens_seen"], low, high, color=optimizers.colour(name), alpha=0.15, lw=0, zorder=1)
