"""Loss laws L_b(D) = E + A_b D^-β_b over token budgets D, the floor E shared by all batches b of a series.

The law is written in coordinates in which it is almost linear, so that noise cannot throw a fit far off: the loss ℓ_b
and its fall per unit of log D, s_b, both at the centre of the batch's budgets, and one bend γ = 1 / (ℓ - E), where ℓ is
the mean of all losses. With z = log D less that of the centre, c_b = 1 + γ (ℓ_b - ℓ) and β_b = γ s_b / c_b,

    L_b = ℓ_b - s_b z φ(β_b z),   φ(q) = (1 - exp -q) / q,

which passes smoothly into the straight line γ = 0 where the data show no floor at all.

Shapes: n points, b batches, p = 1 + 2 b parameters (γ, ℓ_1 … ℓ_b, s_1 … s_b), m sets of parameters.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

#: Below this, the first terms of a series are closer than the quotient.
_SMALL = 1e-4


@dataclass(frozen=True)
class Curves:
    """The law at given points: `batch` [n] counts from 0, `z` [n] is log D less the centre of the batch."""

    batch: Indices
    z: Array
    num_batches: int
    mean_nats: float

    def losses(self, parameters: Array) -> Array:
        """Return L [m, n]; not a number where a batch would lie below the floor."""
        _, level, slope, _, bent = self._parts(parameters)
        return level - slope * self.z * _phi(bent)

    def slopes(self, parameters: Array) -> Array:
        """Return dL / d log D [m, n]."""
        _, _, slope, _, bent = self._parts(parameters)
        return -slope * np.exp(-bent)

    def derivatives(self, parameters: Array) -> Array:
        """Return dL / d parameters [m, n, p]."""
        gamma, _, slope, height, bent = self._parts(parameters)
        fall, points = slope * self.z, np.arange(len(self.batch))
        found = np.zeros((*bent.shape, parameters.shape[1]))
        found[:, :, 0] = -((fall / height) ** 2) * _phi_slope(bent)
        found[:, points, 1 + self.batch] = 1 + fall * _phi_slope(bent) * bent * gamma / height
        found[:, points, 1 + self.num_batches + self.batch] = -self.z * np.exp(-bent)
        return found

    def log_tokens(self, target_loss_nats: float, parameters: Array) -> Array:
        """Return where L is the target, as log D less the centre [m, n]; infinite at and below the floor."""
        gamma, level, slope, height, _ = self._parts(parameters)
        missing = level - target_loss_nats
        share = gamma * missing / height
        with np.errstate(divide="ignore", invalid="ignore"):
            way = missing / slope * np.where(np.abs(share) < 1e-8, 1.0, -np.log1p(-np.minimum(share, 1.0)) / share)
        return np.where(share < 1, way, np.inf)

    def _parts(self, parameters: Array) -> tuple[Array, Array, Array, Array, Array]:
        """Return γ [m, 1]; ℓ, s, the height c over the floor in units of 1 / γ, and β z, each [m, n]."""
        gamma, level = parameters[:, :1], parameters[:, 1 + self.batch]
        slope = parameters[:, 1 + self.num_batches + self.batch]
        height = 1 + gamma * (level - self.mean_nats)
        height = np.where(height > 0, height, np.nan)
        return gamma, level, slope, height, gamma * slope * self.z / height


def _phi(q: Array) -> Array:
    """Return (1 - exp -q) / q."""
    safe = np.where(np.abs(q) < _SMALL, 1.0, q)
    return np.where(np.abs(q) < _SMALL, 1 - q / 2 + q**2 / 6, -np.expm1(-safe) / safe)


def _phi_slope(q: Array) -> Array:
    """Return the derivative of `_phi`."""
    safe = np.where(np.abs(q) < _SMALL, 1.0, q)
    return np.where(np.abs(q) < _SMALL, -1 / 2 + q / 3, (np.exp(-safe) * (1 + safe) - 1) / safe**2)
