"""Forest plots: all optimizers beside the baseline, critical batches by definition, and the token ratio taken apart;
words where there is no number.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis import format as fmt
from analysis.estimate import Estimates, headline_target
from analysis.page import contents, marks
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OrderedStyle

_FIRST_DEFINITIONS = (
    "emin_over_smin", "free_exponent", "overhead_20pct", "token_optimal", "token_optimal_5pct", "piecewise_kink",
)  # fmt: skip
_PARTS = {
    "ratio_small_batch": "at small batch, $R_0$",
    "ratio_large_batch": "at large batch, $R_\\infty$",
    "critical_batch_ratio": "$R_\\infty / R_0$, the ratio\nof critical batches",
    "critical_batch_ratio_equal_tokens": "the same at equal\ntokens",
}
#: With fewer challengers the figure of token ratios shows all that standings would.
_FEWEST_IN_STANDINGS = 3
_MARK_INCHES, _LABEL_INCHES = 0.17, 1.2
#: How far beyond the numbers an axis follows their intervals.
_REACH = 8.0


class _Series(NamedTuple):
    """What one colour and marker stand for: its rows, by the label of the line that they belong to."""

    name: str
    colour: Any
    marker: str
    rows: Mapping[str, Mapping[str, Any]]


def standings(estimates: Estimates) -> Drawing:
    """Draw the ratio of every challenger at the headline target, a panel per batch, ordered by the largest batch."""
    target = headline_target(estimates)
    if target is None:
        return contents.nothing_reached(estimates)
    ratios = estimates.token_ratios.filter(pl.col("target_loss_nats") == target)
    if ratios["challenger"].n_unique() < _FEWEST_IN_STANDINGS:
        return "No standings: fewer than three optimizers beside the baseline; their token ratios have a figure."
    if ratios["token_ratio"].is_null().all():
        return "No standings: at no batch did the baseline and another optimizer reach the target."
    names, batches = _ordered(ratios), contents.values(ratios, "global_batch_tokens")
    frame = ratios.with_columns(label=pl.col("challenger").map_elements(fmt.optimizer_name, return_dtype=pl.String))
    with style.theme():
        figure, axes = _panels(len(batches), [fmt.optimizer_name(name) for name in names], marks_per_line=1)
        _ratio_scale(axes, _range(frame, "token_ratio", [1.0]))
        for ax, batch in zip(axes, batches, strict=True):
            ax.axvline(1.0, color=style.INK, lw=0.8, zorder=1)
            for row in frame.filter(pl.col("global_batch_tokens") == batch).iter_rows(named=True):
                looks = _Series("", style.INK if _is_resolved(row, estimates) else style.MUTED, "o", {})
                _estimate(ax, -names.index(row["challenger"]), row, "token_ratio", looks)
            style.heading(ax, f"{fmt.tokens(batch)} tokens, target {fmt.loss(target)}")
            ax.set_xlabel(f"Tokens of {fmt.optimizer_name(ratios['baseline'][0])} over its own")
        handles = [
            style.cue(f"differs from 1 at {estimates.level:.0%},\nall tests together", marker="o"),
            style.cue("not resolved", marker="o", color=style.MUTED),
        ]
        style.side_legend(figure, [*handles, *_cues(estimates, frame, "token_ratio")])
    return figure


def _ordered(ratios: pl.DataFrame) -> list[str]:
    """Return the challengers: the one that saves most at the largest batch first, those without a ratio there last."""
    largest = ratios.filter(pl.col("global_batch_tokens") == pl.col("global_batch_tokens").max())
    ordered = largest.sort("token_ratio", "challenger", descending=[True, False], nulls_last=True)["challenger"]
    return list(dict.fromkeys([*ordered, *ratios["challenger"]]))


def _is_resolved(row: Mapping[str, Any], estimates: Estimates) -> bool:
    return row["p_value_holm"] is not None and row["p_value_holm"] < 1 - estimates.level


def _ratio_scale(axes: Sequence[Axes], ends: tuple[float, float]) -> None:
    axes[0].set(xscale="log", xlim=ends)
    axes[0].xaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    axes[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0].xaxis.set_minor_locator(NullLocator())


def critical_batches(estimates: Estimates) -> Drawing:
    """Draw the critical batch by every definition, a panel per target, a line per definition, a mark per optimizer."""
    frame = _with_definition_labels(estimates.critical_batches.drop_nulls("target_loss_nats"))
    if frame["critical_batch_tokens"].is_null().all():
        return "No critical batch is identified by any definition."
    labels, targets = _definition_labels(frame), sorted(frame["target_loss_nats"].unique(), reverse=True)
    with style.theme():
        optimizers = contents.optimizers(estimates)
        names = [name for name in optimizers.names if name in set(frame["optimizer"])]
        figure, axes = _panels(len(targets), labels, len(names))
        batches = contents.values(estimates.cells, "global_batch_tokens")
        _batch_scale(axes, _range(frame, "critical_batch_tokens", batches))
        for ax, target in zip(axes, targets, strict=True):
            own = frame.filter(pl.col("target_loss_nats") == target)
            ax.axvspan(batches[0], batches[-1], color=style.MUTED, alpha=0.1, lw=0)
            looks = {name: (optimizers.colour(name), optimizers.marker(name)) for name in names}
            _forest(ax, labels, _series(own, "optimizer", looks), "critical_batch_tokens")
            style.heading(ax, f"target {fmt.loss(target)} nats/token")
        tried = Patch(color=style.MUTED, alpha=0.2, lw=0, label="batches that were run")
        handles = [
            *style.without_lines(optimizers.handles(names)),
            tried,
            *_cues(estimates, frame, "critical_batch_tokens"),
        ]
        style.side_legend(figure, handles)
    return figure


def ratio_decomposition(estimates: Estimates) -> Drawing:
    """Draw the token ratio taken apart, a panel per challenger, a line per part, a mark per target."""
    frame = estimates.ratio_decomposition.filter(pl.col("quantity").is_in(list(_PARTS)))
    frame, labels = frame.with_columns(label=pl.col("quantity").replace(_PARTS)), _parts_in(frame)
    if frame["value"].is_null().all():
        return "No decomposition of the token ratio: no curve was fitted to both optimizers of a pair."
    with style.theme():
        targets = OrderedStyle(sorted(frame["target_loss_nats"].unique(), reverse=True))
        challengers = [name for name in contents.optimizers(estimates).names if name in set(frame["challenger"])]
        figure, axes = _panels(len(challengers), labels, len(targets.values))
        _ratio_scale(axes, _range(frame, "value", [1.0]))
        for ax, name in zip(axes, challengers, strict=True):
            own = frame.filter(pl.col("challenger") == name)
            ax.axvline(1.0, color=style.INK, lw=0.8, zorder=1)
            looks = {target: (targets.palette[target], targets.markers[target]) for target in targets.values}
            _forest(ax, labels, _series(own, "target_loss_nats", looks), "value")
            style.heading(ax, f"{fmt.optimizer_name(own['baseline'][0])} over {fmt.optimizer_name(name)}")
            ax.set_xlabel("Ratio")
        handles = style.without_lines(targets.handles(fmt.loss, targets.values))
        style.side_legend(figure, [*handles, *_cues(estimates, frame, "value")], "Target (nats/token)")
    return figure


def _parts_in(frame: pl.DataFrame) -> list[str]:
    present = set(frame["quantity"])
    return [label for quantity, label in _PARTS.items() if quantity in present]


def _with_definition_labels(criticals: pl.DataFrame) -> pl.DataFrame:
    """Name each line of the forest: the definition, and the errors of its fit where a definition has several."""
    several = pl.col("residuals").n_unique().over("definition") > 1
    told = pl.format("{}\n({})", "definition", "residuals")
    return criticals.with_columns(label=pl.when(several).then(told).otherwise("definition"))


def _definition_labels(frame: pl.DataFrame) -> list[str]:
    places = {name: place for place, name in enumerate(_FIRST_DEFINITIONS)}
    found = frame.select("definition", "residuals", "label").unique().rows()
    ordered = sorted(found, key=lambda row: (places.get(row[0], len(places)), row[0], row[1] != "log", row[1]))
    return list(dict.fromkeys(label for *_, label in ordered))


def _series(frame: pl.DataFrame, column: str, looks: Mapping[Any, tuple[Any, str]]) -> list[_Series]:
    write = fmt.column_writer(column)
    parts = {value: frame.filter(pl.col(column) == value) for value in looks}
    return [
        _Series(write(value), *look, {row["label"]: row for row in parts[value].iter_rows(named=True)})
        for value, look in looks.items()
    ]


def _panels(number: int, labels: Sequence[str], marks_per_line: int) -> tuple[Figure, list[Axes]]:
    height = len(labels) * (marks_per_line + 1) * _MARK_INCHES + 0.6
    figure, axes = style.panels(number, height_inches=height, margin_inches=_LABEL_INCHES)
    axes[0].set_yticks([-place for place in range(len(labels))], labels)
    axes[0].set_ylim(-len(labels) + 0.5, 0.5)
    for ax in axes:
        ax.tick_params(axis="y", length=0)
        for place in range(1, len(labels)):
            ax.axhline(0.5 - place, color=style.MUTED, lw=0.3, zorder=0)
    return figure, axes


def _range(frame: pl.DataFrame, quantity: str, also: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the axis: the numbers, and their intervals unless they go far beyond."""
    centres = [*also, *frame[quantity].drop_nulls()]
    ends = [*centres, *frame[f"{quantity}_low"].drop_nulls(), *frame[f"{quantity}_high"].drop_nulls()]
    ends = [end for end in ends if end > 0]
    low, high = max(min(ends), min(centres) / _REACH), min(max(ends), max(centres) * _REACH)
    return low / 1.3, high * 1.3


