"""Which cells exist: optimizer and batch, how many runs and seeds each has, and what became of them."""

from itertools import product
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from analysis import format as fmt
from analysis.estimate import Estimates, headline_target
from analysis.page import contents
from analysis.page import figure_style as style
from analysis.page.contents import Drawing

_TILE_INCHES = (0.62, 0.42)
#: What became of the runs of a cell, and the colour that says so beside the words.
_FATES = {
    "all reached it": "#b7d7ea",
    "some fell short": "#f6dfa4",
    "none reached it": "#d9d9d9",
    "all finished": "#b7d7ea",
    "some diverged or\nare unfinished": "#e7a583",
}


def coverage(estimates: Estimates) -> Drawing:
    """Draw a tile for each optimizer and batch: how many of its runs reached the headline target, and its seeds."""
    target = headline_target(estimates)
    if target is None and estimates.targets.height:
        target = contents.values(estimates.targets, "target_loss_nats")[0]
    cells = _cells(estimates, target)
    if not cells:
        return "No runs, so no cells."
    if not any(cell["judged"] for cell in cells.values()):
        target = None  # final losses: a law has the tokens, no run has
    batches = sorted({batch for _, batch in cells})
    names = {name for name, _ in cells}
    optimizers = [name for name in contents.optimizers(estimates).names if name in names]
    with style.theme():
        size = len(batches) * _TILE_INCHES[0] + 1.0, len(optimizers) * _TILE_INCHES[1] + 0.5
        figure, (ax,) = style.panels(1, height_inches=size[1], margin_inches=size[0] - style.PANEL_WIDTH_INCHES)
        for (across, batch), (down, name) in product(enumerate(batches), enumerate(optimizers)):
            _tile(ax, (across, -down), cells.get((name, batch)))
        ax.set(xlim=(-0.5, len(batches) - 0.5), ylim=(0.5 - len(optimizers), 0.5), ylabel="Optimizer")
        ax.set_xticks(range(len(batches)), [fmt.tokens(batch) for batch in batches])
        ax.set_yticks([-place for place in range(len(optimizers))], [fmt.optimizer_name(name) for name in optimizers])
        ax.tick_params(length=0)
        ax.set_xlabel("Global batch size (tokens)")
        ax.spines[:].set_visible(False)
        style.heading(ax, "Runs" if target is None else f"Runs that reached {fmt.loss(target)} nats/token")
        found = {_fate(cell) for cell in cells.values()}
        style.side_legend(figure, [Patch(color=_FATES[fate], lw=0, label=fate) for fate in _FATES if fate in found])
    return figure


def _cells(estimates: Estimates, target: float | None) -> dict[tuple[str, int], dict[str, Any]]:
    """Count the runs of each optimizer and batch: by the headline target or, without one, by how they ended."""
    at_target = estimates.targets.filter(pl.col("target_loss_nats").eq_missing(target))
    runs, status = estimates.records.runs if at_target.is_empty() else at_target, pl.col("status")
    counted = runs.group_by("optimizer", "global_batch_tokens").agg(
        num_runs=pl.len(),
        num_seeds=pl.struct("init_seed", "data_seed").n_unique(),
        num_reached=status.is_in(["reached", "reached_at_first_eval"]).sum(),
        num_failed=status.is_in(["diverged", "running"]).sum(),
        judged=pl.lit(not at_target.is_empty()),
    )
    return {(row["optimizer"], row["global_batch_tokens"]): row for row in counted.iter_rows(named=True)}


def _fate(cell: dict[str, Any]) -> str:
    if cell["num_failed"]:
        return "some diverged or\nare unfinished"
    if not cell["judged"]:
        return "all finished"
    if cell["num_reached"] == cell["num_runs"]:
        return "all reached it"
    return "some fell short" if cell["num_reached"] else "none reached it"


def _tile(ax: Axes, place: tuple[int, int], cell: dict[str, Any] | None) -> None:
    """Draw a cell's tile with its numbers; where nothing was run, a dash."""
    if cell is None:
        ax.text(*place, fmt.MISSING, ha="center", va="center", color=style.MUTED, fontsize="x-small")
        return
    corner = place[0] - 0.47, place[1] - 0.45
    ax.add_patch(Rectangle(corner, 0.94, 0.9, facecolor=_FATES[_fate(cell)], lw=0))
    runs = f"{cell['num_reached']} of {cell['num_runs']}" if cell["judged"] else fmt.count(cell["num_runs"], "run")
    words = f"{runs}\n{fmt.count(cell['num_seeds'], 'seed')}"
    ax.text(*place, words, ha="center", va="center", color=style.INK, fontsize="x-small")
