"""Figures from estimates of one model: frames in, a matplotlib Figure out; nothing is fitted here.

An estimate that is missing is said in words, in its panel or instead of the figure. Legends list what is drawn, and
nothing else.
"""

import math
from collections.abc import Callable
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis import format as fmt
from analysis.estimate import Estimates, headline_target
from analysis.page import figure_style as style
from analysis.page import panels
from analysis.page.figure_style import OptimizerStyle, OrderedStyle
from analysis.quantities.targets import curves

FITTED_DEFINITION = "emin_over_smin"

_QUANTITY_LABELS = {"tokens_to_target": "Tokens to target", "steps_to_target": "Optimizer steps to target"}
_COST_LABELS = {"device_seconds": "Device-seconds to target", "train_flops": "Training FLOPs to target"}
_ON_FRONTIER = {"device_seconds": "on_frontier", "train_flops": "on_flops_frontier"}


def loss_curves(estimates: Estimates) -> Figure:
    """Draw validation loss against tokens at the chosen learning rate, a panel per optimizer, a colour per batch."""
    chosen = _chosen_curves(estimates)
    if chosen.is_empty():
        return style.in_words("No run has been evaluated after its first step yet.")
    with style.theme():
        optimizers, batches = _optimizers(estimates), OrderedStyle(_values(chosen, "global_batch_tokens"))
        figure, axes = style.panels(len(optimizers.names))
        for ax, name in zip(axes, optimizers.names, strict=True):
            own = chosen.filter(pl.col("optimizer") == name)
            panels.loss_curves(ax, own, batches) if own.height else style.empty_panel(ax, "no run yet")
            style.heading(ax, fmt.optimizer_name(name))
            ax.set(xlabel="Training tokens", ylabel="")
        axes[0].set_ylim(top=_largest_after_warmup(estimates, chosen))
        for ax in axes:
            panels.target_lines(ax, estimates.records.manifest.targets_nats)
        style.y_label(axes, "Validation loss (nats/token)")
        style.log_axis(axes[0], "x")
        handles = batches.handles(fmt.tokens, batches.values)
        cue = style.cue("target losses", color=style.MUTED, ls="-", lw=0.6)
        style.side_legend(figure, [*handles, cue], "Global batch (tokens)")
    return figure


def tokens_to_target(estimates: Estimates) -> Figure:
    """Draw tokens to target against batch: points with intervals, fit with band, B_crit; a panel per target."""
    return _to_target(estimates, "tokens_to_target")


def steps_to_target(estimates: Estimates) -> Figure:
    """Draw optimizer steps to target against batch, as `tokens_to_target` does."""
    return _to_target(estimates, "steps_to_target")


def learning_rates(estimates: Estimates) -> Figure:
    """Draw tokens to the headline target against learning rate and, below, each batch's optimum with its interval."""
    target = headline_target(estimates)
    if target is None:
        return style.in_words(_nothing_reached(estimates))
    rates, cells = (frame.filter(pl.col("target_loss_nats") == target) for frame in (estimates.rates, estimates.cells))
    with style.theme():
        optimizers, batches = _optimizers(estimates), OrderedStyle(_values(rates, "global_batch_tokens"))
        figure, pairs = style.panels_with_strips(len(optimizers.names))
        for (upper, lower), name in zip(pairs, optimizers.names, strict=True):
            own_rates, own_cells = (frame.filter(pl.col("optimizer") == name) for frame in (rates, cells))
            panels.rate_curves(upper, own_rates, batches)
            panels.chosen_rates(upper, own_cells, own_rates)
            panels.optima(lower, own_cells, batches)
            style.heading(upper, f"{fmt.optimizer_name(name)}, target {fmt.loss(target)} nats/token")
            style.log_axis(lower, "x")
            lower.set(xlabel="Peak learning rate")
        uppers, lowers = zip(*pairs, strict=True)
        style.log_axis(uppers[0], "y", headroom=panels.HEADROOM)
        style.y_label(uppers, "Tokens to target")
        style.y_label(lowers, "Batch (tokens)")
        handles = [*batches.handles(fmt.tokens, batches.values), *_rate_cues(rates, cells)]
        style.side_legend(figure, handles, "Global batch (tokens)")
    return figure


