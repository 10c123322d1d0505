"""Several questions asked of the same data: p-values and bands that hold for all of them together."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.statistics.noise import Errors

Array = NDArray[np.float64]

_NUM_DRAWS = 5_000


def holm(p_values: Array) -> Array:
    """Return p-values [tests], adjusted so that all below a level are claims that hold together at that level.

    Source: S. Holm, Scand. J. Statist. 6 (1979) 65: the k-th smallest of m times (m - k + 1), never decreasing.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def draws_of(errors: Errors, num_draws: int = _NUM_DRAWS) -> Array:
    """Draw deviations [draws, cells] of multivariate t with `errors.contrast_dof`; always the same ones."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((num_draws, len(errors.covariance))) @ np.linalg.cholesky(errors.covariance).T
    return np.asarray(normal / np.sqrt(rng.chisquare(errors.contrast_dof, (num_draws, 1)) / errors.contrast_dof))


class Drop(NamedTuple):
    """A fall of values from one cell to a later one, with its interval and the indices of the two cells."""

    value: float
    low: float | None
    high: float | None
    first: int
    second: int


def largest_drop(values: Array, deviations: Array | None, level: float) -> Drop:
    """Return the largest fall of `values` [cells] from one cell to a later one; negative where every later is higher.

    `deviations` [draws, cells] are draws of the error of `values`; without them there is no interval. It is that of the
    largest of the true falls: whichever it is, the band that holds for all falls at once (max-t: every fall in units of
    its own spread, the largest of each draw at `level`) contains it.
    """
    first, second = np.triu_indices(len(values), 1)
    falls = values[first] - values[second]
    largest, low, high = int(np.argmax(falls)), None, None
    if deviations is not None:
        noise = deviations[:, first] - deviations[:, second]
        spread = np.sqrt(np.mean(noise**2, axis=0))
        half = spread * np.quantile(np.max(np.abs(noise) / spread, axis=1), level)
        low, high = float(np.max(falls - half)), float(np.max(falls + half))
    return Drop(float(falls[largest]), low, high, int(first[largest]), int(second[largest]))
