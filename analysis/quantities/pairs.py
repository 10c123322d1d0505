"""Baseline and challenger at one target, side by side: log T of both with the errors that they share.

Runs of the same seed saw the same data from the same initial weights, so what the seed adds to log T is in part common
to both sides and cancels in their ratio.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis import format as fmt
from analysis.quantities.batch_series import named_batches
from analysis.quantities.cells import Cells, complete_groups
from analysis.statistics.noise import Errors, Noise, pooled
from analysis.verdicts import Finding, names_of

Array = NDArray[np.float64]

#: Optimizers are compared within such a group of cells.
CONTEXT = ("model", "protocol", "target_loss_nats")


#: A fit lacks the cells that have no T for this reason.
_AS_GAP = {"not_reached": "censored"}


@dataclass(frozen=True)
class Sides:
    """log T [n] of cells of the baseline, then of the challenger's, at `batches` of each.

    `errors` are theirs together, None where the noise is not known; `resamples` [resamples, n] decide where there are
    any. `num_pairs` counts the pairs of runs with the same seeds by batch; a batch that is not in it is unpaired.
    """

    batches: tuple[list[int], list[int]]
    log_tokens: Array
    errors: Errors | None
    resamples: Array | None
    num_pairs: dict[int, int]


@dataclass(frozen=True)
class Pair:
    """Two optimizers in one context, `names` in all; `frames` are their rows of the table `cells`, by batch."""

    names: dict[str, Any]
    estimated: Cells
    frames: tuple[pl.DataFrame, pl.DataFrame]

    @property
    def series(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The names of the series of baseline and challenger."""
        context = {name: self.names[name] for name in CONTEXT}
        return context | {"optimizer": self.names["baseline"]}, context | {"optimizer": self.names["challenger"]}

    @property
    def batches(self) -> list[int]:
        """The batches that both sides ran at."""
        return sorted(set(self.frames[0]["global_batch_tokens"]) & set(self.frames[1]["global_batch_tokens"]))

    @property
    def apart(self) -> Finding | None:
        """Why nothing compares the two sides where they share no batch, as with batches in two units; else None."""
        if self.batches:
            return None
        tried = [frame["global_batch_tokens"].unique().sort().to_list() for frame in self.frames]
        spans = fmt.listed([fmt.span(own[0], own[-1]) for own in tried])
        disjoint = tried[0][-1] < tried[1][0] or tried[1][-1] < tried[0][0]
        ask = " (is one of them in another unit?)" if disjoint else ""
        return Finding("refused", f"{fmt.listed(self.shown)} share no batch: {spans}{ask}")

    @cached_property
    def known(self) -> tuple[dict[int, float], dict[int, float]]:
        """The log T of each side by batch, where it has one."""
        baseline, challenger = (
            {batch: float(np.log(tokens)) for batch, tokens in rows if tokens is not None}
            for rows in (frame.select("global_batch_tokens", "tokens_to_target").iter_rows() for frame in self.frames)
        )
        return baseline, challenger

    @property
    def shown(self) -> tuple[str, str]:
        """The names of both optimizers as people read them."""
        return fmt.optimizer_name(self.names["baseline"]), fmt.optimizer_name(self.names["challenger"])

    def doubts(self, *batches: int) -> list[Finding]:
        """Return the findings of the cells of both sides, at some batches or all, with the batches unless it is all.

        That one cell alone has no interval is none about both.
        """
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for name, frame in zip(self.shown, self.frames, strict=True):
            for batch, reasons in frame.select("global_batch_tokens", "reasons").iter_rows():
                for reason in names_of(reasons):
                    if reason != "few_points" and (not batches or batch in batches):
                        found[name, reason].append(batch)
        num_batches = dict(zip(self.shown, map(len, self.frames), strict=True))
        return [
            Finding(
                _AS_GAP.get(reason, reason),
                f"{name}: {fmt.verdict(reason)}{'' if len(own) == num_batches[name] else f': {named_batches(own)}'}",
            )
            for (name, reason), own in found.items()
        ]

    @property
    def noise_of_differences(self) -> Noise | None:
        """The noise of log T_A - log T_M of runs that pair."""
        return self._noise_of_pairs[1]

    def num_grid_pairs(self, batch: int) -> int:
        """Return how many seeds the grids of both sides share at a batch; 0 unless they have the same ones."""
        seeds = [own.get(batch, []) for own in self._grid_seeds]
        return len(seeds[0]) if seeds[0] == seeds[1] else 0

    @cached_property
    def _grid_seeds(self) -> list[dict[int, list[str]]]:
        """The seeds of each side's grid, by batch."""
        grids = (self.estimated.runs_of(series).filter(stage="grid") for series in self.series)
        by_batch = (grid.group_by("global_batch_tokens").agg(pl.col("seed").unique().sort()) for grid in grids)
        return [dict(own.iter_rows()) for own in by_batch]

    def sides(self, baseline: list[int], challenger: list[int]) -> Sides:
        """Put cells that have a T side by side, at the given batches of each."""
        batches = (baseline, challenger)
        log_tokens = np.array([own[batch] for own, chosen in zip(self.known, batches, strict=True) for batch in chosen])
        errors, num_pairs = self._errors(batches)
        resamples = [self.estimated.resamples_of(*of) for of in zip(self.series, batches, strict=True)]
        drawn = [own for own in resamples if own is not None]
        return Sides(batches, log_tokens, errors, np.hstack(drawn) if len(drawn) == len(batches) else None, num_pairs)

    def _errors(self, batches: tuple[list[int], list[int]]) -> tuple[Errors | None, dict[int, int]]:
        """Return the errors of both sides together, and the pairs of runs by batch."""
        own = [self.estimated.errors_of(*of) for of in zip(self.series, batches, strict=True)]
        if own[0] is None or own[1] is None:
            return None, {}
        apart = _apart(own[0], own[1])
        shared = self._same_seeds(batches)
        together, differences = self._noise_of_pairs if shared else (None, None)
        if together is None or differences is None:
            return apart, {}
        places = [batches[0].index(batch) for batch in shared]
        places += [len(batches[0]) + batches[1].index(batch) for batch in shared]
        errors = _paired(apart, places, shared, together, differences)
        return errors, {batch: len(seeds) for batch, seeds in shared.items()}

    def _same_seeds(self, batches: tuple[list[int], list[int]]) -> dict[int, list[str]]:
        """Return the seeds by batch where both sides have the same; a run that fell short is paired all the same."""
        seeds = []
        for series in self.series:
            runs = self.estimated.chosen_of(series)
            by_batch = runs.group_by("global_batch_tokens").agg(pl.col("seed").sort())
            seeds.append(dict(by_batch.iter_rows()))
        both = [batch for batch in batches[0] if batch in batches[1]]
        return {b: seeds[0][b] for b in both if b in seeds[0] and seeds[0][b] == seeds[1].get(b)}

    @cached_property
    def _noise_of_pairs(self) -> tuple[Noise | None, Noise | None]:
        """The noise of log T_A + log T_M and of log T_A - log T_M: runs pair by stage, seed and rank of their rate."""
        rank = pl.struct("tuning", "peak_lr").rank("dense").over("global_batch_tokens", "stage")
        keys = ["global_batch_tokens", "stage", "rank", "seed"]
        runs = (complete_groups(self.estimated.runs_of(series)) for series in self.series)
        baseline, challenger = (own.with_columns(rank=rank).select(*keys, "log_tokens") for own in runs)
        paired = baseline.join(challenger, on=keys, suffix="_challenger")
        batch = pl.col("global_batch_tokens")
        names = {"group": pl.format("{} {} {}", *keys[:3]), "cell": batch, "log_batch": batch.log()}
        values = (pl.col("log_tokens") + sign * pl.col("log_tokens_challenger") for sign in (1, -1))
        together, differences = (pooled(paired.select("seed", **names, value=value)) for value in values)
        return together, differences