def token_ratios(estimates: Estimates) -> Figure:
    """Draw the token ratio of baseline to challenger against batch, a panel per challenger, a colour per target."""
    drawn = estimates.token_ratios.filter(pl.col("token_ratio").is_not_null())
    if drawn.is_empty():
        return style.in_words(
            "No token ratio: at no batch size did the baseline and another optimizer reach the same target."
        )
    with style.theme():
        targets = OrderedStyle(_targets(estimates))
        challengers = [name for name in _optimizers(estimates).names if name in drawn["challenger"]]
        baseline = fmt.optimizer_name(drawn["baseline"][0])
        figure, axes = style.panels(len(challengers), note_lines=len(targets.values))
        for ax, name in zip(axes, challengers, strict=True):
            panels.ratios(ax, drawn.filter(pl.col("challenger") == name), targets)
            notes = [_trend_note(estimates, name, target) for target in targets.values]
            style.heading(ax, f"{baseline} over {fmt.optimizer_name(name)}", notes)
            style.batch_axis(ax, _values(estimates.cells, "global_batch_tokens"))
        style.y_label(axes, "Token ratio at equal loss")
        cues = _occurring(
            (_interval_cue(estimates), _any_interval(drawn, "token_ratio")),
            (_caveat_cue(), _any_caveat(drawn)),
        )
        handles = [*targets.handles(fmt.loss, _values(drawn, "target_loss_nats")), *cues]
        style.side_legend(figure, handles, "Target (nats/token)")
    return figure


def frontier_device_seconds(estimates: Estimates) -> Figure:
    """Draw device-seconds against time to target over device counts, a panel per target, a line per frontier."""
    return _frontier(estimates, "device_seconds")


def frontier_flops(estimates: Estimates) -> Figure:
    """Draw training FLOPs against time to target over device counts, a panel per target, a line per frontier."""
    return _frontier(estimates, "train_flops")


def equal_budget(estimates: Estimates) -> Figure:
    """Draw validation loss against batch at equal tokens, a panel per token budget, a line per optimizer."""
    budgets = _budgets(estimates.equal_budget)
    if not budgets:
        return style.in_words(_no_budget(estimates))
    with style.theme():
        optimizers = _optimizers(estimates)
        figure, axes = style.panels(len(budgets))
        for ax, budget in zip(axes, budgets, strict=True):
            part = estimates.equal_budget.filter(pl.col("tokens") == budget)
            for name in optimizers.names:
                own = part.filter(pl.col("optimizer") == name).sort("global_batch_tokens")
                panels.points(ax, own, "val_loss_nats", optimizers, name)
                places = own["global_batch_tokens"] * optimizers.dodge(name)
                ax.plot(
                    places, own["val_loss_nats"], color=optimizers.colour(name), ls=optimizers.line_style(name), lw=0.9
                )
            style.heading(ax, f"after {fmt.tokens(budget)} tokens")
            style.batch_axis(ax, _values(estimates.equal_budget, "global_batch_tokens"))
        style.y_label(axes, "Validation loss (nats/token)")
        drawn = estimates.equal_budget.filter(pl.col("tokens").is_in(budgets))
        cues = _occurring((_interval_cue(estimates), _any_interval(drawn, "val_loss_nats")))
        style.side_legend(figure, [*optimizers.handles(_values(drawn, "optimizer")), *cues])
    return figure


def headline(estimates: Estimates) -> Figure:
    """Draw the answer in two panels: tokens to the headline target against batch, and the projected frontier."""
    target = headline_target(estimates)
    if target is None:
        return style.in_words(_nothing_reached(estimates))
    with style.theme():
        optimizers, points = _optimizers(estimates), _frontier_points(estimates, target)
        figure, (left, right) = style.panels(2, share=False, note_lines=len(optimizers.names))
        _draw_target(left, estimates, target, "tokens_to_target", optimizers)
        left.set_ylabel(_QUANTITY_LABELS["tokens_to_target"])
        style.log_axis(left, "y", headroom=panels.HEADROOM)
        _draw_frontier(right, points, "device_seconds", optimizers)
        right.set_ylabel(_COST_LABELS["device_seconds"])
        _frontier_axes(right, "device_seconds", label_room=0.24)
        panels.frontier_ends(right, points, "device_seconds", optimizers)
        notes = _critical_notes(estimates, target)
        style.heading(left, f"Tokens to {fmt.loss(target)} nats/token", notes)
        over = f"to {fmt.loss(target)} nats/token; at the ends: batch × devices"
        style.heading(right, "Projected frontier", [over], lines=len(style.wrapped(notes)))
        cells = estimates.cells.filter(pl.col("target_loss_nats") == target)
        handles = optimizers.handles({*cells["optimizer"], *points["optimizer"]})
        tokens, frontier = _fit_cues(estimates, [target], left), _frontier_cues(points, "device_seconds")
        blocks = [*_block("Tokens", tokens), *_block("Frontier", frontier)]
        style.side_legend(figure, [*handles, *blocks])
    return figure


