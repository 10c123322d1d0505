"""Words beside points in a panel, only where they cover nothing that is drawn."""

from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes

#: A panel's inside, a little smaller than it will be laid out, and the room that a marker takes.
PANEL_POINTS, MARK_POINTS = (180.0, 155.0), 6.0

_CHARACTER_POINTS, _LINE_POINTS = 4.1, 9.0
_STEPS_ALONG_A_LINE = 30

Place = tuple[float, float]
#: Centre and size, in points.
Box = tuple[float, float, float, float]


class FreeLabels:
    """Writes beside points in data coordinates; the axes' limits must be final."""

    def __init__(self, ax: Axes, points: Sequence[Place], lines: Iterable[Sequence[Place]]) -> None:
        """Take the places of all points, and of the lines that join some of them."""
        self._ax = ax
        self._taken: list[Box] = [(*point, MARK_POINTS, MARK_POINTS) for point in self._in_points(points)]
        for line in lines:
            for (x, y), (next_x, next_y) in pairwise(self._in_points(line)):
                along = np.linspace(0, 1, _STEPS_ALONG_A_LINE)
                self._taken += [(x + t * (next_x - x), y + t * (next_y - y), 1.0, 1.0) for t in along]

    def write(self, text: str, place: Place, colour: Any) -> None:
        """Write in the first free place around a point, and take that place; without one, write nothing."""
        (x, y), width = self._in_points([place])[0], _CHARACTER_POINTS * len(text)
        for across, up in product((1, -1, 0), (0, 1, -1)):
            shift = across * (width / 2 + 5), up * (_LINE_POINTS / 2 + (5 if across == 0 else 2))
            box = x + shift[0], y + shift[1], width, _LINE_POINTS
            if (across, up) != (0, 0) and _inside(box) and not any(_overlap(box, other) for other in self._taken):
                self._taken.append(box)
                self._annotate(text, (x, y), shift, colour)
                return

    def _annotate(self, text: str, point: Place, shift: Place, colour: Any) -> None:
        self._ax.annotate(
            text,
            (point[0] / PANEL_POINTS[0], point[1] / PANEL_POINTS[1]),
            shift,
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            va="center",
            color=colour,
            fontsize="x-small",
        )

    def _in_points(self, places: Sequence[Place]) -> list[Place]:
        """Return where places will lie in a panel of PANEL_POINTS, before it is laid out."""
        inside = (self._ax.transScale + self._ax.transLimits).transform(np.array(places, dtype=float).reshape(-1, 2))
        return [(x * PANEL_POINTS[0], y * PANEL_POINTS[1]) for x, y in inside]


def _inside(box: Box) -> bool:
    return all(
        size / 2 <= centre <= room - size / 2 for centre, size, room in zip(box[:2], box[2:], PANEL_POINTS, strict=True)
    )


def _overlap(box: Box, other: Box) -> bool:
    return all(abs(box[axis] - other[axis]) < (box[axis + 2] + other[axis + 2]) / 2 for axis in (0, 1))