def pairs(estimated: Cells, baseline: str) -> list[Pair]:
    """Return the baseline with every other optimizer of every model, protocol and target that it has cells of."""
    found = []
    for key, cells in estimated.cells.sort("global_batch_tokens").group_by(CONTEXT, maintain_order=True):
        frames = {name: own for (name,), own in cells.group_by(["optimizer"], maintain_order=True)}
        context = dict(zip(CONTEXT, key, strict=True)) | {"baseline": baseline}
        if baseline in frames:
            challengers = sorted(set(frames) - {baseline})
            sides = {name: (frames[baseline], frames[name]) for name in challengers}
            found += [Pair(context | {"challenger": name}, estimated, own) for name, own in sides.items()]
    return found


def _apart(baseline: Errors, challenger: Errors) -> Errors:
    """Return the errors of two sides that share nothing; degrees of freedom for their sum by Welch-Satterthwaite."""
    sizes = [len(errors.covariance) for errors in (baseline, challenger)]
    covariance = np.zeros((sum(sizes), sum(sizes)))
    covariance[: sizes[0], : sizes[0]] = baseline.covariance
    covariance[sizes[0] :, sizes[0] :] = challenger.covariance
    variances = [np.mean(np.diag(errors.covariance)) for errors in (baseline, challenger)]
    dof, contrast_dof = (
        float(sum(variances) ** 2 / sum(variance**2 / nu for variance, nu in zip(variances, dofs, strict=True)))
        for dofs in ((baseline.dof, challenger.dof), (baseline.contrast_dof, challenger.contrast_dof))
    )
    return Errors(covariance, dof, contrast_dof)


def _paired(
    apart: Errors, places: list[int], seeds: Mapping[int, Sequence[str]], together: Noise, differences: Noise
) -> Errors:
    """Correlate the cells at `places`, those of the baseline and then those of the challenger, with `seeds` by batch.

    The cells keep their variances; the correlations are those of runs that pair, of which sums and differences are
    independent where both sides vary alike. Assumption: pairs vary alike at the chosen rates and at rates of the same
    rank in the two grids.
    """
    of_runs = (list(seeds.values()), np.log(list(seeds)))
    sums, of_difference = (noise.of_means(*of_runs) for noise in (together, differences))
    own, cross = sums.covariance + of_difference.covariance, sums.covariance - of_difference.covariance
    paired = np.block([[own, cross], [cross, own]])
    scale = np.sqrt(np.diag(apart.covariance)[places] / np.diag(paired))
    covariance = apart.covariance.copy()
    covariance[places, :] = covariance[:, places] = 0.0
    covariance[np.ix_(places, places)] = scale[:, None] * paired * scale
    if len(places) == len(covariance):
        return Errors(covariance, of_difference.dof, of_difference.contrast_dof)
    dofs = (min(apart.dof, of_difference.dof), min(apart.contrast_dof, of_difference.contrast_dof))
    return Errors(covariance, *dofs)
