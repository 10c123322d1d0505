"""The critical batch of branches: the largest one that costs no loss. Source: arXiv 2505.23971, section 3.

Shapes: S trunks (seeds), K branches of each, one for each batch size, in ascending order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis.statistics.families import Array
from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import MIN_DOF, t_quantile

#: A branch costs nothing whose loss is above that of every smaller batch by no more than this, in nats.
TOLERANCE_NATS = 0.01
#: Weight of a new loss in the running mean.
_EMA_WEIGHT = 0.5


class BranchNoise(NamedTuple):
    """Variance of a branch's loss about what its trunk and its batch explain, and its degrees of freedom."""

    variance: float
    dof: int

    def half_width(self, num_trunks: int, level: float) -> float:
        """Return the half width of the interval of a difference between two branches, as a mean over trunks."""
        return t_quantile(level, self.dof) * float(np.sqrt(2 * self.variance / num_trunks))


def last_smoothed(losses_nats: Sequence[float] | Array) -> float:
    """Return the exponential moving average of a branch's losses, oldest first, at its end."""
    smoothed = losses_nats[0]
    for loss in losses_nats[1:]:
        smoothed += _EMA_WEIGHT * (loss - smoothed)
    return float(smoothed)


def branch_noise(sets: Sequence[Array]) -> BranchNoise | None:
    """Pool the noise over sets of branches [S, K], each from one point of training; None below `MIN_DOF`.

    Branches of one trunk share its weights and data: what these add to all of its losses decides nothing and is taken
    off, as is the mean of each batch. Batches at which a branch diverged are left out.
    """
    squares, dof = 0.0, 0
    for losses in (each[:, np.isfinite(each).all(axis=0)] for each in sets):
        if losses.size:
            rest = losses - losses.mean(axis=0) - losses.mean(axis=1, keepdims=True) + losses.mean()
            squares += float((rest**2).sum())
            dof += (losses.shape[0] - 1) * (losses.shape[1] - 1)
    return BranchNoise(squares / dof, dof) if dof >= MIN_DOF else None


def largest_harmless_batch(global_batch_tokens: Array, losses_nats: Array, half_width_nats: float = 0.0) -> Estimate:
    """Return the largest batch [K] whose loss [K], a mean over trunks, is within the tolerance of all smaller ones.

    The interval begins with the largest batch that is within it even at the upper end of its excess, ± `half_width`,
    and ends with the batch after the largest one that is so at the lower end. No value where the largest batch tried
    does no harm, and no upper end where it may do none: more might do no harm either. No lower end at the smallest
    batch, which is compared with none: it may do harm itself.
    """
    least_before = np.minimum.accumulate(np.r_[np.inf, losses_nats[:-1]])
    excess = np.r_[-np.inf, losses_nats[1:] - least_before[1:]]

    def largest(shift: float) -> int:
        return int(np.flatnonzero(excess + shift <= TOLERANCE_NATS)[-1])

    low, harmless, last = largest(half_width_nats), largest(0.0), largest(-half_width_nats)
    end = len(losses_nats) - 1
    return Estimate(
        None if harmless == end else float(global_batch_tokens[harmless]),
        None if low == 0 else float(global_batch_tokens[low]),
        None if last == end else float(global_batch_tokens[last + 1]),
    )
