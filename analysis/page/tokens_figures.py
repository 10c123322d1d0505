"""Tokens and steps to a target against batch: cells with intervals, the fit with its band, its critical batch."""

from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import contents, marks
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OptimizerStyle

#: The definition of the curve that is drawn.
FITTED_DEFINITION = "emin_over_smin"
#: Said in place of one note an optimizer where many are drawn.
_ELSEWHERE = "critical batches: in their own figure"
LABELS = {"tokens_to_target": "Tokens to target", "steps_to_target": "Optimizer steps to target"}


def tokens_to_target(estimates: Estimates) -> Drawing:
    """Draw tokens to target against batch: points with intervals, fit with band, B_crit; a panel per target."""
    return _figure(estimates, "tokens_to_target")


def steps_to_target(estimates: Estimates) -> Drawing:
    """Draw optimizer steps to target against batch, as `tokens_to_target` does."""
    return _figure(estimates, "steps_to_target")


def _figure(estimates: Estimates, quantity: str) -> Drawing:
    targets = contents.targets(estimates)
    if not targets or (estimates.cells["verdict"] == "refused").all():
        return contents.nothing_reached(estimates)
    with style.theme():
        optimizers = contents.optimizers(estimates)
        notes = [critical_notes(estimates, target) for target in targets]
        lines = max(len(style.wrapped(own)) for own in notes)
        figure, axes = style.panels(len(targets), note_lines=lines, height_inches=optimizers.panel_height_inches)
        for ax, target, own in zip(axes, targets, notes, strict=True):
            draw(ax, estimates, target, quantity, optimizers)
            style.heading(ax, f"target {fmt.loss(target)} nats/token", own, lines)
        style.y_label(axes, LABELS[quantity])
        style.log_axis(axes[0], "y", headroom=marks.HEADROOM)
        handles = optimizers.handles(contents.values(estimates.cells, "optimizer"))
        style.side_legend(figure, [*handles, *cues(estimates, targets, axes[0])])
    return figure


def draw(ax: Axes, estimates: Estimates, target: float, quantity: str, optimizers: OptimizerStyle) -> None:
    """Draw one target into a panel."""
    cells, fits, criticals = (
        frame.filter(pl.col("target_loss_nats") == target)
        for frame in (_with_step_intervals(estimates.cells), estimates.fit_curves, fitted(estimates))
    )
    style.batch_axis(ax, contents.values(estimates.cells, "global_batch_tokens"))
    for name in optimizers.names:
        own = pl.col("optimizer") == name
        _fitted_curve(ax, fits.filter(own), quantity, optimizers, name)
        marks.points(ax, cells.filter(own), quantity, optimizers, name)
        marks.without_tokens(ax, cells.filter(own), optimizers, name)
        for critical in [] if optimizers.is_crowded else criticals.filter(own).iter_rows(named=True):
            _critical_batch(ax, critical, quantity, optimizers.colour(name))
    if cells[quantity].is_null().all():
        unknown = set(cells["verdict"]) & {"reached_at_first_eval", "censored"}
        style.empty_panel(ax, "no tokens to this target\ncan be told" if unknown else "no run reached this target")


def fitted(estimates: Estimates) -> pl.DataFrame:
    """Return the critical batch of each curve that is drawn: that of errors in log T, where it was fitted."""
    rows = estimates.critical_batches.filter(pl.col("definition") == FITTED_DEFINITION)
    in_log_first = rows.sort(pl.col("residuals") != "log", maintain_order=True)
    return in_log_first.unique(["optimizer", "target_loss_nats"], keep="first", maintain_order=True)


def critical_notes(estimates: Estimates, target: float) -> list[str]:
    """Return one line an optimizer: its critical batch with its interval, or why there is none.

    Of many optimizers the forest plot alone has them.
    """
    optimizers = contents.optimizers(estimates)
    if optimizers.is_crowded:
        return [_ELSEWHERE]
    rows = fitted(estimates).filter(pl.col("target_loss_nats") == target)
    by_optimizer = {row["optimizer"]: row for row in rows.iter_rows(named=True)}
    return [_critical_note(name, by_optimizer.get(name)) for name in optimizers.names]


