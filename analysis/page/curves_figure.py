"""Validation loss against tokens: every run at the chosen learning rate, with the targets."""

import math
from collections.abc import Sequence

import polars as pl
import seaborn
from matplotlib.axes import Axes

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import contents
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OrderedStyle
from analysis.quantities.targets import curves


def loss_curves(estimates: Estimates) -> Drawing:
    """Draw validation loss against tokens at the chosen learning rate, a panel per optimizer, a colour per batch."""
    chosen = _chosen_curves(estimates)
    if chosen.is_empty():
        return "No loss curves: no run has been evaluated between its first step and its last."
    with style.theme():
        optimizers = contents.optimizers(estimates)
        batches = OrderedStyle(contents.values(chosen, "global_batch_tokens"))
        figure, axes = style.panels(len(optimizers.names))
        for ax, name in zip(axes, optimizers.names, strict=True):
            own = chosen.filter(pl.col("optimizer") == name)
            _lines(ax, own, batches) if own.height else style.empty_panel(ax, "no run yet")
            style.heading(ax, fmt.optimizer_name(name))
            ax.set(xlabel="Training tokens", ylabel="")
        axes[0].set_ylim(top=_largest_after_warmup(estimates, chosen))
        for ax in axes:
            _target_lines(ax, estimates.records.manifest.targets_nats)
        style.y_label(axes, "Validation loss (nats/token)")
        style.log_axis(axes[0], "x")
        handles = batches.handles(fmt.tokens, batches.values)
        cue = style.cue("target losses", color=style.MUTED, ls="-", lw=0.6)
        style.side_legend(figure, [*handles, cue], "Global batch (tokens)")
    return figure


def _lines(ax: Axes, curves: pl.DataFrame, batches: OrderedStyle) -> None:
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


def _target_lines(ax: Axes, targets: Sequence[float]) -> None:
    """Draw a thin line at each target loss and write its value at the right edge, where neighbours leave room."""
    low, high = ax.get_ylim()
    last = -math.inf
    for target in sorted(targets):
        ax.axhline(target, color=style.MUTED, lw=0.6, zorder=0)
        if low <= target <= high and target - last > (high - low) / 18:
            last = target
            ax.text(
                1.01,
                target,
                fmt.loss(target),
                transform=ax.get_yaxis_transform(),
                va="center_baseline",
                color=style.MUTED,
                fontsize="x-small",
            )


def _chosen_curves(estimates: Estimates) -> pl.DataFrame:
    """Return the loss curves, without step 0, of the runs at the rate chosen for the hardest target.

    Runs that record no rate belong to cells without one.
    """
    cell = ["model", "optimizer", "global_batch_tokens", "protocol"]
    chosen = estimates.cells.sort("target_loss_nats").unique(cell, keep="first", maintain_order=True)
    drawn = curves(estimates.records).filter(pl.col("step") > 0)
    drawn = drawn.filter(pl.len().over("run_id") > 1)
    rates = chosen.select(*cell, peak_lr="best_lr")
    return drawn.join(rates, on=[*cell, "peak_lr"], how="semi", maintain_order="left", nulls_equal=True)


def _largest_after_warmup(estimates: Estimates, chosen: pl.DataFrame) -> float | None:
    """Return an upper end for the losses: a little above the largest one that follows the largest warmup."""
    warmup = max(estimates.records.runs["warmup_tokens"].drop_nulls(), default=0)
    after = chosen.filter(pl.col("tokens_seen") >= warmup, pl.col("loss_nats").is_finite())
    return None if after.is_empty() else float(after["loss_nats"].max()) * 1.02  # type: ignore[arg-type]
