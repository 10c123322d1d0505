"""Resamples of seeds, and what the choice of the best among noisy means does to the mean that was chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from analysis.statistics.noise import t_quantile

Array = NDArray[np.float64]
Ints = NDArray[np.int_]

NUM_RESAMPLES = 1000

#: From this many seeds on, resamples of them decide the intervals.
MIN_SEEDS_TO_RESAMPLE = 10

_SEED = 20_250_502


def seed_weights(seeds: Sequence[str], context: str, resamples: int = NUM_RESAMPLES) -> Array:
    """Draw the weight of each seed in each resample [resamples, seeds]: exponential, of mean 1.

    A seed has the same weights wherever the context is the same, so that whatever its runs share stays paired, also
    where one of them is missing. Weighted means over n seeds then follow the Bayesian bootstrap.

    Source: D. B. Rubin, Annals of Statistics 9 (1981) 130.
    """
    draws = [
        np.random.default_rng([_SEED, crc32(f"{context} {seed}".encode())]).exponential(size=resamples)
        for seed in seeds
    ]
    return np.array(draws).T.reshape(resamples, len(draws))


def normal_draws(num: int, resamples: int = NUM_RESAMPLES) -> Array:
    """Draw standard normal numbers [resamples, num], the same at every call."""
    return np.random.default_rng(_SEED).standard_normal((resamples, num))


def spread_factor(num_seeds: Array, level: float) -> Array:
    """Return what deviations of weighted means are multiplied by so that their percentiles cover at `level`.

    The variance of means over n seeds with flat Dirichlet weights is (n - 1) / (n + 1) of that of means of n seeds, and
    percentiles know nothing of the t distribution: at ten seeds, intervals of 90 % would cover 83 %.

    Source: T. C. Hesterberg, The American Statistician 69 (2015) 371, section 4.1, on narrowness bias.
    """
    n = np.asarray(num_seeds, float)
    t = np.array([t_quantile(level, count - 1) for count in n.flat]).reshape(n.shape)
    return np.asarray(t / ndtri(0.5 + level / 2) * np.sqrt((n + 1) / (n - 1)), float)


@dataclass(frozen=True)
class Candidates:
    """Points among which the lowest of each cell is chosen.

    cell: number of each point's cell [points], from 0 on and ascending; a point of each `competes` [points].
    """

    cell: Ints
    competes: NDArray[np.bool_]

    def lowest(self, values: Array) -> Ints:
        """Return the chosen points [..., cells] for values [..., points]."""
        ranked = np.where(self.competes, values, np.inf)
        starts = np.flatnonzero(np.diff(self.cell, prepend=-1))
        ends = np.append(starts[1:], len(self.cell))
        chosen = [start + ranked[..., start:end].argmin(axis=-1) for start, end in zip(starts, ends, strict=True)]
        return np.stack(chosen, axis=-1)
