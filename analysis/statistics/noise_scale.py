"""The gradient noise scale from sizes of gradients at two batch sizes."""

from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from analysis.statistics.families import Array
from analysis.statistics.intervals import Estimate


class Moments(NamedTuple):
    """Unbiased estimates of |G|² (signal) and tr Σ (noise) over `number` measurements: means, variances, covariance.

    Arrays of one shape, of as many noise scales.
    """

    number: Array
    signal: Array
    noise: Array
    signal_variance: Array
    noise_variance: Array
    covariance: Array


def noise_scale(small_batch: float, big_batch: float, small_norms: Array, big_norms: Array, level: float) -> Estimate:
    """Return B_simple = tr Σ / |G|² in the unit of the batches, from gradient norms [measurements] at the same weights.

    |G|² = (B_big |G_big|² − B_small |G_small|²) / (B_big − B_small) and tr Σ = (|G_small|² − |G_big|²) / (1/B_small −
    1/B_big) are unbiased each, so that each is averaged over the measurements before dividing.

    Raises: ValueError if the batches are no two sizes.
    Source: arXiv 1812.06162, appendix A.1.
    """
    if not 0 < small_batch < big_batch:
        raise ValueError(f"the noise scale needs two batch sizes, the smaller first: got {small_batch} and {big_batch}")
    small, big = np.asarray(small_norms, float) ** 2, np.asarray(big_norms, float) ** 2
    signal = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    noise = (small - big) / (1 / small_batch - 1 / big_batch)
    spread = np.cov(signal, noise) if len(small) > 1 else np.full((2, 2), np.nan)
    columns = (len(small), signal.mean(), noise.mean(), spread[0, 0], spread[1, 1], spread[0, 1])
    value, low, high = noise_scales(Moments(*(np.array([each], float) for each in columns)), level)
    return Estimate(*(float(each[0]) if np.isfinite(each[0]) else None for each in (value, low, high)))


def noise_scales(moments: Moments, level: float) -> tuple[Array, Array, Array]:
    """Return B_simple and the ends of its interval, NaN where there is none.

    There is no value unless both means are above zero, and no interval from a single measurement. The interval is E. C.
    Fieller's for a ratio of means, J. R. Stat. Soc. B 16 (1954) 175: without an upper end where |G|² may be zero.
    """
    number, signal, noise = moments.number, moments.signal, moments.noise
    value = np.where((signal > 0) & (noise > 0), noise / np.where(signal > 0, signal, 1.0), np.nan)
    scale = stdtrit(np.maximum(number - 1, 1), 0.5 + level / 2) ** 2 / np.maximum(number, 1)
    scale = np.where(number > 1, scale, np.nan)
    # the ratios r for which (noise − r · signal)² is within its error: square r² − 2 middle r + constant ≤ 0
    square = signal**2 - scale * moments.signal_variance
    middle = signal * noise - scale * moments.covariance
    constant = noise**2 - scale * moments.noise_variance
    root = np.sqrt(np.maximum(middle**2 - square * constant, 0.0))
    divisor = np.where(square == 0, np.nan, square)
    low, high = (middle - root) / divisor, (middle + root) / divisor
    # where |G|² may be zero (square below 0), the positive ratios allowed are those above `low`
    bounded = (constant > 0) & (low > 0)
    return value, np.where(bounded, low, np.nan), np.where((square > 0) & (high > 0), high, np.nan)
