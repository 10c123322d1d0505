"""Two ways to an interval of anything that the parameters of a curve T(B) give: a profile region, or resamples.

Shapes: K points of a region or resamples, the last axis of what ends are asked of; all logarithms.
"""

from dataclasses import dataclass

import numpy as np

from analysis.statistics.families import Array

Ends = tuple[Array, Array]


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its interval; None for what the data do not bound."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Region:
    """Parameters whose misfit is allowed: an interval is the range of values over them.

    `misfit` above the least, in units of the variance; log T_min is allowed within ± `half`. Up to `allowed_shape` for
    what rests on contrasts between batches alone, such as B_crit; up to `allowed_tokens` for what contains T_min.
    """

    log_b_crit: Array
    bend: Array
    log_t_min: Array
    half: Array
    misfit: Array
    allowed_shape: float
    allowed_tokens: float

    def of_shape(self, values: Array) -> Ends:
        """Return the ends [...] of functions [..., K] of B_crit and the bend."""
        inside = values[..., self.misfit <= self.allowed_shape]
        return inside.min(axis=-1), inside.max(axis=-1)

    def of_tokens(self, shift: Array) -> Ends:
        """Return the ends [...] of log T_min + shift [..., K]."""
        inside = self.misfit <= self.allowed_tokens
        centre, half = (self.log_t_min + shift)[..., inside], self.half[inside]
        return np.min(centre - half, axis=-1), np.max(centre + half, axis=-1)

    def reaches(self, log_b_crit: float) -> bool:
        """Say whether the interval of what contains T_min comes from B_crit as far out as this."""
        return bool(np.any(self.log_b_crit[self.misfit <= self.allowed_tokens] == log_b_crit))


@dataclass(frozen=True)
class Resamples:
    """Parameters fitted to resamples: an interval lies between percentiles.

    These keep their place under any change of scale, and tell by themselves where the data give no end. That so few
    seeds vary too little when they are drawn again, the resamples have been widened for.
    """

    log_b_crit: Array
    bend: Array
    log_t_min: Array
    level: float

    def of_shape(self, values: Array) -> Ends:
        """Return the ends [...] of functions [..., K] of B_crit and the bend."""
        tail = self._tail()
        low = np.quantile(values, tail, axis=-1, method="lower")
        return np.asarray(low), np.asarray(np.quantile(values, 1 - tail, axis=-1, method="higher"))

    def of_tokens(self, shift: Array) -> Ends:
        """Return the ends [...] of log T_min + shift [..., K]."""
        return self.of_shape(self.log_t_min + shift)

    def reaches(self, log_b_crit: float) -> bool:
        """Say whether more resamples than the interval leaves out have B_crit this far out."""
        return bool(np.mean(self.log_b_crit == log_b_crit) > self._tail())

    def _tail(self) -> float:
        """Return the share of resamples beyond each end."""
        return 0.5 - self.level / 2