def _to_target(estimates: Estimates, quantity: str) -> Figure:
    targets = _targets(estimates)
    if not targets:
        return style.in_words("No run has been evaluated after its first step yet.")
    with style.theme():
        optimizers = _optimizers(estimates)
        figure, axes = style.panels(len(targets), note_lines=len(optimizers.names))
        notes = [_critical_notes(estimates, target) for target in targets]
        lines = max(len(style.wrapped(own)) for own in notes)
        for ax, target, own in zip(axes, targets, notes, strict=True):
            _draw_target(ax, estimates, target, quantity, optimizers)
            style.heading(ax, f"target {fmt.loss(target)} nats/token", own, lines)
        style.y_label(axes, _QUANTITY_LABELS[quantity])
        style.log_axis(axes[0], "y", headroom=panels.HEADROOM)
        handles = optimizers.handles(_values(estimates.cells, "optimizer"))
        style.side_legend(figure, [*handles, *_fit_cues(estimates, targets, axes[0])])
    return figure


def _draw_target(ax: Axes, estimates: Estimates, target: float, quantity: str, optimizers: OptimizerStyle) -> None:
    cells, fits, criticals = (
        frame.filter(pl.col("target_loss_nats") == target)
        for frame in (_with_step_intervals(estimates.cells), estimates.fit_curves, _fitted(estimates))
    )
    style.batch_axis(ax, _values(estimates.cells, "global_batch_tokens"))
    for name in optimizers.names:
        own = pl.col("optimizer") == name
        panels.fitted_curve(ax, fits.filter(own), quantity, optimizers, name)
        panels.points(ax, cells.filter(own), quantity, optimizers, name)
        panels.without_tokens(ax, cells.filter(own), optimizers, name)
        for critical in criticals.filter(own).iter_rows(named=True):
            panels.critical_batch(ax, critical, quantity, optimizers.colour(name))
    if cells[quantity].is_null().all():
        unknown = set(cells["verdict"]) & {"reached_at_first_eval", "censored"}
        style.empty_panel(ax, "no tokens to this target\ncan be told" if unknown else "no run reached this target")


def _with_step_intervals(cells: pl.DataFrame) -> pl.DataFrame:
    """Add the intervals of steps: those of tokens over the batch."""
    ends = pl.col("tokens_to_target_low", "tokens_to_target_high") / pl.col("global_batch_tokens")
    return cells.with_columns(ends.name.replace("tokens", "steps"))


def _frontier(estimates: Estimates, cost: str) -> Figure:
    targets = _targets(estimates)
    if estimates.frontier.is_empty():
        return style.in_words(_nothing_reached(estimates))
    with style.theme():
        optimizers = _optimizers(estimates)
        figure, axes = style.panels(len(targets))
        for ax, target in zip(axes, targets, strict=True):
            _draw_frontier(ax, _frontier_points(estimates, target), cost, optimizers)
            style.heading(ax, f"target {fmt.loss(target)} nats/token")
        style.y_label(axes, _COST_LABELS[cost])
        _frontier_axes(axes[0], cost)
        handles = optimizers.handles(_values(estimates.frontier, "optimizer"))
        style.side_legend(figure, [*handles, *_frontier_cues(estimates.frontier, cost)])
    return figure


def _draw_frontier(ax: Axes, points: pl.DataFrame, cost: str, optimizers: OptimizerStyle) -> None:
    ax.set_xlabel("Time to target (s)")
    if points.is_empty():
        style.empty_panel(ax, "no run reached this target")
        return
    panels.frontier(ax, points.with_columns(on_frontier=_ON_FRONTIER[cost]), cost, optimizers)


def _frontier_axes(ax: Axes, cost: str, label_room: float = 0.0) -> None:
    write = "{:g}".format if cost == "device_seconds" else fmt.tick_flops
    style.log_axis(ax, "x", "{:g}".format, footroom=label_room)
    style.log_axis(ax, "y", write, headroom=label_room / 4, footroom=label_room / 2)


def _chosen_curves(estimates: Estimates) -> pl.DataFrame:
    """Return the loss curves, without step 0, of the runs at the rate chosen for the hardest target."""
    cell = ["model", "optimizer", "global_batch_tokens", "protocol"]
    chosen = (
        estimates.cells.drop_nulls("best_lr").sort("target_loss_nats").unique(cell, keep="first", maintain_order=True)
    )
    drawn = curves(estimates.records).filter(pl.col("step") > 0)
    return drawn.join(chosen.select(*cell, peak_lr="best_lr"), on=[*cell, "peak_lr"], how="semi", maintain_order="left")


