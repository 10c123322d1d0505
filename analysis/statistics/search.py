"""Exhaustive search for the best B_crit and bend of a curve, and for all that the data allow beside it.

Shapes: K points (log B_crit, bend) of a grid; a box [2, 2] has a row of two ends for each of the two.
"""

from dataclasses import dataclass, replace

import numpy as np

from analysis.statistics.families import KINK, Array, Family
from analysis.statistics.least_squares import NUM_TRIES
from analysis.statistics.resampled import descend
from analysis.statistics.residuals import Concentrated, Observed

_LINE = (401, 1)
_COARSE = (241, 17)
_FINE = (21, 21)
_CLOUD = {False: (2001, 1), True: (97, 97)}
_RESOLUTION = 1e-9
#: A knee at infinity that fits as well but for this share of the misfit is as good as one beyond the batches.
_NO_KNEE = 1e-4
_MAX_ZOOMS = 80
#: A box that shrinks by less bounds its region well enough.
_TIGHT = 0.6
#: By this share of the box a side moves out that cuts its region off.
_MARGIN = 0.2


@dataclass(frozen=True)
class Search:
    """The search for one curve. `prior` is the variance that an assumed spread of the bend is measured in."""

    family: Family
    observed: Observed
    prior: float = 1.0

    @property
    def limits(self) -> Array:
        return self.family.limits(self.observed.log_batch)

    def at(self, points: Array) -> Concentrated:
        """Return the best T_min and its misfit at `points` [K, 2]."""
        excess = self.family.log_excess(self.observed.log_batch, points[:, :1], points[:, 1:])
        found = self.observed.concentrate(excess)
        if self.family.spread is None:
            return found
        return replace(found, misfit=found.misfit + self.prior * (points[:, 1] / self.family.spread) ** 2)

    def best(self) -> Array:
        """Return the least misfit's log B_crit and bend: the best of a grid, then of what lies around it."""
        grid = _mesh(self.limits, _COARSE if self.family.is_bent else _LINE)
        misfit = self.at(grid).misfit
        if self.family is not KINK:
            starts = grid[np.argsort(misfit, kind="stable")[:NUM_TRIES]]
            found = descend(self.family, self.observed, starts, self.prior, NUM_TRIES)[0, 1:]
            if np.all((self.limits[:, 0] <= found) & (found <= self.limits[:, 1])):
                return self._or_limit(found)
        return self._or_limit(self._zoomed(grid[np.argmin(misfit)]))

    def _or_limit(self, found: Array) -> Array:
        """Return `found`, or an end of the search for B_crit that fits as well: there is no knee."""
        tried = np.array([[end, found[1]] for end in self.limits[0]] + [found])
        misfit = self.at(tried).misfit
        return np.asarray(tried[np.flatnonzero(misfit <= misfit.min() * (1 + _NO_KNEE))[0]])

    def _zoomed(self, best: Array) -> Array:
        """Return the best of ever finer grids around `best`: what no slope leads to, at a kink or at a limit."""
        limits = self.limits
        reach = 2 * np.ptp(limits, axis=1) / np.maximum(np.array(_COARSE) - 1, 1)
        for _ in range(_MAX_ZOOMS):  # a plateau without an end would keep it wandering
            if reach.max() <= _RESOLUTION:
                break
            box = _within(limits, best - reach, best + reach)
            grid = _mesh(box, _FINE)
            best = grid[np.argmin(self.at(grid).misfit)]
            at_side = ((best == box[:, 0]) & (best > limits[:, 0])) | ((best == box[:, 1]) & (best < limits[:, 1]))
            reach = np.where(at_side, reach, reach / 2)
        return np.asarray(best)

    def region(self, best: Array, allowed: float) -> Array:
        """Return a grid [g, h, 2] over the box that is filled by what is at most `allowed` above the least misfit.

        The box shrinks from the whole search. A coarse grid may miss a thin region: what the grid itself misses of the
        least misfit is allowed on top. What it missed at the end touches a side of the box, which is then moved out.
        """
        least, limits = self.at(best[None]).misfit[0], self.limits
        box, counts = limits, (_COARSE if self.family.is_bent else _LINE)
        for _ in range(_MAX_ZOOMS):
            grid = _mesh(box, counts)
            misfit = self.at(grid).misfit
            inside = np.vstack([grid[misfit <= max(misfit.min(), least) + allowed], best])
            cell = np.ptp(box, axis=1) / np.maximum(np.array(counts) - 1, 1)
            smaller = _within(limits, inside.min(axis=0) - cell, inside.max(axis=0) + cell)
            tight = np.all(np.ptp(smaller, axis=1) >= _TIGHT * np.ptp(box, axis=1))
            box, counts = smaller, (_FINE if self.family.is_bent else _LINE)
            if tight:
                break
        counts = _CLOUD[self.family.is_bent]
        for _ in range(_MAX_ZOOMS):
            grid = _mesh(box, counts)
            inside = np.vstack([grid[self.at(grid).misfit <= least + allowed], best])
            margin = _MARGIN * np.ptp(box, axis=1)
            low = np.where(inside.min(axis=0) <= box[:, 0], box[:, 0] - margin, box[:, 0])
            high = np.where(inside.max(axis=0) >= box[:, 1], box[:, 1] + margin, box[:, 1])
            larger = _within(limits, low, high)
            if np.array_equal(larger, box):
                break
            box = larger
        return grid.reshape(*counts, 2)


def _within(limits: Array, low: Array, high: Array) -> Array:
    return np.column_stack([np.maximum(low, limits[:, 0]), np.minimum(high, limits[:, 1])])


def _mesh(box: Array, counts: tuple[int, int]) -> Array:
    """Return the grid points [K, 2] of a box; a side without length has one."""
    sides = [np.linspace(low, high, num if high > low else 1) for (low, high), num in zip(box, counts, strict=True)]
    return np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)


def edge(grid: Array, depth: Array, limit: float) -> Array:
    """Return points [K, 2] of the lines of a grid [g, h, 2] where the depth [g, h] passes the limit, interpolated."""
    points = []
    for axis in (0, 1):
        ahead, behind = (slice(1, None), slice(None, -1))
        here, there = (depth[part] if axis == 0 else depth[:, part] for part in (behind, ahead))
        from_here, to_there = (grid[part] if axis == 0 else grid[:, part] for part in (behind, ahead))
        crossed = (here <= limit) != (there <= limit)
        share = (limit - here[crossed]) / (there[crossed] - here[crossed])
        points.append(from_here[crossed] + share[:, None] * (to_there[crossed] - from_here[crossed]))
    return np.concatenate(points)
