"""Pareto sets of points, and step functions of the least cost within a deadline."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Costs nearer than this, in logs, are equal but for rounding.
_ROUNDING = 1e-9


def undominated(x: Array, y: Array) -> NDArray[np.bool_]:
    """Mark the points that no other beats: as good in both coordinates, better in one. Equal points are all kept.

    One sort, O(n log n): in the order of x and then y, a point is kept if its y is below all before it.
    """
    order, places = np.lexsort((y, x)), np.arange(len(x))
    x, y = x[order], y[order]
    least_before = np.minimum.accumulate(np.concatenate([[np.inf], y]))[:-1]
    first_kept = (y < least_before) | (places == 0)
    last_kept = np.maximum.accumulate(np.where(first_kept, places, 0))
    kept = np.empty(len(x), dtype=bool)
    kept[order] = (x == x[last_kept]) & (y == y[last_kept])
    return kept


class Points(NamedTuple):
    """Points of one frontier in logs [draws, points]; a draw is a set of points by itself."""

    log_seconds: Array
    log_cost: Array


class Comparison(NamedTuple):
    """One number a draw: share of the axis where the second side costs less, mean log cost ratio, ends of the axis."""

    share: Array
    log_ratio: Array
    start: Array
    end: Array


def compare(first: Points, second: Points) -> Comparison:
    """Compare the least cost within each deadline, exactly: between the sorted times of all points nothing changes.

    The axis of log deadlines goes from the shortest that both sides meet to the longest at which either still steps
    down; where these are one, so is the comparison.
    """
    times = np.concatenate([first.log_seconds, second.log_seconds], axis=1)
    order = np.argsort(times, axis=1, kind="stable")
    times = np.take_along_axis(times, order, axis=1)
    absent = [np.full_like(side.log_cost, np.inf) for side in (first, second)]
    ours = _least(np.concatenate([first.log_cost, absent[1]], axis=1), order)
    theirs = _least(np.concatenate([absent[0], second.log_cost], axis=1), order)
    start = np.maximum(first.log_seconds.min(axis=1), second.log_seconds.min(axis=1))
    end = np.maximum(start, np.maximum(_last_step(times, ours), _last_step(times, theirs)))
    widths = np.diff(np.clip(np.column_stack([times, end]), start[:, None], end[:, None]), axis=1)
    widths[end == start, -1] = 1.0
    gain = np.subtract(ours, theirs, out=np.zeros_like(ours), where=widths > 0)
    share, log_ratio = ((widths * part).sum(axis=1) / widths.sum(axis=1) for part in (gain > _ROUNDING, gain))
    return Comparison(share, log_ratio, start, end)


def _least(costs: Array, order: NDArray[np.int64]) -> Array:
    """Return the least cost within each deadline, in the order of time; infinite before the first point."""
    return np.minimum.accumulate(np.take_along_axis(costs, order, axis=1), axis=1)


def _last_step(times: Array, least: Array) -> Array:
    """Return the time at which a step function has come down for good."""
    return np.take_along_axis(times, np.argmax(least <= least[:, -1:], axis=1)[:, None], axis=1)[:, 0]
