"""The critical batch of branches: the largest one that costs no loss. Source: arXiv 2505.23971, section 3."""

from collections.abc import Sequence

import numpy as np

from analysis.statistics.families import Array
from analysis.statistics.intervals import Estimate

#: A branch costs nothing whose loss is above that of every smaller batch by no more than this, in nats.
TOLERANCE_NATS = 0.01
#: Weight of a new loss in the running mean.
_EMA_WEIGHT = 0.5


def last_smoothed(losses_nats: Sequence[float] | Array) -> float:
    """Return the exponential moving average of a branch's losses, oldest first, at its end."""
    smoothed = losses_nats[0]
    for loss in losses_nats[1:]:
        smoothed += _EMA_WEIGHT * (loss - smoothed)
    return float(smoothed)


def largest_harmless_batch(global_batch_tokens: Array, losses_nats: Array) -> Estimate:
    """Return the largest batch whose loss is within the tolerance of all smaller ones, up to the next one tried.

    Batches in ascending order. No value, and no upper end, where that is the largest: more might do no harm either.
    """
    least_before = np.minimum.accumulate(np.r_[np.inf, losses_nats[:-1]])
    harmless = int(np.flatnonzero(losses_nats <= least_before + TOLERANCE_NATS)[-1])
    low = float(global_batch_tokens[harmless])
    if harmless == len(losses_nats) - 1:
        return Estimate(None, low)
    return Estimate(low, low, float(global_batch_tokens[harmless + 1]))
