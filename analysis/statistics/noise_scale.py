"""The gradient noise scale from gradient norms at two batch sizes."""

import numpy as np

from analysis.statistics.families import Array
from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import t_quantile


def noise_scale(small_batch: float, big_batch: float, small_norms: Array, big_norms: Array, level: float) -> Estimate:
    """Return B_simple = tr Σ / |G|² in the unit of the batches, from gradient norms [measurements] at the same weights.

    |G|² = (B_big |G_big|² − B_small |G_small|²) / (B_big − B_small) and tr Σ = (|G_small|² − |G_big|²) / (1/B_small −
    1/B_big) are unbiased each, so that each is averaged over the measurements before dividing. The interval is E. C.
    Fieller's for a ratio of means, J. R. Stat. Soc. B 16 (1954) 175: open where |G|² may be zero.

    Raises: ValueError if the batches are no two sizes.
    Source: arXiv 1812.06162, appendix A.1.
    """
    if not 0 < small_batch < big_batch:
        raise ValueError(f"the noise scale needs two batch sizes, the smaller first: got {small_batch} and {big_batch}")
    small, big = np.asarray(small_norms, float) ** 2, np.asarray(big_norms, float) ** 2
    signal = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    noise = (small - big) / (1 / small_batch - 1 / big_batch)
    value = float(noise.mean() / signal.mean()) if signal.mean() > 0 and noise.mean() > 0 else None
    if len(small) < 2:
        return Estimate(value)
    return Estimate(value, *_fieller(noise, signal, level))


def _fieller(numerator: Array, denominator: Array, level: float) -> tuple[float | None, float | None]:
    num = len(numerator)
    spread = np.cov(numerator, denominator) * t_quantile(level, num - 1) ** 2 / num
    square = denominator.mean() ** 2 - spread[1, 1]
    middle = numerator.mean() * denominator.mean() - spread[0, 1]
    constant = numerator.mean() ** 2 - spread[0, 0]
    if square <= 0:
        return None, None
    half = np.sqrt(max(middle**2 - square * constant, 0.0))
    low, high = (middle - half) / square, (middle + half) / square
    return (float(low) if low > 0 else None), float(high)
