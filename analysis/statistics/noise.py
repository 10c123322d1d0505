"""How much log T of one run varies from seed to seed, estimated from all repeated runs of an optimizer together.

Two or three seeds say next to nothing about their own spread, and a bootstrap over them covers 47-76 % where it says
90 %. So the variance is pooled over all groups of runs that differ in their seeds alone, and intervals take the t
quantile at the pooled degrees of freedom. Assumption: log T is normal, with one spread for all cells of an optimizer.

Runs of the same seed share initial weights and the order of the data, so their errors go together, even across learning
rates and batches. Contrasts between such runs are more certain than the runs themselves, and repeated groups that share
seeds are worth fewer degrees of freedom than they count: `Noise` carries both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import fdtrc, stdtrit

Array = NDArray[np.float64]

#: Fewer degrees of freedom than these give no interval.
MIN_DOF = 3

#: Seeds explain at most this share of the variance: all of it would leave contrasts without error, and no inverse.
MAX_SHARED = 0.999

#: Why there is no interval where `pooled` gives None.
NO_NOISE = "no interval: too few repeated runs to estimate the noise"

#: A misfit less likely than this widens the intervals.
LACK_OF_FIT_LEVEL = 0.05


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

    def part(self, start: int) -> "Errors":
        """Return the errors of the cells from `start` on."""
        return Errors(self.covariance[start:, start:], self.dof, self.contrast_dof)


@dataclass(frozen=True)
class Noise:
    """Errors of log T of single runs.

    variance: of one run around the mean of its group, estimated with `dof` degrees of freedom.
    same_cell, other_cell: covariance of two runs of the same seed at another rate of the cell, and in another cell.
    """

    variance: float
    same_cell: float
    other_cell: float
    dof: float
    contrast_dof: float

    def of_means(self, seeds: Sequence[Sequence[str]]) -> Errors:
        """Return the errors of the cells' mean log T, given the seeds of the runs of each."""
        shared = np.array([[len(set(a) & set(b)) / (len(a) * len(b)) for b in seeds] for a in seeds])
        own = np.diag([(self.variance - self.other_cell) / len(a) for a in seeds])
        same_seeds = all(set(other) == set(seeds[0]) for other in seeds)
        return Errors(own + self.other_cell * shared, self.dof, self.contrast_dof if same_seeds else self.dof)


def pooled(runs: pl.DataFrame) -> Noise | None:
    """Pool the variance over groups of repeated runs; None below MIN_DOF degrees of freedom, or if nothing varies.

    `runs` has columns group (runs alike but for their seed), cell, seed and value. The sum of squares over the degrees
    of freedom is unbiased however the groups are correlated. A covariance is the variance less half the mean squared
    difference of residuals of the same seed, scaled by sqrt(n / (n - 1)) for the group mean taken off. Correlations ρ
    between groups divide the degrees of freedom by the mean over groups of Σ ρ² (Satterthwaite: two moments matched).
    """
    mean, size = pl.col("value").mean().over("group"), pl.len().over("group")
    runs = runs.with_columns(deviation=pl.col("value") - mean, size=size).filter(pl.col("size") > 1)
    groups, cells = runs["group"].n_unique(), runs["cell"].n_unique()
    nominal_dof = runs.height - groups
    variance = float((runs["deviation"] ** 2).sum()) / max(nominal_dof, 1)
    if nominal_dof < MIN_DOF or variance == 0.0:
        return None
    runs = runs.with_columns(scaled=pl.col("deviation") * (pl.col("size") / (pl.col("size") - 1)).sqrt())
    in_all, pairs = _half_squared_differences(runs, ["seed"])
    in_cell, pairs_in_cell = _half_squared_differences(runs, ["seed", "cell"])
    same_cell = max(0.0, variance - in_cell / pairs_in_cell) if pairs_in_cell else 0.0
    pairs_across = pairs - pairs_in_cell
    other_cell = max(0.0, variance - (in_all - in_cell) / pairs_across) if pairs_across else 0.0
    same_cell, other_cell = (min(shared, MAX_SHARED * variance) for shared in (same_cell, other_cell))
    rho_same, rho_other = same_cell / variance, other_cell / variance
    rho_left = max(0.0, rho_same - rho_other) / (1 - rho_other)
    alike = groups / cells
    contrast_dof = nominal_dof / (1 + (alike - 1) * rho_left**2)
    dof = nominal_dof / (1 + (alike - 1) * rho_same**2 + (groups - alike) * rho_other**2)
    return Noise(variance, same_cell, other_cell, dof, contrast_dof)


def t_quantile(level: float, dof: float) -> float:
    """Return the half width, in standard errors, of a two-sided interval."""
    return float(stdtrit(dof, 0.5 + level / 2))


def lack_of_fit(variance_ratio: float, spare: int, dof: float) -> float | None:
    """Return the p-value of an F test of the residuals' variance over the replicates'; None if no point is spare.

    `spare` points beyond the parameters estimate the one, `dof` degrees of freedom the other.
    """
    return float(fdtrc(spare, dof, variance_ratio)) if spare > 0 else None


def _half_squared_differences(runs: pl.DataFrame, same: list[str]) -> tuple[float, int]:
    """Return the sum of (z_i - z_j)² / 2 over the ordered pairs of rows that agree in `same`, and their number."""
    size, square = pl.len(), (pl.col("scaled") ** 2).sum()
    sums = runs.group_by(same, maintain_order=True).agg(
        sum=size * square - pl.col("scaled").sum() ** 2, pairs=size * (size - 1)
    )
    return float(sums["sum"].sum()), int(sums["pairs"].sum())
