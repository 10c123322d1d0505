"""Token ratios: over the batch, over the target loss, and under rules of learning rate with batch."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import polars as pl
from matplotlib.axes import Axes

from analysis import format as fmt
from analysis.estimate import Estimates, headline_target
from analysis.page import contents, marks
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OrderedStyle

_LABEL = "Token ratio at equal loss"
_NO_RATIO = "No token ratio: at no batch size did the baseline and another optimizer reach the same target."
_RULES = {"tuned": "each batch at its\nbest rate", "square_root": "rate ∝ √batch", "fixed": "one rate"}


def token_ratios(estimates: Estimates) -> Drawing:
    """Draw the token ratio of baseline to challenger against batch, a panel per challenger, a colour per target."""
    drawn = _known(estimates.token_ratios)
    if drawn.is_empty():
        return _NO_RATIO
    with style.theme():
        targets, challengers = OrderedStyle(contents.targets(estimates)), _challengers(estimates, drawn)
        notes = {name: [_trend_note(estimates, name, target) for target in targets.values] for name in challengers}
        lines = max(len(style.wrapped(own)) for own in notes.values())
        figure, axes = style.panels(len(challengers), note_lines=lines)
        for ax, name in zip(axes, challengers, strict=True):
            own = drawn.filter(pl.col("challenger") == name)
            _lines_over_batch(ax, own, "target_loss_nats", targets)
            style.heading(ax, _pair_name(own), notes[name], lines)
            style.batch_axis(ax, contents.values(estimates.cells, "global_batch_tokens"))
        style.y_label(axes, _LABEL)
        handles = targets.handles(fmt.loss, contents.values(drawn, "target_loss_nats"))
        style.side_legend(figure, [*handles, *_cues(estimates, drawn)], "Target (nats/token)")
    return figure


def token_ratio_by_target(estimates: Estimates) -> Drawing:
    """Draw the token ratio against the target loss, a panel per challenger, a colour per batch."""
    drawn = _known(estimates.token_ratios)
    targets = contents.values(drawn, "target_loss_nats")
    if len(targets) < 2:
        return "No token ratio over the target loss: it takes ratios at two targets or more."
    with style.theme():
        batches = OrderedStyle(contents.values(drawn, "global_batch_tokens"))
        challengers = _challengers(estimates, drawn)
        figure, axes = style.panels(len(challengers))
        step = min(after - before for before, after in pairwise(targets))
        aside = min(0.12 * step, 0.5 * step / len(batches.values))
        for ax, name in zip(axes, challengers, strict=True):
            own = drawn.filter(pl.col("challenger") == name)
            _equal_tokens(ax, own)
            for place, size in enumerate(batches.values):
                rows = own.filter(pl.col("global_batch_tokens") == size).sort("target_loss_nats")
                shift = aside * (place - (len(batches.values) - 1) / 2)
                places = [target - shift for target in rows["target_loss_nats"]]
                _line(ax, places, rows, batches.palette[size], batches.markers[size])
            style.heading(ax, _pair_name(own))
        for ax in axes:
            _target_axis(ax, targets)
        style.y_label(axes, _LABEL)
        handles = batches.handles(fmt.tokens, batches.values)
        style.side_legend(figure, [*handles, *_cues(estimates, drawn)], "Global batch (tokens)")
    return figure


def rate_rules(estimates: Estimates) -> Drawing:
    """Draw the token ratio against batch under each rule of learning rate, to the headline target."""
    target = headline_target(estimates)
    if target is None:
        return contents.nothing_reached(estimates)
    drawn = _known(estimates.rate_rules).filter(pl.col("target_loss_nats") == target)
    if drawn.is_empty():
        return "No token ratio under rules of learning rate: it takes three rates or more at each batch."
    with style.theme():
        rules = OrderedStyle([rule for rule in _RULES if rule in set(drawn["rule"])])
        challengers = _challengers(estimates, drawn)
        figure, axes = style.panels(len(challengers))
        for ax, name in zip(axes, challengers, strict=True):
            own = drawn.filter(pl.col("challenger") == name)
            _lines_over_batch(ax, own, "rule", rules)
            style.heading(ax, f"{_pair_name(own)}, target {fmt.loss(target)} nats/token")
            style.batch_axis(ax, contents.values(estimates.cells, "global_batch_tokens"))
        style.y_label(axes, _LABEL)
        style.side_legend(figure, [*rules.handles(_RULES.__getitem__, rules.values), *_cues(estimates, drawn)], "Rule")
    return figure


def _known(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("token_ratio").is_not_null())


def _challengers(estimates: Estimates, drawn: pl.DataFrame) -> list[str]:
    present = set(drawn["challenger"])
    return [name for name in contents.optimizers(estimates).names if name in present]


def _pair_name(own: pl.DataFrame) -> str:
    return f"{fmt.optimizer_name(own['baseline'][0])} over {fmt.optimizer_name(own['challenger'][0])}"


def _lines_over_batch(ax: Axes, frame: pl.DataFrame, kind: str, look: OrderedStyle) -> None:
    """Draw ratios against batch, a line for each value of `kind`, side by side, and the line of equal tokens."""
    _equal_tokens(ax, frame)
    for place, value in enumerate(look.values):
        rows = frame.filter(pl.col(kind) == value).sort("global_batch_tokens")
        aside = style.dodge(place, len(look.values), octaves=0.12 * _octaves_apart(frame["global_batch_tokens"]))
        _line(ax, rows["global_batch_tokens"] * aside, rows, look.palette[value], look.markers[value])


def _line(ax: Axes, places: Sequence[float] | pl.Series, rows: pl.DataFrame, colour: Any, marker: str) -> None:
    ax.plot(places, rows["token_ratio"], color=colour, lw=0.9, zorder=2)
    for x, row in zip(places, rows.iter_rows(named=True), strict=True):
        marks.estimate(ax, x, row, "token_ratio", colour, marker)


def _equal_tokens(ax: Axes, frame: pl.DataFrame) -> None:
    """Draw the line at 1 and name it on its side without points or, where both have some, outside of the panel."""
    ax.axhline(1.0, color=style.INK, lw=0.8, zorder=1)
    low, high = (frame.select(pl.coalesce(f"token_ratio{end}", "token_ratio")).to_series() for end in ("_low", "_high"))
    free_below, free_above = (low > 1).all(), (high < 1).all()
    if free_below or free_above:
        text, x, across = "equal tokens", 0.99, "right"
        shift, up = (-2, "top") if free_below else (2, "bottom")
        ax.margins(y=0.1)  # room for the words
    else:
        text, x, across = "equal\ntokens", 1.01, "left"
        shift, up = 0, "center"
    ax.annotate(
        text,
        (x, 1.0),
        (0, shift),
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
        ha=across,
        va=up,
        color=style.INK,
        fontsize="x-small",
    )


def _target_axis(ax: Axes, targets: Sequence[float]) -> None:
    """Set up the axis of target losses: harder targets at the right, a tick at each, labels where they have room."""
    room = (targets[-1] - targets[0]) / 8
    labels: list[str] = []
    last = -math.inf
    for target in targets:
        labels.append(fmt.loss(target) if target - last >= room else "")
        last = target if labels[-1] else last
    ax.set_xticks(targets, labels)
    margin = max(0.12 * (targets[-1] - targets[0]), 0.4 * min(after - before for before, after in pairwise(targets)))
    ax.set_xlim(targets[-1] + margin, targets[0] - margin)
    ax.set_xlabel("Target loss (nats/token)")


def _octaves_apart(batches: pl.Series) -> float:
    """Return the smallest distance between two of the batch sizes, in octaves; 2 where there is only one."""
    sizes = sorted(batches.unique())
    return min((math.log2(larger / smaller) for smaller, larger in pairwise(sizes)), default=2.0)


def _trend_note(estimates: Estimates, challenger: str, target: float) -> str:
    rows = estimates.ratio_trends.filter(pl.col("challenger") == challenger, pl.col("target_loss_nats") == target)
    if rows.is_empty():
        return f"{fmt.loss(target)}: trend not estimated"
    row = rows.row(0, named=True)
    slope = "" if row["slope"] is None else f", slope {fmt.estimate(row, 'slope')}"
    caveat = " (with caveats)" if row["explanation"] and row["verdict"] in ("rising", "falling") else ""
    return f"{fmt.loss(target)}: {fmt.verdict(row['verdict'])}{slope}{caveat}"


def _cues(estimates: Estimates, drawn: pl.DataFrame) -> list[Any]:
    return contents.occurring(
        (contents.interval_cue(estimates), contents.any_interval(drawn, "token_ratio")),
        (contents.caveat_cue(), contents.any_caveat(drawn)),
    )
