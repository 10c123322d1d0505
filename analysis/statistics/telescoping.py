"""Telescoping sweeps: hyperparameters on a full grid at the base width, on ever smaller ones at each doubling.

Source: arXiv 2505.02222, algorithm 1 and section 3: the points of each of k hyperparameters shrink by 4^(−1/k) a
doubling, so that each level costs about the same; the optimum moves as x*(n) = x* − α/n with the width n (finite-width
error), and is known to a mesh (mesh error).
Choices where the source leaves them open: hyperparameters are in logarithms and keep their spacing; the number of
points is rounded up to an odd one (8 → 5 → 3 → 1, as there); the optimum is that of a quadratic through the points
around the best one; a grid whose optimum is outside grows on that side; a level of one point is put where x* − α/n
says, any other is centred on the last optimum.

Shapes: n points, k hyperparameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from analysis.statistics.intervals import Estimate
from analysis.statistics.surfaces import Array, Surface, fit_surface, num_coefficients
from analysis.statistics.weighted_fit import weighted_fit

#: A quadratic is fitted to the points within so many spacings of the best one, along each hyperparameter: the fewest
#: that leave points to spare. Further out a loss is no quadratic.
WINDOW_SPACINGS = (1, 2, 3)
MIN_SPARE_POINTS = 2
#: A grid grows by no more points than this on a side.
MAX_GROWTH = 3

#: Values of each hyperparameter at one width.
Grid = tuple[Array, ...]
#: Mean losses [n] at one width of points [n, k]: infinite where training diverged, not a number where nobody knows yet.
Losses = Callable[[int, Array], Array]


@dataclass(frozen=True)
class Level:
    """What is known of one width: all its points [n, k] with their losses [n], and the surface through them.

    `edge`: the optimum lies outside, though the grid has grown as far as it may.
    """

    width: int
    grid: Grid
    points: Array
    losses: Array
    surface: Surface | None
    edge: bool = False

    @property
    def optimum(self) -> Array:
        """The surface's optimum inside the grid, else the best point."""
        if self.surface is None:
            return np.asarray(self.points[int(np.argmin(self.losses))])
        ends = np.array([(values[0], values[-1]) for values in self.grid])
        return np.clip(self.surface.optimum, ends[:, 0], ends[:, 1])

    @property
    def mesh_error(self) -> Array:
        """Half a spacing [k]: how far from the best point of the grid the optimum may be, without a surface."""
        return np.array([np.diff(values).min() / 2 if len(values) > 1 else np.nan for values in self.grid])


@dataclass(frozen=True)
class FiniteWidth:
    """x*(n) = limit − alpha/n of one hyperparameter, and its value at the final width."""

    limit: Estimate
    alpha: Estimate
    at_final: Estimate

    def finite_width_error(self, width: int) -> float | None:
        """Return by how much the optimum at a width falls short of its limit."""
        return None if self.alpha.value is None else self.alpha.value / width


@dataclass(frozen=True)
class Telescope:
    """The levels that are complete, and the points [n, k] that are wanted next at `wanted_width`; none at the end."""

    levels: tuple[Level, ...]
    wanted_width: int | None = None
    wanted: Array | None = None


def num_points(base: int, doublings: int, k: int) -> int:
    """Return the points of each of k hyperparameters after so many doublings: odd, at least base · 4^(−doublings/k)."""
    least = math.ceil(base * 4.0 ** (-doublings / k) - 1e-9) if doublings else base
    return least if least % 2 or not doublings else least + 1


def telescope(widths: Sequence[int], base: Grid, losses: Losses, level: float = 0.9) -> Telescope:
    """Go from the base grid through the doubled `widths` as far as losses are known."""
    levels: list[Level] = []
    for place, width in enumerate(widths):
        grid = base if place == 0 else _grid_after(levels, width, base, level)
        earlier = next((each.surface for each in reversed(levels) if each.surface), None)
        found = _complete(width, grid, losses, earlier)
        if isinstance(found, Telescope):
            assert found.wanted is not None
            return Telescope(tuple(levels), found.wanted_width, found.wanted)
        levels.append(found)
    return Telescope(tuple(levels))


def finite_width(levels: Sequence[Level], final_width: int, level: float = 0.9) -> list[FiniteWidth]:
    """Fit x* − α/n to the optima of the levels that have a surface inside their grid, hyperparameter by hyperparameter.

    Weights are the optima's variances, scaled up where the line misses them; Student's t has the least degrees of
    freedom of any level. From one level there is no α, and the optimum at the final width is taken to be that level's,
    without an interval.
    """
    known = [each for each in levels if each.surface is not None and not each.edge]
    count = len(levels[0].grid)
    return [_finite_width(known, place, final_width, level) for place in range(count)] if known else []