def _batch_scale(axes: Sequence[Axes], ends: tuple[float, float]) -> None:
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlim(*ends)
    axes[0].xaxis.set_major_locator(LogLocator(2, numticks=7))
    axes[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.tokens(value)))
    axes[0].xaxis.set_minor_locator(NullLocator())
    for ax in axes:
        ax.set_xlabel("Critical batch size (tokens)")


def _forest(ax: Axes, labels: Sequence[str], series: Sequence[_Series], quantity: str) -> None:
    """Draw each series' estimates on their lines, one below the other."""
    for place, own in enumerate(series):
        below = (place - (len(series) - 1) / 2) / (len(series) + 1)
        for line, label in enumerate(labels):
            if label in own.rows:
                _estimate(ax, -line - below, own.rows[label], quantity, own)


def _estimate(ax: Axes, y: float, row: Mapping[str, Any], quantity: str, look: _Series) -> None:
    """Draw one estimate with its interval; an arrow where the axis ends before it, words where there is no number."""
    value, low, high = (row[f"{quantity}{end}"] for end in ("", "_low", "_high"))
    if value is None:
        whose = f"{look.name}: " if look.name else ""
        words = f"{whose}no number, {fmt.short_verdict(row['verdict'])}"
        paper = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0.5}
        place = ax.get_yaxis_transform()
        ax.text(0.02, y, words, transform=place, va="center", color=style.INK, fontsize="x-small", bbox=paper)
        return
    first, last = ax.get_xlim()
    if low is not None or high is not None:
        shown = max(first, first if low is None else low), min(last, last if high is None else high)
        ax.plot(shown, [y, y], color=look.colour, lw=1.1, zorder=2)
        for end, beyond, marker in ((first, low is None or low < first, "<"), (last, high is None or high > last, ">")):
            if beyond:
                ax.plot(end, y, marker=marker, ms=4, color=look.colour, clip_on=False, zorder=2)
    ax.plot(value, y, marker=look.marker, color=look.colour, mfc=marks.face(row, look.colour), zorder=3)


def _cues(estimates: Estimates, frame: pl.DataFrame, quantity: str) -> list[Any]:
    known = frame.filter(pl.col(quantity).is_not_null())
    return contents.occurring(
        (contents.interval_cue(estimates, upright=False), contents.any_interval(known, quantity)),
        (contents.caveat_cue(), contents.any_caveat(known)),
    )
