"""Critical batch sizes, one function a definition, from the cells' T(B)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.quantities.cells import Cells, why_unreached
from analysis.quantities.learning_rates import SERIES
from analysis.schemas import CRITICAL_BATCHES, FIT_CURVES, table
from analysis.statistics.fit import NUM_PARAMETERS, Array, Estimate, Fit, fit_saturating
from analysis.statistics.noise import Errors, Noise, t_quantile

#: A fall of T with B, in log T, that counts as real where there are no replicates to tell.
MIN_FALL_WITHOUT_REPLICATES = 0.1
_CURVE_POINTS = 64
_NOTHING = Estimate(None)

#: Verdict of a cell, verdict of the fit that has or lacks it, in words; later ones prevail.
_CAVEATS = (
    ("edge_of_grid", "edge_of_grid", "best learning rate outside those tried"),
    ("warmup_confounded", "warmup_confounded", "target too close to the warmup"),
    ("mid_schedule", "mid_schedule", "read while the learning rate decays"),
    ("censored", "censored", "left out, since some runs fell short of the target"),
    (
        "reached_at_first_eval",
        "reached_at_first_eval",
        "left out, since runs were at the target at their first evaluation",
    ),
    ("not_reached", "censored", "left out, since no run reached the target"),
    ("diverged", "censored", "left out, since all runs diverged"),
)


@dataclass(frozen=True)
class SeriesFit:
    """The fit of one optimizer at one target: a Fit, or None with the reason; and what qualifies it."""

    fit: Fit | None
    batches: Array
    verdict: str
    reason: str


def critical_batches(
    estimated: Cells, level: float, reference_batch_tokens: int | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the tables `critical_batches` and `fit_curves`: every series by every definition."""
    rows, curves = [], []
    for key, cells in estimated.cells.group_by(SERIES, maintain_order=True):
        names = dict(zip(SERIES, key, strict=True))
        unreached = why_unreached(estimated.runs.filter(**names))
        if unreached:
            series = SeriesFit(None, np.array([]), *unreached)
        else:
            series = fit_series(cells, estimated.chosen.filter(**names), estimated.noise[key], level)
        rows.append(names | emin_over_smin(series))
        rows.append(names | overhead_20pct(series, reference_batch_tokens))
        curves += [names | row for row in _curve(series)]
    return table(rows, CRITICAL_BATCHES), table(curves, FIT_CURVES)


def emin_over_smin(series: SeriesFit) -> dict[str, Any]:
    """B_crit of T(B) = T_min (1 + B / B_crit): the batch that takes twice the fewest tokens and twice the fewest steps.

    Source: arXiv 1812.06162, eq. 2.11: (S/S_min - 1)(E/E_min - 1) = 1 with E = S B.
    """
    estimate = series.fit.critical_batch_tokens if series.fit else _NOTHING
    return _row("emin_over_smin", series, estimate, series.verdict, series.reason)


def overhead_20pct(series: SeriesFit, reference_batch_tokens: int | None) -> dict[str, Any]:
    """Return the batch at which steps are 20 % above linear scaling from a reference batch B_ref.

    With S = a + b/B it is B* = 1.2 B_ref + 0.2 b/a, and b/a is B_crit of the other definition: one fit serves both, and
    1.2 B_ref is a floor that flatters none and hides contrasts. B_ref is one absolute number; without it, no B*.

    Source: arXiv 2410.21676, section 3.
    """
    if reference_batch_tokens is None:
        reason = "needs a reference batch: one absolute number for all optimizers"
        return _row("overhead_20pct", series, _NOTHING, "refused", reason)
    ends = series.fit.critical_batch_tokens if series.fit else _NOTHING
    b_star = [None if x is None else 1.2 * reference_batch_tokens + 0.2 * x for x in (ends.value, ends.low, ends.high)]
    reason = "; ".join(filter(None, (f"reference batch {fmt.tokens(reference_batch_tokens)} tokens", series.reason)))
    return _row("overhead_20pct", series, Estimate(*b_star), series.verdict, reason)


def fit_series(cells: pl.DataFrame, runs: pl.DataFrame, noise: Noise | None, level: float) -> SeriesFit:
    """Fit T(B) to the cells that have a T; their caveats carry over to the fit.

    Where T falls from the smallest batches on and then rises, no curve of this family fits: the rising branch alone is
    fitted, and the verdict says so.
    """
    known = cells.filter(pl.col("tokens_to_target").is_not_null()).sort("global_batch_tokens")
    batches = known["global_batch_tokens"].to_numpy().astype(float)
    log_tokens = known["tokens_to_target"].log().to_numpy()
    errors = _errors(batches, runs, noise)
    start = _start_of_rise(log_tokens, errors, level)
    batches, log_tokens = batches[start:], log_tokens[start:]
    verdict, reasons = _caveats(cells, start, batches)
    if len(batches) <= NUM_PARAMETERS:
        few = f"{_num_batches(batches)} to fit, and the curve has {NUM_PARAMETERS} parameters"
        return SeriesFit(None, batches, verdict if start else "few_points", "; ".join([*reasons, few]))
    fit = fit_saturating(batches, log_tokens, level, errors.part(start) if errors else None)
    verdict, more = _judge(fit, batches, verdict)
    return SeriesFit(fit, batches, verdict, "; ".join([*reasons, *more]))


