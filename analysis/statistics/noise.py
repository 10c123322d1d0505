"""How much log T of one run varies from seed to seed, estimated from all repeated runs of an optimizer together.

Two or three seeds say next to nothing about their own spread, and a bootstrap over them covers 47-76 % where it says
90 %. So the variance is pooled over all groups of runs that differ in their seeds alone, and intervals take the t
quantile at the pooled degrees of freedom. Assumption: log T is normal, with one spread for all cells of an optimizer,
or one that is a power of the batch where the repeated runs say so.

Runs of the same seed share initial weights and the order of the data, so their errors go together, even across learning
rates and batches. Contrasts between such runs are more certain than the runs themselves, and repeated groups that share
seeds are worth fewer degrees of freedom than they count: `Noise` carries both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy.special import fdtrc, stdtrit

from analysis.statistics.censored import Samples
from analysis.statistics.spread import Spread, constant_spread, growing_spread

Array = NDArray[np.float64]

#: Fewer degrees of freedom than these give no interval.
MIN_DOF = 3

#: What runs differ by at most where nothing but rounding tells them apart, in log T or nats.
_ROUNDING = 1e-12

#: Seeds explain at most this share of the variance: all of it would leave contrasts without error, and no inverse.
MAX_SHARED = 0.999

#: Why there is no interval where `pooled` gives None.
NO_NOISE = "no interval: too few repeated runs to estimate the noise"

#: A misfit less likely than this widens the intervals.
LACK_OF_FIT_LEVEL = 0.05

#: Replicates refute α = 1 where a free exponent lowers the misfit by what is less likely than this.
REFUTED = 0.01


@dataclass(frozen=True)
class Errors:
    """Covariance of the means of cells [cells, cells], in log T, with the degrees of freedom of its estimate.

    `dof` is for one cell; `contrast_dof` for differences between cells: larger where all have the same seeds, whose
    common part cancels.
    """

    covariance: Array
    dof: float
    contrast_dof: float

    def of_difference(self, first: int, second: int) -> float:
        """Return the standard error of the difference between two cells."""
        contrast = np.zeros(len(self.covariance))
        contrast[first], contrast[second] = 1.0, -1.0
        return float(np.sqrt(contrast @ self.covariance @ contrast))

    def at(self, cells: Sequence[int]) -> "Errors":
        """Return the errors of some of the cells."""
        return Errors(self.covariance[np.ix_(cells, cells)], self.dof, self.contrast_dof)

    def part(self, start: int) -> "Errors":
        """Return the errors of the cells from `start` on."""
        return Errors(self.covariance[start:, start:], self.dof, self.contrast_dof)


@dataclass(frozen=True)
class Noise:
    """Errors of log T of single runs.

    variance: of one run around the mean of its group, estimated with `dof` degrees of freedom.
    same_cell, other_cell: covariance of two runs of the same seed at another rate of the cell, and in another cell.
    growth: d log variance / d log B where the spread depends on the batch, with its standard error; all of the above
    then hold at `centre`, a log B.
    """

    variance: float
    same_cell: float
    other_cell: float
    dof: float
    contrast_dof: float
    growth: float = 0.0
    growth_error: float = 0.0
    centre: float = 0.0

    def scale_at(self, log_batch: ArrayLike) -> Array:
        """Return the variance at each log batch over `variance`."""
        return np.asarray(np.exp(self.growth * (np.asarray(log_batch) - self.centre)), float)

    def deviation_at(self, log_batch: ArrayLike) -> Array:
        """Return the standard deviation of one run at each log batch."""
        return np.sqrt(self.variance * self.scale_at(log_batch))

    def dof_at(self, log_batch: ArrayLike) -> Array:
        """Return the degrees of freedom of the variance at each log batch: fewer, the further from the centre."""
        return np.asarray(2 / (2 / self.dof + (self.growth_error * (np.asarray(log_batch) - self.centre)) ** 2), float)

    def of_means(
        self, seeds: Sequence[Sequence[str]], log_batch: ArrayLike | None = None, lost: ArrayLike = 0.0
    ) -> Errors:
        """Return the errors of the cells' mean log T, given the seeds of the runs of each.

        `log_batch` [cells] is needed where the spread grows; `lost` [cells] is what the means of runs known by bounds
        vary more than those of as many exact ones, in units of the variance of one run.
        """
        shared = np.array([[len(set(a) & set(b)) / (len(a) * len(b)) for b in seeds] for a in seeds])
        own = [(self.variance - self.other_cell) / len(a) for a in seeds] + self.variance * np.asarray(lost)
        place = np.full(len(seeds), self.centre) if log_batch is None else np.asarray(log_batch, float)
        spread = np.sqrt(self.scale_at(place))
        covariance = (np.diag(own) + self.other_cell * shared) * np.outer(spread, spread)
        same_seeds = all(set(other) == set(seeds[0]) for other in seeds)
        left = float(np.mean(self.dof_at(place))) / self.dof
        return Errors(covariance, left * self.dof, left * (self.contrast_dof if same_seeds else self.dof))


def pooled(runs: pl.DataFrame) -> Noise | None:
    """Pool the variance over groups of repeated runs; None below MIN_DOF degrees of freedom, or if nothing varies.

    `runs` has columns group (runs alike but for their seed), cell, seed and value; with `side`, a value may be a bound
    (see `censored.Samples`); with `log_batch`, the variance may be a power of the batch, if that is significant.

    For exact values the variance is the sum of squares over the degrees of freedom, unbiased however the groups are
    correlated. Correlations ρ between groups divide the degrees of freedom by the mean over groups of Σ ρ²
    (Satterthwaite: two moments matched); they come from the groups without bounds.
    """
    runs = runs.with_columns(
        pl.lit(value).alias(name) for name, value in (("side", 0), ("log_batch", 0.0)) if name not in runs.columns
    )
    groups = runs.sort("group").with_columns(
        size=pl.len().over("group"), exact=(pl.col("side") == 0).sum().over("group")
    )
    groups = groups.filter(pl.col("size") > 1, pl.col("exact") > 0)
    if (groups["side"] == 0).sum() - groups["group"].n_unique() < MIN_DOF:
        return None
    samples = Samples.padded(groups["group"].rle_id(), groups["value"], groups["side"])
    if samples.squares_exact.max() <= _ROUNDING**2:
        return None
    log_batch = groups.group_by("group", maintain_order=True).agg(pl.col("log_batch").first())["log_batch"].to_numpy()
    growing = growing_spread(samples, log_batch)
    if growing is not None:
        seeds = _seed_effects(groups, growing)
        if growing.is_growing(seeds.design_effect):
            return seeds.noise(growing)
    constant = constant_spread(samples)
    return _seed_effects(groups, constant).noise(constant)


@dataclass(frozen=True)
class _SeedEffects:
    """Correlations of runs of the same seed, at another rate of a cell and in another cell.

    design_effect, contrast_design_effect: groups for each independent one, for the variance of a run and for that of a
    difference between cells.
    """

    same_cell: float
    other_cell: float
    design_effect: float
    contrast_design_effect: float

    def noise(self, spread: Spread) -> Noise:
        return Noise(
            variance=spread.variance,
            same_cell=self.same_cell * spread.variance,
            other_cell=self.other_cell * spread.variance,
            dof=spread.dof / self.design_effect,
            contrast_dof=spread.dof / self.contrast_design_effect,
            growth=spread.growth,
            growth_error=spread.growth_error * self.design_effect**0.5,
            centre=spread.centre,
        )


def _seed_effects(groups: pl.DataFrame, spread: Spread) -> _SeedEffects:
    """Correlate the residuals of runs of one seed, over groups in which every value is exact.

    A correlation is 1 less half the mean squared difference of residuals of the same seed, scaled by sqrt(n / (n - 1))
    for the group mean taken off, over their variance. Differences between cells are no better known than from these.
    """
    complete = groups.filter(pl.col("size") == pl.col("exact"))
    if complete.is_empty():
        return _SeedEffects(0.0, 0.0, 1.0, 1.0)
    group, cell, seed = (complete[name].rank("dense").to_numpy() - 1 for name in ("group", "cell", "seed"))
    value = complete["value"].to_numpy() / np.sqrt(spread.scale(complete["log_batch"].to_numpy()))
    size = complete["size"].to_numpy()
    scaled = (value - (np.bincount(group, value) / np.bincount(group))[group]) * np.sqrt(size / (size - 1))
    in_all, pairs = _half_squared_differences(scaled, seed)
    in_cell, pairs_in_cell = _half_squared_differences(scaled, seed * (cell.max() + 1) + cell)
    dof = len(value) - int(group.max()) - 1
    variance = float((scaled**2 * (size - 1) / size).sum()) / dof
    cut = variance / spread.variance
    same_cell = _correlation(in_cell, pairs_in_cell, variance, cut)
    other_cell = _correlation(in_all - in_cell, pairs - pairs_in_cell, variance, cut)
    left = max(0.0, same_cell - other_cell) / (1 - other_cell)
    alike = groups["group"].n_unique() / groups["cell"].n_unique()
    others = groups["group"].n_unique() - alike
    return _SeedEffects(
        same_cell,
        other_cell,
        design_effect=1 + (alike - 1) * same_cell**2 + others * other_cell**2,
        contrast_design_effect=max(1.0, spread.dof / dof) * (1 + (alike - 1) * left**2),
    )


def _correlation(half_squares: float, pairs: int, variance: float, cut: float) -> float:
    """Return the correlation of residuals of one seed, of values cut to `cut` of their variance by bounds.

    Of normal values with correlation ρ, those below a bound have about ρ' = ρ cut^(1 - ρ').
    """
    survivors = 1 - half_squares / pairs / variance if pairs and variance else 0.0
    if survivors <= 0:
        return 0.0
    return float(min(survivors / min(cut, 1.0) ** (1 - survivors), MAX_SHARED))


def _half_squared_differences(values: Array, code: NDArray[np.int_]) -> tuple[float, int]:
    """Return the sum of (z_i - z_j)² / 2 over the ordered pairs of values with the same code, and their number."""
    size = np.bincount(code)
    sums = size * np.bincount(code, values**2) - np.bincount(code, values) ** 2
    return float(sums.sum()), int((size * (size - 1)).sum())


def t_quantile(level: float, dof: float) -> float:
    """Return the half width, in standard errors, of a two-sided interval."""
    return float(stdtrit(dof, 0.5 + level / 2))


def lack_of_fit(variance_ratio: float, spare: int, dof: float) -> float | None:
    """Return the p-value of an F test of the residuals' variance over the replicates'; None if no point is spare.

    `spare` points beyond the parameters estimate the one, `dof` degrees of freedom the other.
    """
    return float(fdtrc(spare, dof, variance_ratio)) if spare > 0 else None
