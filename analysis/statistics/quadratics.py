"""Parabolas of one curvature by weighted least squares: y = level_k + slope_k x + curvature x² for every curve k."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int_]


@dataclass(frozen=True)
class Quadratics:
    """Parabolas through points x [points] of curves [points], numbered from 0, with precisions weight [points].

    Every curve has two points or more and one of them three, so that all of it can be fitted.
    """

    x: Array
    curve: Ints
    weight: Array

    @property
    def num_curves(self) -> int:
        return len(np.unique(self.curve))

    @property
    def num_spare(self) -> int:
        """Points beyond the parameters."""
        return len(self.x) - 2 * self.num_curves - 1

    @cached_property
    def design(self) -> Array:
        """Design matrix [points, 2 curves + 1]: level and slope of every curve in turn, then the curvature."""
        rows = np.arange(len(self.x))
        design = np.zeros((len(self.x), 2 * self.num_curves + 1))
        design[rows, 2 * self.curve] = 1.0
        design[rows, 2 * self.curve + 1] = self.x
        design[:, -1] = self.x**2
        return design

    @cached_property
    def covariance(self) -> Array:
        """Covariance of the coefficients, for points of variance 1 / weight."""
        return np.asarray(np.linalg.inv(self.design.T @ (self.weight[:, None] * self.design)), float)

    @cached_property
    def solution(self) -> Array:
        """The matrix [coefficients, points] that makes coefficients of values at the points."""
        return self.covariance @ self.design.T * self.weight

    def misfit(self, values: Array) -> float:
        """Return the weighted sum of squared residuals of values [points]."""
        residuals = values - self.design @ (self.solution @ values)
        return float(self.weight @ residuals**2)

    def fitted(self, values: Array) -> Array:
        """Return the fit to values [..., points] at the points; the values themselves where it has no minimum."""
        coefficients = values @ self.solution.T
        return np.where(coefficients[..., -1:] > 0, coefficients @ self.design.T, values)