def cues(estimates: Estimates, targets: list[float], ax: Axes) -> list[Any]:
    """Explain what the panels of these targets hold; `ax` is one of them, beyond whose ends no B_crit is drawn."""
    cells, fits, criticals = (
        frame.filter(pl.col("target_loss_nats").is_in(targets))
        for frame in (estimates.cells, estimates.fit_curves, fitted(estimates))
    )
    shown = not contents.optimizers(estimates).is_crowded
    on_axis = criticals.filter(pl.col("critical_batch_tokens").is_between(*ax.get_xlim()) & shown)
    reached, early = pl.col("tokens_to_target").is_not_null(), pl.col("verdict") == "reached_at_first_eval"
    band = Patch(color=style.MUTED, alpha=0.3, lw=0, label=f"fit, {estimates.level:.0%} interval")
    return contents.occurring(
        (band, shown and contents.any_interval(fits, "tokens_to_target")),
        (style.cue("$B_{crit}$, interval", marker="*", ms=10), on_axis.height > 0),
        (contents.caveat_cue(), contents.any_caveat(cells.filter(reached)) or contents.any_caveat(on_axis)),
        (style.cue("not reached by all", marker=marks.UP, ms=8), cells.filter(~reached & ~early).height > 0),
        (contents.at_once_cue(), cells.filter(early).height > 0),
    )


def _fitted_curve(ax: Axes, curve: pl.DataFrame, quantity: str, optimizers: OptimizerStyle, name: str) -> None:
    """Draw the fitted curve of one optimizer and, unless many are drawn, its band."""
    colour = optimizers.colour(name)
    curve = curve.drop_nulls(quantity).sort("global_batch_tokens")
    ax.plot(curve["global_batch_tokens"], curve[quantity], color=colour, ls=optimizers.line_style(name), zorder=2)
    if optimizers.is_crowded:
        return
    band = curve.drop_nulls([f"{quantity}_low", f"{quantity}_high"])
    ends = band[f"{quantity}_low"], band[f"{quantity}_high"]
    ax.fill_between(band["global_batch_tokens"], *ends, color=colour, alpha=0.15, lw=0, zorder=1)


def _critical_batch(ax: Axes, critical: dict[str, Any], quantity: str, colour: Any) -> None:
    """Mark B_crit on the curve, where twice the least tokens are spent, with its interval, unless it is off the axis.

    There are steps at infinite batch only where α = 1; twice the least tokens take some number of steps at any α.
    """
    size, least = critical["critical_batch_tokens"], critical["t_min_tokens"]
    first, last = ax.get_xlim()
    if size is None or least is None or not first <= size <= last:
        return
    height = 2 * least if quantity == "tokens_to_target" else 2 * least / size
    face = marks.face(critical, colour)
    edge = style.INK if face == colour else colour
    ax.plot(size, height, marker="*", ms=10, color=colour, mfc=face, mec=edge, mew=0.7, zorder=2.7)
    ends = marks.known_ends(critical, "critical_batch_tokens")
    # over the star, which may be wider than the interval
    ax.plot(ends, [height] * len(ends), color=style.INK, lw=1.0, marker="|", ms=7, mew=1.2, zorder=2.8)


def _with_step_intervals(cells: pl.DataFrame) -> pl.DataFrame:
    """Add the intervals of steps: those of tokens over the batch."""
    ends = pl.col("tokens_to_target_low", "tokens_to_target_high") / pl.col("global_batch_tokens")
    return cells.with_columns(ends.name.replace("tokens", "steps"))


def _critical_note(name: str, row: dict[str, Any] | None) -> str:
    verdict = "not estimated" if row is None else _short_verdict(row)
    if row is None or row["critical_batch_tokens"] is None:
        return f"{fmt.optimizer_name(name)}: no $B_{{crit}}$, {verdict}"
    caveat = "" if verdict == "ok" else f" ({verdict})"
    return f"{fmt.optimizer_name(name)}: $B_{{crit}}$ {fmt.estimate(row, 'critical_batch_tokens')}{caveat}"


def _short_verdict(row: dict[str, Any]) -> str:
    known = row["verdict"] == "misfit" and row["lack_of_fit_p"] is not None
    return fmt.short_verdict(row["verdict"]) + (f", p = {row['lack_of_fit_p']:.1g}" if known else "")
