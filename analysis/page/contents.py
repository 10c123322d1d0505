"""What the figures of one model and protocol have in common: optimizers, targets, legend entries, words for nothing."""

from typing import Any

import polars as pl
from matplotlib.figure import Figure

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import figure_style as style
from analysis.page import marks
from analysis.page.figure_style import OptimizerStyle

#: A figure, or in words why there is nothing to draw.
Drawing = Figure | str


def optimizers(estimates: Estimates) -> OptimizerStyle:
    frames = (estimates.records.runs, estimates.targets, estimates.cells)
    return OptimizerStyle(sorted({name for frame in frames for name in frame["optimizer"].unique()}))


def targets(estimates: Estimates) -> list[float]:
    """Return the target losses, the easiest first."""
    return sorted(estimates.cells["target_loss_nats"].unique(), reverse=True)


def values(frame: pl.DataFrame, column: str) -> list[Any]:
    return sorted(frame[column].drop_nulls().unique())


def nothing_reached(estimates: Estimates) -> str:
    """Say which targets no run has reached, or why none can be told: words instead of a figure."""
    refused = estimates.cells.filter(verdict="refused")["explanation"].unique(maintain_order=True).to_list()
    if refused and (estimates.cells["verdict"] == "refused").all():
        return " ".join(f"{why[0].upper()}{why[1:]}." for why in refused)
    asked = fmt.listed([fmt.loss(target) for target in estimates.records.manifest.targets_nats])
    if not asked:
        return "No target loss has been asked for."
    return f"No run has reached a target loss yet (targets: {asked} nats/token)."


def occurring(*entries: tuple[Any, bool]) -> list[Any]:
    """Keep the legend's entries of which the figure holds an example."""
    return [entry for entry, occurs in entries if occurs]


def any_interval(frame: pl.DataFrame, quantity: str) -> bool:
    return frame.filter(pl.any_horizontal(pl.col(f"{quantity}_low", f"{quantity}_high").is_not_null())).height > 0


def any_caveat(frame: pl.DataFrame) -> bool:
    return frame.filter(pl.col("verdict") != "ok").height > 0


def interval_cue(estimates: Estimates, *, upright: bool = True) -> Any:
    look = {"marker": "|", "ms": 11} if upright else {"ls": "-", "lw": 1.1}
    return style.cue(f"{estimates.level:.0%} interval", **look)


def caveat_cue() -> Any:
    return style.cue("with a caveat", marker="o", mfc="white")


def at_once_cue() -> Any:
    return style.cue("reached before the\nfirst evaluation", marker=marks.DOWN, ms=8)
