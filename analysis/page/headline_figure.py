"""The answer in two panels: tokens to the headline target against batch, and the projected frontier."""

from typing import Any

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates, headline_target
from analysis.page import contents, frontier_figures, marks, tokens_figures
from analysis.page import figure_style as style
from analysis.page.contents import Drawing


def headline(estimates: Estimates) -> Drawing:
    """Draw the answer in two panels: tokens to the headline target against batch, and the projected frontier.

    Without any time the first panel stands alone.
    """
    target = headline_target(estimates)
    if target is None:
        return contents.nothing_reached(estimates)
    with style.theme():
        optimizers, points = contents.optimizers(estimates), frontier_figures.points_at(estimates, target)
        notes = tokens_figures.critical_notes(estimates, target)
        lines = len(style.wrapped(notes))
        number, height = 1 if points.is_empty() else 2, optimizers.panel_height_inches
        figure, (left, *right) = style.panels(number, share=False, note_lines=lines, height_inches=height)
        tokens_figures.draw(left, estimates, target, "tokens_to_target", optimizers)
        left.set_ylabel(tokens_figures.LABELS["tokens_to_target"])
        style.log_axis(left, "y", headroom=marks.HEADROOM)
        style.heading(left, f"Tokens to {fmt.loss(target)} nats/token", notes)
        for ax in right:
            frontier_figures.draw(ax, points, "device_seconds", optimizers)
            ax.set_ylabel(frontier_figures.COST_LABELS["device_seconds"])
            frontier_figures.set_axes(ax, "device_seconds", label_room=0.24)
            frontier_figures.name_ends(ax, points, "device_seconds", optimizers)
            over = f"to {fmt.loss(target)} nats/token; at the ends: batch × devices"
            style.heading(ax, "Projected frontier", [over], lines)
        cells = estimates.cells.filter(pl.col("target_loss_nats") == target)
        handles = optimizers.handles({*cells["optimizer"], *points["optimizer"]})
        tokens = tokens_figures.cues(estimates, [target], left)
        frontier = frontier_figures.cues(estimates, points, "device_seconds")
        blocks = [*_block("Tokens", tokens), *_block("Frontier", frontier)] if right else tokens
        style.side_legend(figure, [*handles, *blocks])
    return figure


def _block(heading: str, cues: list[Any]) -> list[Any]:
    """Put a heading over the legend's entries of one panel, if it has any."""
    return [style.legend_heading(heading), *cues] if cues else []
