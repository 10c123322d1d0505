"""Which of several measurements would tell most about one parameter, by the linearised model (c-optimal design).

Source: V. V. Fedorov, Theory of Optimal Experiments (1972), section 2.7.
Shapes: n measurements made, m candidates, p parameters.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Information:
    """What measurements say of all parameters: their inverse covariance [p, p]."""

    matrix: Array

    @classmethod
    def of(cls, jacobian: Array, precision: Array, prior: Array) -> "Information":
        """Add up measurements with derivatives [n, p] and inverse variances [n], and prior inverse variances [p]."""
        return cls(jacobian.T @ (precision[:, None] * jacobian) + np.diag(prior))

    def deviation(self, place: int) -> float:
        """Return the standard deviation of a parameter."""
        return float(np.sqrt(np.linalg.inv(self.matrix)[place, place]))

    def gains(self, jacobian: Array, precision: Array, place: int) -> Array:
        """Return by how much each candidate lowers the log of the standard deviation of a parameter [m]."""
        covariance = np.linalg.inv(self.matrix)
        along = jacobian @ covariance
        removed = precision * along[:, place] ** 2 / (1 + precision * (along * jacobian).sum(axis=1))
        return np.asarray(-0.5 * np.log1p(-removed / covariance[place, place]))

    def added(self, jacobian: Array, precision: float) -> "Information":
        """Return what is known with one measurement more, of derivatives [p]."""
        return Information(self.matrix + precision * np.outer(jacobian, jacobian))


def most_informative(
    known: Information, jacobian: Array, precision: Array, cost: Array, place: int, limits: NDArray[np.int_], num: int
) -> list[int]:
    """Return `num` candidates, each the one of the largest gain per cost given those before it.

    A candidate may be taken `limits` [m] times; fewer are returned when none is left.
    """
    left, chosen = limits.copy(), list[int]()
    while len(chosen) < num and (left > 0).any():
        worth = np.where(left > 0, known.gains(jacobian, precision, place) / cost, -np.inf)
        best = int(np.argmax(worth))
        chosen.append(best)
        left[best] -= 1
        known = known.added(jacobian[best], float(precision[best]))
    return chosen
