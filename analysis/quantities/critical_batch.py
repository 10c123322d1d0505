"""Critical batch sizes, one function a definition, from the curves that were fitted to T(B)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.quantities.batch_series import Series, named_batches
from analysis.quantities.curve_fits import CurveFits, FitsBySeries, knee_of
from analysis.quantities.learning_rates import SERIES
from analysis.schemas import CRITICAL_BATCHES, FIT_CURVES, table
from analysis.statistics.families import FREE_EXPONENT, KINK, SATURATING, Array
from analysis.statistics.fit import Fit
from analysis.statistics.intervals import Estimate
from analysis.statistics.optimal_batch import cheapest_batch, largest_batch_within
from analysis.verdicts import Finding, verdict_columns
from analysis.vocabulary import DEFINITIONS, DEFINITIONS_OF_TOKENS

#: T may be this much above the least and count as optimal, in `token_optimal_5pct`.
OPTIMAL_SHARE = 0.05
_CURVE_POINTS = 64
_NOTHING = Estimate(None)
Row = dict[str, Any]


def critical_batches(
    fits_by_series: FitsBySeries,
    reference_batch_tokens: int | None = None,
    definitions: Sequence[str] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the tables `critical_batches` and `fit_curves`: every series by every definition asked for.

    `reference_batch_tokens` is that of `overhead_20pct`. By default all definitions that T(B) can give; others are
    refused where they are asked for.

    Raises: ValueError for an unknown definition, or what the fits were asked to compare.
    """
    asked = DEFINITIONS_OF_TOKENS if definitions is None else tuple(definitions)
    if unknown := set(asked) - set(DEFINITIONS):
        raise ValueError(f"definition {min(unknown)!r} is unknown: one of {', '.join(DEFINITIONS)}")
    rows, curves = [], []
    for key, fits in fits_by_series.items():
        names = dict(zip(SERIES, key, strict=True))
        rows += [names | _by_definition(definition, fits, reference_batch_tokens) for definition in asked]
        curves += [names | row for row in _curve(fits)]
    return table(rows, CRITICAL_BATCHES), table(curves, FIT_CURVES)


def emin_over_smin(fits: CurveFits) -> Row:
    """B_crit of T(B) = T_min (1 + B / B_crit): the batch that takes twice the fewest tokens and twice the fewest steps.

    Where T falls before it rises there is no T_min at vanishing batch: then it is the batch on the rising branch that
    takes twice the fewest tokens of all batches. Both readings agree where T only rises.

    Source: arXiv 1812.06162, eq. 2.11: (S/S_min - 1)(E/E_min - 1) = 1 with E = S B.
    """
    return _of_saturating("emin_over_smin", fits, fits.knee, [])


def overhead_20pct(fits: CurveFits, reference_batch_tokens: int | None) -> Row:
    """Return the batch at which steps are 20 % above linear scaling from a reference batch B_ref.

    With S = a + b/B it is B* = 1.2 B_ref + 0.2 b/a, and b/a is B_crit of the other definition: one fit serves both, and
    1.2 B_ref is a floor that flatters none and hides contrasts. B_ref is one absolute number; without it, no B*.

    Source: arXiv 2410.21676, section 3.
    """
    if reference_batch_tokens is None:
        words = "needs a reference batch: one absolute number for all optimizers"
        return _row("overhead_20pct", fits, _NOTHING, [Finding("refused", words)])
    star = fits.batch_at(0.2, reference_batch_tokens)
    reference = Finding("ok", f"reference batch {fmt.tokens(reference_batch_tokens)} tokens")
    return _of_saturating("overhead_20pct", fits, star, [reference])


def token_optimal(fits: CurveFits) -> Row:
    """Return the largest of the batches tried with the least T.

    Source: arXiv 2505.02222, eq. 6.
    """
    return _of_points("token_optimal", fits, cheapest_batch, 0.0)


def token_optimal_5pct(fits: CurveFits) -> Row:
    """Return the largest batch whose T is within 5 % of the least, between batches by interpolation."""
    return _of_points("token_optimal_5pct", fits, partial(largest_batch_within, OPTIMAL_SHARE), OPTIMAL_SHARE)