def _largest_after_warmup(estimates: Estimates, chosen: pl.DataFrame) -> float | None:
    """Return an upper end for the losses: a little above the largest one that follows the largest warmup."""
    warmup = max(estimates.records.runs["warmup_tokens"].drop_nulls(), default=0)
    after = chosen.filter(pl.col("tokens_seen") >= warmup, pl.col("loss_nats").is_finite())
    return None if after.is_empty() else float(after["loss_nats"].max()) * 1.02  # type: ignore[arg-type]


def _critical_notes(estimates: Estimates, target: float) -> list[str]:
    """Return one line an optimizer: its critical batch with its interval, or why there is none."""
    rows = _fitted(estimates).filter(pl.col("target_loss_nats") == target)
    by_optimizer = {row["optimizer"]: row for row in rows.iter_rows(named=True)}
    return [_critical_note(name, by_optimizer.get(name)) for name in _optimizers(estimates).names]


def _critical_note(name: str, row: dict[str, Any] | None) -> str:
    verdict = "not estimated" if row is None else _short_verdict(row)
    if row is None or row["critical_batch_tokens"] is None:
        return f"{fmt.optimizer_name(name)}: no $B_{{crit}}$, {verdict}"
    caveat = "" if verdict == "ok" else f" ({verdict})"
    return f"{fmt.optimizer_name(name)}: $B_{{crit}}$ {fmt.estimate(row, 'critical_batch_tokens')}{caveat}"


def _short_verdict(row: dict[str, Any]) -> str:
    probability = f", p = {row['lack_of_fit_p']:.1g}" if row["verdict"] == "misfit" else ""
    return fmt.short_verdict(row["verdict"]) + probability


def _trend_note(estimates: Estimates, challenger: str, target: float) -> str:
    rows = estimates.ratio_trends.filter(pl.col("challenger") == challenger, pl.col("target_loss_nats") == target)
    if rows.is_empty():
        return f"{fmt.loss(target)}: trend not estimated"
    row = rows.row(0, named=True)
    slope = "" if row["slope"] is None else f", slope {fmt.estimate(row, 'slope')}"
    caveat = " (with caveats)" if row["explanation"] and row["verdict"] in ("rising", "falling") else ""
    return f"{fmt.loss(target)}: {fmt.verdict(row['verdict'])}{slope}{caveat}"


