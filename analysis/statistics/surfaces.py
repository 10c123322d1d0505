"""Quadratic surfaces of loss over hyperparameters, and where they are lowest.

Shapes: n points, k hyperparameters (logarithms), p = 1 + k + k(k + 1)/2 coefficients.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Surface:
    """The lowest point [k] of a quadratic, its covariance [k, k], the loss there; the variance of a point about the
    surface, and the degrees of freedom to which that is known.
    """

    optimum: Array
    covariance: Array
    loss: float
    variance: float
    dof: int


def fit_surface(x: Array, loss: Array, like: Surface | None = None) -> Surface | None:
    """Fit a quadratic by least squares to x [n, k] and loss [n]; None where no minimum is identified.

    The covariance is that of the root of the gradient to first order; the variance is that of the residuals, so that a
    surface which is no quadratic makes it larger; without residuals it is that of a surface `like` it.
    Assumption: errors of the loss are independent, with one variance.
    """
    centre = x.mean(axis=0)
    own = x - centre
    design = _monomials(own)
    dof = len(x) - design.shape[1]
    if dof < (0 if like else 1) or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    coefficients = np.asarray(np.linalg.lstsq(design, loss, rcond=None)[0], float)
    k = x.shape[1]
    hessian = _hessian(coefficients, k)
    if np.linalg.eigvalsh(hessian).min() <= 0:
        return None
    optimum = np.linalg.solve(hessian, -coefficients[1 : 1 + k])
    residual = loss - design @ coefficients
    if dof or like is None:
        variance = float(residual @ residual) / dof
    else:
        variance, dof = like.variance, like.dof
    of_coefficients = np.linalg.inv(design.T @ design) * variance
    moves = np.linalg.solve(hessian, _gradients(optimum))
    return Surface(
        optimum=optimum + centre,
        covariance=moves @ of_coefficients @ moves.T,
        loss=float((_monomials(optimum[None]) @ coefficients)[0]),
        variance=variance,
        dof=dof,
    )


def num_coefficients(k: int) -> int:
    """Return p, the coefficients of a quadratic in k hyperparameters."""
    return 1 + k + k * (k + 1) // 2


def _monomials(x: Array) -> Array:
    """Return 1, x_i and x_i·x_j with i ≤ j: [n, p]."""
    pairs = list(combinations_with_replacement(range(x.shape[1]), 2))
    squares = [x[:, i] * x[:, j] for i, j in pairs]
    return np.column_stack([np.ones(len(x)), x, *squares])


def _hessian(coefficients: Array, k: int) -> Array:
    hessian = np.zeros((k, k))
    for (i, j), value in zip(combinations_with_replacement(range(k), 2), coefficients[1 + k :], strict=True):
        hessian[i, j] += value
        hessian[j, i] += value
    return hessian


def _gradients(x: Array) -> Array:
    """Return the gradients [k, p] of the monomials at one point [k]."""
    k = len(x)
    columns = [np.zeros(k), *np.eye(k)]
    for i, j in combinations_with_replacement(range(k), 2):
        column = np.zeros(k)
        column[i] += x[j]
        column[j] += x[i]
        columns.append(column)
    return np.column_stack(columns)