def piecewise_kink(fits: CurveFits) -> Row:
    """Return the batch up to which T stays at its least; log S falls with slope -1 before it, m beyond.

    Source: arXiv 2505.02222, appendix F.
    """
    fit = fits.kink
    knee = knee_of(fit)
    row = _row("piecewise_kink", fits, fits.bounded(knee, knee), fits.judge(fit, knee, KINK), fit)
    slope = fit.bend_estimate if fit else _NOTHING
    ends = (None if end is None else end - 1.0 for end in (slope.value, slope.low, slope.high))
    return (
        row | _columns("tail_slope", Estimate(*ends)) | _columns("t_min_tokens", fit.t_min_tokens if fit else _NOTHING)
    )


def free_exponent(fits: CurveFits) -> Row:
    """Return B_crit of T(B) = T_min (1 + (B / B_crit)^α): the batch with T = 2 T_min whatever the exponent."""
    fit = fits.free_exponent
    findings = [*fits.judge(fit, knee_of(fit), FREE_EXPONENT), *fits.compare_exponents()]
    row = _row("free_exponent", fits, fits.bounded(knee_of(fit), knee_of(fit)), findings, fit)
    return row | _columns("exponent", _exponent(fit)) | _columns("t_min_tokens", fit.t_min_tokens if fit else _NOTHING)


def branched(fits: CurveFits) -> Row:
    """Refuse: T(B) says nothing of branches from a checkpoint, which `quantities.branching` reads."""
    return _row("branched", fits, _NOTHING, [Finding("refused", "needs runs of the protocol branched_batch")])


def noise_scale(fits: CurveFits) -> Row:
    """Refuse: T(B) says nothing of gradients, which `quantities.noise_scales` reads."""
    words = "needs gradient norms at two batch sizes: runs that measure them (base.diagnostics.noise_scale)"
    return _row("noise_scale", fits, _NOTHING, [Finding("refused", words)])


_OF_SERIES: dict[str, Callable[[CurveFits], Row]] = {
    "emin_over_smin": emin_over_smin,
    "token_optimal": token_optimal,
    "token_optimal_5pct": token_optimal_5pct,
    "piecewise_kink": piecewise_kink,
    "free_exponent": free_exponent,
    "branched": branched,
    "noise_scale": noise_scale,
}

assert {*_OF_SERIES, "overhead_20pct"} == set(DEFINITIONS)


def _by_definition(definition: str, fits: CurveFits, reference_batch_tokens: int | None) -> Row:
    if definition == "overhead_20pct":
        return overhead_20pct(fits, reference_batch_tokens)
    return _OF_SERIES[definition](fits)


def _of_points(definition: str, fits: CurveFits, read: Callable[..., Estimate], share: float) -> Row:
    """Read a batch off the points alone, those included where T falls.

    Batches without a T whose T may be within `share` of the least leave open what they adjoin.
    """
    series = fits.series.whole or fits.series
    if len(series.batches) < 2:
        few = Finding("few_points", "one batch shows no optimum")
        return _row(definition, fits, _NOTHING, [few] if len(series.batches) else [])
    estimate = read(series.batches, series.log_tokens, fits.level, series.errors)
    findings = []
    if estimate.value is None:
        findings.append(Finding("not_identified", "T is still near its least at the largest batch tried"))
    if series.errors is None:
        findings.append(Finding("few_points", "no interval: no usable replicate variance"))
    within = (1 + share) * float(np.exp(series.log_tokens.min()))
    gaps = [gap for gap, bound in series.gaps.items() if bound <= within]
    findings += _hidden(estimate.value, series, gaps)
    low, high = (None if _beside(end, series.batches, gaps) else end for end in (estimate.low, estimate.high))
    return _row(definition, fits, Estimate(estimate.value, low, high), findings)