def _budgets(equal_budget: pl.DataFrame) -> list[int]:
    """Return the smallest, the middle and the largest of the token marks that the most cells share.

    Of marks less than a factor of two apart the last one counts: two panels would show the same.
    """
    shared = equal_budget.group_by("tokens").agg(num=pl.struct("optimizer", "global_batch_tokens").n_unique())
    marks = sorted(shared.filter(pl.col("num") == pl.col("num").max())["tokens"])
    marks = [mark for mark, after in zip(marks, [*marks[1:], math.inf], strict=False) if after >= 2 * mark]
    return sorted({marks[0], marks[len(marks) // 2], marks[-1]}) if marks else []


def _no_budget(estimates: Estimates) -> str:
    warmup = max(estimates.records.runs["warmup_tokens"].drop_nulls(), default=0)
    beyond = f" beyond the largest warmup ({fmt.tokens(warmup)} tokens)" if warmup else ""
    return f"No token mark{beyond} that the runs at the chosen learning rates all reached."


def _frontier_points(estimates: Estimates, target: float) -> pl.DataFrame:
    known = pl.col("train_seconds").is_not_null() & pl.col("device_seconds").is_not_null()
    return estimates.frontier.filter(known, pl.col("target_loss_nats") == target)


def _fitted(estimates: Estimates) -> pl.DataFrame:
    return estimates.critical_batches.filter(pl.col("definition") == FITTED_DEFINITION)


def _optimizers(estimates: Estimates) -> OptimizerStyle:
    return OptimizerStyle(_values(estimates.records.runs, "optimizer"))


def _targets(estimates: Estimates) -> list[float]:
    return sorted(estimates.cells["target_loss_nats"].unique(), reverse=True)


def _values(frame: pl.DataFrame, column: str) -> list[Any]:
    return sorted(frame[column].unique())


def _nothing_reached(estimates: Estimates) -> str:
    targets = ", ".join(f"{fmt.loss(target)}" for target in estimates.records.manifest.targets_nats)
    return f"No run has reached a target loss yet (targets: {targets} nats/token)."


def _fit_cues(estimates: Estimates, targets: list[float], ax: Axes) -> list[Any]:
    """Explain what the panels of these targets hold; `ax` is one of them, beyond whose ends no B_crit is drawn."""
    cells, fits, criticals = (
        frame.filter(pl.col("target_loss_nats").is_in(targets))
        for frame in (estimates.cells, estimates.fit_curves, _fitted(estimates))
    )
    on_axis = criticals.filter(pl.col("critical_batch_tokens").is_between(*ax.get_xlim()))
    reached, early = pl.col("tokens_to_target").is_not_null(), pl.col("verdict") == "reached_at_first_eval"
    band = Patch(color=style.MUTED, alpha=0.3, lw=0, label=f"fit, {estimates.level:.0%} interval")
    return _occurring(
        (band, _any_interval(fits, "tokens_to_target")),
        (style.cue("$B_{crit}$, interval", marker="*", ms=10), on_axis.height > 0),
        (_caveat_cue(), _any_caveat(cells.filter(reached)) or _any_caveat(on_axis)),
        (style.cue("not reached by all", marker=panels.UP, ms=8), cells.filter(~reached & ~early).height > 0),
        (_at_once_cue(), cells.filter(early).height > 0),
    )


def _frontier_cues(points: pl.DataFrame, cost: str) -> list[Any]:
    measured, edge = pl.col("kind") == "measured", pl.col(_ON_FRONTIER[cost])
    off = style.cue("off the frontier", marker="o", **panels.OFF_FRONTIER)
    return _occurring(
        (style.cue("measured", marker="o"), points.filter(measured).height > 0),
        (style.cue("projected", marker="o", mfc="white"), points.filter(~measured, edge).height > 0),
        (off, points.filter(~measured, ~edge).height > 0),
    )


def _rate_cues(rates: pl.DataFrame, cells: pl.DataFrame) -> list[Any]:
    marked = cells.filter(pl.col("optimal_lr").is_not_null() | pl.col("best_lr").is_not_null())
    doubtful = marked.filter(pl.col("optimal_lr").is_null() | (pl.col("lr_verdict") != "ok"))
    unknown = rates.filter(pl.col("tokens_to_target").is_null())
    return _occurring(
        (style.cue("a run fell short", marker=panels.UP, ms=8), unknown.filter(~panels.at_once()).height > 0),
        (_at_once_cue(), unknown.filter(panels.at_once()).height > 0),
        (style.cue("fitted quadratic", ls="-"), rates["fitted_tokens"].is_not_null().any()),
        (style.cue("chosen rate", **panels.RING), cells["best_lr"].is_not_null().any()),
        (style.cue("optimum, interval", marker="o", ls="-"), marked.height > 0),
        (_caveat_cue(), doubtful.height > 0),
    )


def _block(heading: str, cues: list[Any]) -> list[Any]:
    """Put a heading over the legend's entries of one panel, if it has any."""
    return [style.legend_heading(heading), *cues] if cues else []


def _occurring(*entries: tuple[Any, bool]) -> list[Any]:
    """Keep the legend's entries of which the figure holds an example."""
    return [entry for entry, occurs in entries if occurs]


def _any_interval(frame: pl.DataFrame, quantity: str) -> bool:
    return frame.filter(pl.any_horizontal(pl.col(f"{quantity}_low", f"{quantity}_high").is_not_null())).height > 0


def _any_caveat(frame: pl.DataFrame) -> bool:
    return frame.filter(pl.col("verdict") != "ok").height > 0


def _at_once_cue() -> Any:
    return style.cue("reached before the\nfirst evaluation", marker=panels.DOWN, ms=8)


def _interval_cue(estimates: Estimates) -> Any:
    return style.cue(f"{estimates.level:.0%} interval", ls="-", lw=1.1)


def _caveat_cue() -> Any:
    return style.cue("with a caveat", marker="o", mfc="white")


#: Every figure of the report, by the name of its files, in the order of reading.
FIGURES: dict[str, Callable[[Estimates], Figure]] = {
    "headline": headline,
    "tokens_to_target": tokens_to_target,
    "steps_to_target": steps_to_target,
    "token_ratios": token_ratios,
    "frontier_device_seconds": frontier_device_seconds,
    "frontier_flops": frontier_flops,
    "loss_curves": loss_curves,
    "learning_rates": learning_rates,
    "equal_budget": equal_budget,
}
