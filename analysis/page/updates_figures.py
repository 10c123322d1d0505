"""Sizes of updates over training, and the singular values of updates and of the momentum behind them."""

from collections.abc import Mapping
from typing import Any

import polars as pl
from matplotlib.axes import Axes

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import contents
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OrderedStyle
from analysis.quantities.chosen_runs import chosen_runs

_RMS, _NORM = "update_rms", "update_spectral_norm"
#: What is drawn of spectra, by the prefix of its quantities.
_SPECTRA: Mapping[str, Any] = {"update": "-", "momentum": ":"}
_PERCENTILE = r"^(update|momentum)_singular_value_p(\d+)$"


def update_norms(estimates: Estimates) -> Drawing:
    """Draw root mean square and, below, spectral norm of the hidden matrices' updates: a panel per optimizer."""
    drawn = _measured(estimates).filter(pl.col("quantity").is_in([_RMS, _NORM]))
    if drawn.is_empty():
        return "No sizes of updates: no run at a chosen learning rate has measured any."
    with style.theme():
        names = _optimizers(estimates, drawn)
        batches = OrderedStyle(contents.values(drawn, "global_batch_tokens"))
        figure, pairs = style.panels_with_strips(len(names))
        for (upper, lower), name in zip(pairs, names, strict=True):
            own = drawn.filter(optimizer=name)
            for ax, quantity in ((upper, _RMS), (lower, _NORM)):
                _over_tokens(ax, own.filter(quantity=quantity), batches)
            style.heading(upper, fmt.optimizer_name(name))
            lower.set_xlabel("Training tokens")
        style.y_label([upper for upper, _ in pairs], "Update, RMS of a weight")
        style.y_label([lower for _, lower in pairs], "Largest spectral\nnorm of an update")
        for ax in pairs[0]:
            style.log_axis(ax, "y", write="{:g}".format)
        for _, lower in pairs:
            style.log_axis(lower, "x")
        style.side_legend(figure, batches.handles(fmt.tokens, batches.values), "Global batch (tokens)")
    return figure


def spectra(estimates: Estimates) -> Drawing:
    """Draw the singular values of hidden matrices, in order, at the last mark: a panel per optimizer."""
    drawn = _last_spectra(_measured(estimates))
    if drawn.is_empty():
        return "No spectra: no run at a chosen learning rate has measured any."
    with style.theme():
        names = _optimizers(estimates, drawn)
        batches = OrderedStyle(contents.values(drawn, "global_batch_tokens"))
        figure, axes = style.panels(len(names))
        for ax, name in zip(axes, names, strict=True):
            ordered = drawn.filter(optimizer=name).sort("global_batch_tokens", "of", "percent")
            for (batch, of), own in ordered.group_by("global_batch_tokens", "of", maintain_order=True):
                ax.plot(own["percent"], own["value"], color=batches.palette[batch], ls=_SPECTRA[str(of)])
            ax.axhline(1.0, color=style.MUTED, lw=0.6, zorder=0)
            style.heading(ax, fmt.optimizer_name(name))
            ax.set(xlabel="Share of singular values below (%)", ylabel="")
        style.y_label(axes, "Singular value / RMS of all")
        style.log_axis(axes[0], "y", write="{:g}".format)
        lines = [style.cue(of, ls=look) for of, look in _SPECTRA.items() if of in set(drawn["of"])]
        handles = [style.cue(fmt.tokens(batch), color=batches.palette[batch], ls="-") for batch in batches.values]
        style.side_legend(figure, [*handles, *lines], "Global batch (tokens)")
    return figure


def _measured(estimates: Estimates) -> pl.DataFrame:
    """Return what the runs at chosen rates measured of the hidden matrices, where it is a number above zero."""
    runs = chosen_runs(estimates.records.runs, estimates.cells)
    measured = estimates.records.diagnostics.filter(pl.col("value") > 0, group="hidden")
    return measured.join(runs.select("run_id", "optimizer", "global_batch_tokens"), on="run_id", maintain_order="left")


def _optimizers(estimates: Estimates, drawn: pl.DataFrame) -> list[str]:
    return [name for name in contents.optimizers(estimates).names if name in set(drawn["optimizer"])]


def _over_tokens(ax: Axes, own: pl.DataFrame, batches: OrderedStyle) -> None:
    for (batch, _), run in own.sort("tokens_seen").group_by("global_batch_tokens", "run_id", maintain_order=True):
        ax.plot(
            run["tokens_seen"], run["value"], color=batches.palette[batch], marker=batches.markers[batch], ms=3, lw=0.9
        )


def _last_spectra(measured: pl.DataFrame) -> pl.DataFrame:
    """Return the percentiles at the last mark of each run, mean over the runs of a batch."""
    parts = pl.col("quantity").str.extract_groups(_PERCENTILE)
    of_spectra = measured.with_columns(of=parts.struct[0], percent=parts.struct[1].cast(pl.Int64))
    last = of_spectra.drop_nulls("percent").filter(pl.col("step") == pl.col("step").max().over("run_id"))
    keys = ["optimizer", "global_batch_tokens", "of", "percent"]
    return last.group_by(keys).agg(pl.col("value").mean()).sort(keys)