def _hidden(value: float | None, series: Series, gaps: Sequence[int]) -> list[Finding]:
    """Name the batches without a T next to the cheapest batch or to the value: they may be as cheap."""
    cheapest = float(series.batches[np.argmin(series.log_tokens)])
    near = sorted({gap for place in (value, cheapest) for gap in _beside(place, series.batches, gaps)})
    if not near:
        return []
    return [Finding("not_identified", f"T may be as low at {named_batches(near)}, where it is not known")]


def _beside(place: float | None, batches: Array, gaps: Sequence[int]) -> list[int]:
    """Return the gaps that no batch with a T separates from a place."""
    if place is None:
        return []
    ends = ((min(gap, place), max(gap, place)) for gap in gaps)
    between = [np.any((batches > low) & (batches < high)) for low, high in ends]
    return [gap for gap, separated in zip(gaps, between, strict=True) if not separated]


def _of_saturating(definition: str, fits: CurveFits, estimate: Estimate, findings: list[Finding]) -> Row:
    """Add T_min, S_min and α; neither of the first has a value where the knee lies beyond the batches on its side."""
    fit, knee = fits.headline, fits.knee
    findings = [*findings, *fits.judge(fit, knee, SATURATING), *fits.doubt()]
    row = _row(definition, fits, fits.bounded(estimate, knee), findings, fit)
    if fit is None:
        return row
    t_min, s_min, batches = fits.t_min_tokens(), fit.s_min_steps, fits.series.batches
    if knee.value is not None and knee.value < batches[0]:
        t_min = replace(t_min, value=None, low=None)
    if knee.value is not None and knee.value > batches[-1]:
        s_min = replace(s_min, value=None, low=None)
    return row | _columns("t_min_tokens", t_min) | _columns("s_min_steps", s_min) | _columns("exponent", _exponent(fit))


def _exponent(fit: Fit | None) -> Estimate:
    """Return α of a curve, 1 without an interval where it is so by definition; a curve that falls has none."""
    if fit and fit.family.falls:
        return _NOTHING
    bend = fit.bend_estimate if fit else _NOTHING
    if fit and not fit.family.is_bent:
        return Estimate(1.0)
    return Estimate(*(None if end is None else float(np.exp(end)) for end in (bend.value, bend.low, bend.high)))


def _row(definition: str, fits: CurveFits, estimate: Estimate, own: Iterable[Finding], fit: Fit | None = None) -> Row:
    """Make a row; what is not identified has no value, but what is known of its ends."""
    findings = [*fits.series.findings, *own]
    if any(finding.name == "not_identified" for finding in findings):
        estimate = replace(estimate, value=None)
    return {
        "definition": definition,
        "branch_tokens": None,
        "residuals": fits.label,
        **_columns("critical_batch_tokens", estimate),
        "tokens_to_target": fits.series.tokens_at(estimate.value),
        **_columns("t_min_tokens", _NOTHING),
        **_columns("s_min_steps", _NOTHING),
        **_columns("exponent", _NOTHING),
        **_columns("tail_slope", _NOTHING),
        "num_batches": len(fit.residuals if fit else fits.series.batches),
        "lack_of_fit_p": fit.scale.lack_of_fit_p if fit else None,
        "rms_residual": float(np.sqrt(np.mean(fit.residuals**2))) if fit else None,
        "aicc": fit.aicc if fit else None,
        **verdict_columns(findings),
    }


def _curve(fits: CurveFits) -> list[Row]:
    """Return the curve of the headline over the batches that it was fitted to."""
    fit, series = fits.headline, fits.series
    if fit is None:
        return []
    batches = (series.whole or series).batches[-len(fit.residuals) :]
    places = np.unique(np.geomspace(batches[0], batches[-1], _CURVE_POINTS).round().astype(int))
    rows = []
    for batch, tokens in zip(places.tolist(), fit.tokens_at(places), strict=True):
        steps = Estimate(*(None if end is None else end / batch for end in (tokens.value, tokens.low, tokens.high)))
        columns = _columns("tokens_to_target", tokens) | _columns("steps_to_target", steps)
        rows.append({"global_batch_tokens": batch} | columns)
    return rows


def _columns(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
