"""Sharpness along the update over the validation loss, with the part of it from within layers."""

from typing import Any

import polars as pl
from matplotlib.axes import Axes

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import contents
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OptimizerStyle
from analysis.quantities.chosen_runs import chosen_runs

_WHOLE, _WITHIN = "sharpness", "within_layers"


def sharpness(estimates: Estimates) -> Drawing:
    """Draw sharpness against validation loss, harder losses to the right: a panel per batch, a line per run."""
    runs = chosen_runs(estimates.records.runs, estimates.cells)
    drawn = estimates.sharpness.join(runs, on="run_id", how="semi", maintain_order="left")
    drawn = drawn.filter(pl.col(_WHOLE) > 0, pl.col("val_loss_nats").is_not_null())
    if drawn.is_empty():
        return "No sharpness: no run at a chosen learning rate has measured any."
    with style.theme():
        optimizers, batches = contents.optimizers(estimates), contents.values(drawn, "global_batch_tokens")
        notes = [_notes(estimates, batch) for batch in batches]
        lines = max(len(style.wrapped(own)) for own in notes)
        figure, axes = style.panels(len(batches), note_lines=lines, height_inches=optimizers.panel_height_inches)
        for ax, batch, own in zip(axes, batches, notes, strict=True):
            for name in optimizers.names:
                _lines(ax, drawn.filter(global_batch_tokens=batch, optimizer=name), optimizers, name)
            style.heading(ax, f"batch {fmt.tokens(batch)} tokens", own, lines)
            ax.set(xlabel="Validation loss (nats/token)", ylabel="")
        axes[0].invert_xaxis()
        style.y_label(axes, r"Sharpness $\langle Z, HZ \rangle\, /\, |Z|^2$")
        style.log_axis(axes[0], "y", write="{:g}".format)
        cues = contents.occurring(
            (style.cue("all of it", marker="o", ls="-"), True),
            (style.cue("within layers", ls=":"), drawn.filter(pl.col(_WITHIN) > 0).height > 0),
        )
        handles = optimizers.handles(contents.values(drawn, "optimizer"))
        style.side_legend(figure, [*handles, *cues])
    return figure


def _lines(ax: Axes, own: pl.DataFrame, optimizers: OptimizerStyle, name: str) -> None:
    for run in own.sort("tokens_seen").partition_by("run_id", maintain_order=True):
        look: dict[str, Any] = {"color": optimizers.colour(name), "lw": 1.0}
        ax.plot(run["val_loss_nats"], run[_WHOLE], marker=optimizers.marker(name), ms=3, **look)
        within = run.filter(pl.col(_WITHIN) > 0)
        ax.plot(within["val_loss_nats"], within[_WITHIN], ls=":", **look)


def _notes(estimates: Estimates, batch: int) -> list[str]:
    """Return one line for each challenger: the ratio at the lowest loss that it has in common with the baseline."""
    rows = estimates.sharpness_ratios.filter(global_batch_tokens=batch).sort("val_loss_nats")
    lowest = rows.unique("challenger", keep="first", maintain_order=True)
    return [
        f"{fmt.optimizer_name(row['baseline'])} / {fmt.optimizer_name(row['challenger'])}: "
        f"{fmt.estimate(row, 'sharpness_ratio')} at {row['val_loss_nats']:.3g}"
        for row in lowest.iter_rows(named=True)
    ]