def _errors(batches: Array, runs: pl.DataFrame, noise: Noise | None) -> Errors | None:
    if noise is None or not len(batches):
        return None
    return noise.of_means([runs.filter(pl.col("global_batch_tokens") == int(b))["seed"].to_list() for b in batches])


def _start_of_rise(log_tokens: Array, errors: Errors | None, level: float) -> int:
    """Return the index of the smallest T if T falls significantly before it, else 0.

    Each smaller batch is compared with the minimum by a one-sided t test, Bonferroni over all pairs of batches, since
    the minimum was picked for being low.
    """
    lowest = int(np.argmin(log_tokens)) if len(log_tokens) else 0
    pairs = len(log_tokens) * (len(log_tokens) - 1) / 2
    for index in range(lowest):
        least = MIN_FALL_WITHOUT_REPLICATES
        if errors is not None:
            least = t_quantile(1 - (1 - level) / pairs, errors.contrast_dof) * errors.of_difference(index, lowest)
        if log_tokens[index] - log_tokens[lowest] > least:
            return lowest
    return 0


def _caveats(cells: pl.DataFrame, start: int, batches: Array) -> tuple[str, list[str]]:
    """Hand the cells' own verdicts on to the fit: what is missing from it, and what is doubtful in it."""
    verdict, reasons = "ok", []
    for cell_verdict, fit_verdict, meaning in _CAVEATS:
        affected = cells.filter(pl.col("verdict") == cell_verdict)["global_batch_tokens"].sort().to_list()
        if affected:
            verdict = fit_verdict
            reasons.append(f"{meaning}: {_named(affected)}")
    known = cells.filter(pl.col("tokens_to_target").is_not_null(), pl.col("lr_reason") != "")
    for (lr_reason,), reserved in known.group_by(["lr_reason"], maintain_order=True):
        reasons.append(f"{lr_reason}: {_named(reserved['global_batch_tokens'].sort().to_list())}")
    if start:
        verdict = "non_monotone"
        reasons.insert(0, f"T falls before it rises: fitted from batch {fmt.tokens(batches[0])} on")
    return verdict, reasons


def _named(batches: list[int]) -> str:
    return f"batch{'es' if len(batches) > 1 else ''} {fmt.listed([fmt.tokens(batch) for batch in batches])}"


def _num_batches(batches: Array) -> str:
    return f"{len(batches)} batch{'' if len(batches) == 1 else 'es'}"


def _judge(fit: Fit, batches: Array, verdict: str) -> tuple[str, list[str]]:
    reasons = []
    estimate = fit.critical_batch_tokens
    if fit.allowed is None:
        verdict = "few_points" if verdict == "ok" else verdict
        reasons.append(
            f"no interval: {_num_batches(batches)} for {NUM_PARAMETERS} parameters and no usable replicate variance"
        )
    elif estimate.high is None or estimate.low is None:
        verdict = verdict if verdict == "non_monotone" else "not_identified"
        ends = [side for side, end in (("below", estimate.low), ("above", estimate.high)) if end is None]
        reasons.append(f"the knee is not bracketed: it may lie {' or '.join(ends)} the batches tried")
    elif estimate.value is not None and not batches[0] <= estimate.value <= batches[-1]:
        verdict = verdict if verdict == "non_monotone" else "not_identified"
        side = "below" if estimate.value < batches[0] else "above"
        reasons.append(f"extrapolated: the knee lies {side} all batches tried")
    if fit.birge_factor > 1:
        verdict = "misfit" if verdict == "ok" else verdict
        misfit = f"the curve misses the points by more than the seed noise (p = {fit.lack_of_fit_p:.2g})"
        reasons.append(f"{misfit}, so the interval is widened {fit.birge_factor:.1f} times")
    return verdict, reasons


def _row(definition: str, series: SeriesFit, estimate: Estimate, verdict: str, reason: str) -> dict[str, Any]:
    fit = series.fit
    t_min, s_min = (fit.t_min_tokens, fit.s_min_steps) if fit else (_NOTHING, _NOTHING)
    return {
        "definition": definition,
        "residuals": "log",
        **_columns("critical_batch_tokens", estimate),
        **_columns("t_min_tokens", t_min),
        **_columns("s_min_steps", s_min),
        **_columns("exponent", Estimate(1.0) if fit else _NOTHING),
        **_columns("tail_slope", _NOTHING),
        "num_batches": len(series.batches),
        "lack_of_fit_p": fit.lack_of_fit_p if fit else None,
        "rms_residual": float(np.sqrt(np.mean(fit.residuals**2))) if fit else None,
        "aicc": None,
        "verdict": verdict,
        "reasons": "" if verdict == "ok" else verdict,
        "explanation": reason,
    }


def _curve(series: SeriesFit) -> list[dict[str, Any]]:
    """Return the fitted curve over the batches that it was fitted to."""
    if series.fit is None:
        return []
    rows = []
    for batch in np.unique(np.geomspace(series.batches[0], series.batches[-1], _CURVE_POINTS).round().astype(int)):
        tokens = series.fit.tokens_at(batch)
        steps = Estimate(*(None if x is None else x / batch for x in (tokens.value, tokens.low, tokens.high)))
        columns = _columns("tokens_to_target", tokens) | _columns("steps_to_target", steps)
        rows.append({"global_batch_tokens": int(batch)} | columns)
    return rows


def _columns(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