def _complete(width: int, grid: Grid, losses: Losses, earlier: Surface | None) -> "Level | Telescope":
    """Return the level once all points of its grid, grown where the optimum is outside, have losses.

    A level without points to spare takes the variance of an `earlier` one.
    """
    grown = np.zeros((len(grid), 2), int)
    while True:
        points = _points(grid)
        found = losses(width, points)
        if np.isnan(found).any():
            return Telescope((), width, points[np.isnan(found)])
        surface = fit_surface(*_window(grid, points, found), earlier) if len(points) > 1 else None
        sides = _outside(grid, points, found, surface) if len(points) > 1 else np.zeros((len(grid), 2), bool)
        growing = sides & (grown < MAX_GROWTH)
        if not growing.any():
            return Level(width, grid, points, found, surface, edge=bool(sides.any()))
        grown += growing
        grid = tuple(_grown(values, *sides_) for values, sides_ in zip(grid, growing.tolist(), strict=True))


def _grid_after(levels: Sequence[Level], width: int, base: Grid, level: float) -> Grid:
    doublings, k = round(math.log2(width / levels[0].width)), len(base)
    counts = [num_points(len(values), doublings, k) for values in base]
    centre = levels[-1].optimum
    if max(counts) == 1:
        predicted = finite_width(levels, width, level)
        centre = np.array([each.at_final.value for each in predicted]) if predicted else centre
    return tuple(
        middle + np.diff(values).mean() * (np.arange(count) - (count - 1) / 2)
        for middle, values, count in zip(centre, base, counts, strict=True)
    )


def _points(grid: Grid) -> Array:
    return np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1).reshape(-1, len(grid))


def _window(grid: Grid, points: Array, losses: Array) -> tuple[Array, Array]:
    """Return the points with finite losses around the best one."""
    spacing = np.array([np.diff(values).min() if len(values) > 1 else np.inf for values in grid])
    away = (np.abs(points - points[int(np.argmin(losses))]) / spacing).max(axis=1)
    least = num_coefficients(len(grid)) + MIN_SPARE_POINTS
    for window in WINDOW_SPACINGS:
        inside = (away <= window + 1e-6) & np.isfinite(losses)
        if inside.sum() >= least:
            break
    return points[inside], losses[inside]


def _outside(grid: Grid, points: Array, losses: Array, surface: Surface | None) -> NDArray[np.bool_]:
    """Tell for both sides of each hyperparameter whether the optimum is there: the surface's, else the best point."""
    ends = np.array([(values[0], values[-1]) for values in grid])
    if surface is not None:
        return np.column_stack([surface.optimum < ends[:, 0], surface.optimum > ends[:, 1]])
    best = points[int(np.argmin(losses))]
    several = np.array([len(values) > 1 for values in grid])
    return np.asarray(np.column_stack([best <= ends[:, 0], best >= ends[:, 1]]) & several[:, None], bool)


def _grown(values: Array, below: bool, above: bool) -> Array:
    step = float(np.diff(values).mean())
    return np.concatenate([[values[0] - step] * below, values, [values[-1] + step] * above])


def _finite_width(known: Sequence[Level], place: int, final_width: int, level: float) -> FiniteWidth:
    surfaces = [each.surface for each in known if each.surface is not None]
    optima = np.array([each.optimum[place] for each in surfaces])
    if len(known) < 2:
        return FiniteWidth(Estimate(None), Estimate(None), Estimate(float(optima[-1])))
    variances = np.array([max(each.covariance[place, place], 1e-12) for each in surfaces])
    design = np.column_stack([np.ones(len(known)), [-1.0 / each.width for each in known]])
    contrasts = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0 / final_width]])
    dof = min(each.dof for each in surfaces)
    return FiniteWidth(*weighted_fit(design, optima, variances, contrasts, level, dof))


def check_doubling(widths: Sequence[int]) -> None:
    """Raise ValueError unless each width is twice the one before."""
    if len(widths) < 2 or any(later != 2 * earlier for earlier, later in pairwise(widths)):
        raise ValueError(
            f"telescoping goes through doubled widths; the sweep has {', '.join(map(str, widths))}: "
            "give model.width a list such as [32, 64, 128]"
        )
