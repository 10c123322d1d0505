"""T(B) of one optimizer at one target as the fits take it: the points, how sure they are, what stands against them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.quantities.cells import Cells
from analysis.statistics.families import Array
from analysis.statistics.noise import Errors, t_quantile
from analysis.verdicts import Finding

#: A fall of T with B, in log T, that counts as real where there are no replicates to tell: twice common seed noise. The
#: table of arXiv 2410.21676 has one of 0.10, and the published law takes it for noise.
MIN_FALL_WITHOUT_REPLICATES = 0.2

#: Reason of a cell; what it is to the fit that has the cell; the same in words: first of a cell with a T, then of one
#: without.
_CAVEATS = (
    ("edge_of_grid", "edge_of_grid", "best learning rate outside those tried"),
    ("warmup_confounded", "warmup_confounded", "target too close to the warmup"),
    ("mid_schedule", "mid_schedule", "read while the learning rate decays"),
    ("censored", "censored", "some runs fell short of the target"),
    ("diverged", "diverged", "some runs diverged"),
    ("single_rate", "single_rate", "only one learning rate was tried"),
    ("reached_at_first_eval", "reached_at_first_eval", "some runs were at the target at their first evaluation"),
)
_LEFT_OUT = (
    ("censored", "censored", "left out, since some runs fell short of the target"),
    (
        "reached_at_first_eval",
        "reached_at_first_eval",
        "left out, since runs were at the target at their first evaluation",
    ),
    ("not_reached", "censored", "left out, since no run reached the target"),
    ("diverged", "diverged", "left out, since runs diverged"),
    ("refused", "refused", "left out, since no loss law can be had"),
)


@dataclass(frozen=True)
class Series:
    """The batches that a fit takes, smallest first; `batches` and `log_tokens` [n], `resamples` of log T [r, n].

    `resamples` of the seeds decide the intervals where there are any. `whole` is the series with
    the batches that a fit leaves out because T falls there; None where there are none. `gaps` are the batches without a
    T, each with the tokens that T is known to exceed there.
    """

    batches: Array
    log_tokens: Array
    errors: Errors | None
    resamples: Array | None
    findings: tuple[Finding, ...]
    whole: "Series | None" = None
    gaps: Mapping[int, float] = field(default_factory=dict)

    def part(self, start: int) -> "Series":
        """Return the series from the batch at a place on."""
        errors, drawn = self.errors, self.resamples
        return replace(
            self,
            batches=self.batches[start:],
            log_tokens=self.log_tokens[start:],
            errors=None if errors is None else errors.part(start),
            resamples=None if drawn is None else drawn[:, start:],
        )

    def tokens_at(self, global_batch_tokens: float | None) -> float | None:
        """Return T between the batches, log T interpolated in log B; None beyond them."""
        if global_batch_tokens is None or not self.batches[0] <= global_batch_tokens <= self.batches[-1]:
            return None
        return float(np.exp(np.interp(np.log(global_batch_tokens), np.log(self.batches), self.log_tokens)))


def series_of(estimated: Cells, names: Mapping[str, Any], cells: pl.DataFrame, level: float) -> Series:
    """Collect the cells of a series that have a T; their caveats carry over to the fit.

    Where T falls from the smallest batches on and then rises, no curve fits both: the rising branch alone is taken, and
    a finding says so.
    """
    known = cells.filter(_has_tokens()).sort("global_batch_tokens")
    unknown = cells.filter(~_has_tokens())
    carried = [*_carried(known, _CAVEATS, known.height), *_carried(unknown, _LEFT_OUT, cells.height)]
    carried += _reserved(known)
    batches = known["global_batch_tokens"].to_list()
    whole = Series(
        batches=np.array(batches, float),
        log_tokens=known["tokens_to_target"].log().to_numpy(),
        errors=estimated.errors_of(names, batches),
        resamples=estimated.resamples_of(names, batches),
        findings=tuple(carried),
        gaps=_gaps(unknown),
    )
    start = _start_of_rise(whole.log_tokens, whole.errors, level)
    if not start:
        return whole
    words = f"T falls before it rises: its rise is fitted, from batch {fmt.tokens(whole.batches[start])} on"
    return replace(whole.part(start), findings=(Finding("non_monotone", words), *carried), whole=whole)


def _gaps(unknown: pl.DataFrame) -> dict[int, float]:
    bounds = unknown.select("global_batch_tokens", pl.col("tokens_to_target_low").fill_null(0.0))
    return dict(bounds.iter_rows())


def named_batches(batches: Sequence[float]) -> str:
    """Write `batch 1K`, `batches 1K and 4K`."""
    return f"batch{'es' if len(batches) > 1 else ''} {fmt.listed([fmt.tokens(batch) for batch in batches])}"


def count_batches(batches: Sequence[float] | Array) -> str:
    """Write `1 batch`, `4 batches`."""
    return f"{len(batches)} batch{'' if len(batches) == 1 else 'es'}"


def _has_tokens() -> pl.Expr:
    return pl.col("tokens_to_target").is_not_null()


def _start_of_rise(log_tokens: Array, errors: Errors | None, level: float) -> int:
    """Return the index of the smallest T if T falls significantly before it and rises after, else 0.

    Each smaller batch is compared with the minimum by a one-sided t test, Bonferroni over all pairs of batches, since
    the minimum was picked for being low.
    """
    lowest = int(np.argmin(log_tokens)) if len(log_tokens) else 0
    if lowest == len(log_tokens) - 1:
        return 0
    pairs = len(log_tokens) * (len(log_tokens) - 1) / 2
    for index in range(lowest):
        least = MIN_FALL_WITHOUT_REPLICATES
        if errors is not None:
            least = t_quantile(1 - (1 - level) / pairs, errors.contrast_dof) * errors.of_difference(index, lowest)
        if log_tokens[index] - log_tokens[lowest] > least:
            return lowest
    return 0


def _carried(cells: pl.DataFrame, caveats: Sequence[tuple[str, str, str]], all_: int) -> list[Finding]:
    """Hand the cells' own reasons on to the fit; the batches are named unless there are `all_`."""
    findings = []
    for reason, name, words in caveats:
        affected = cells.filter(pl.col("reasons").str.split(", ").list.contains(reason))
        if affected.height:
            findings.append(Finding(name, words if affected.height == all_ else f"{words}: {_named(affected)}"))
    return findings


def _reserved(known: pl.DataFrame) -> list[Finding]:
    """Hand on what the grid leaves open about the rates of cells with a T."""
    reserved = known.filter(pl.col("lr_reason") != "").group_by(["lr_reason"], maintain_order=True)
    return [
        Finding("ok", str(reason) if cells.height == known.height else f"{reason}: {_named(cells)}")
        for (reason,), cells in reserved
    ]


def _named(cells: pl.DataFrame) -> str:
    return named_batches(cells["global_batch_tokens"].sort().to_list())
