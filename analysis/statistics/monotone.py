"""A curve through points that never falls, and where it reaches a value."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_HALVINGS = 60


def where_reached(x: Array, y: Array, value: float) -> float:
    """Return the largest x at which the monotone cubic through x, y [n], both ascending, is `value`.

    x ascends strictly, and y[0] <= value <= y[-1].

    Source: F. N. Fritsch and J. Butland, SIAM J. Sci. Stat. Comput. 5 (1984) 300.
    """
    assert y[0] <= value <= y[-1], value
    above = int(np.searchsorted(y, value, side="right"))
    if above == len(y):
        return float(x[-1])
    start, width = x[above - 1], x[above] - x[above - 1]
    slopes = _slopes(x, y)[above - 1 : above + 1] * width
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        reached = _hermite(middle, y[above - 1], y[above], slopes) > value
        low, high = (low, middle) if reached else (middle, high)
    return float(start + width * low)


def _hermite(t: float, first: float, second: float, slopes: Array) -> float:
    """Return the cubic on [0, 1] with these values and slopes at its ends."""
    bend = t * t * (3 - 2 * t)
    return float(first + (second - first) * bend + t * (1 - t) * ((1 - t) * slopes[0] - t * slopes[1]))


def _slopes(x: Array, y: Array) -> Array:
    """Return slopes at the points [n] for which the cubic stays monotone: harmonic means of those on either side."""
    width = np.diff(x)
    chord = np.diff(y) / width
    if len(x) == 2:
        return np.repeat(chord, 2)
    before, after = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    left, right = chord[:-1], chord[1:]
    rises = (left > 0) & (right > 0)
    share = np.where(rises, before * right + after * left, 1.0)
    inner = np.where(rises, (before + after) * left * right / share, 0.0)
    return np.array([_end_slope(width[:2], chord[:2]), *inner, _end_slope(width[:-3:-1], chord[:-3:-1])])


def _end_slope(width: Array, chord: Array) -> float:
    """Return the slope of the parabola through three points at the first, within what keeps the cubic monotone."""
    slope = ((2 * width[0] + width[1]) * chord[0] - width[0] * chord[1]) / (width[0] + width[1])
    return float(np.clip(slope, 0.0, 3 * chord[0]))
