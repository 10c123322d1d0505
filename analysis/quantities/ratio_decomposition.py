"""What the token ratio is made of: a gain at small batches, R_0, and a larger critical batch, R_∞ / R_0.

With T(B) = T_min (1 + B / B_crit) for both optimizers, R(B) goes from R_0, the ratio of T_min, to R_∞, that of
S_min = T_min / B_crit, and B_crit of the challenger over that of the baseline is R_∞ / R_0. With an exponent α of
B / B_crit, common to both, R_∞ is R_0 times the α-th power of that ratio.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.quantities.batch_series import count_batches
from analysis.quantities.curve_fits import CurveFits, FitsBySeries
from analysis.quantities.learning_rates import SERIES
from analysis.quantities.pairs import Pair, Sides
from analysis.schemas import RATIO_DECOMPOSITION, table
from analysis.statistics.intervals import Estimate
from analysis.statistics.joint_fit import JointFit, common_exponent, fit_two, resampled_exponent, resampled_ratios
from analysis.statistics.residuals import MIN_SPARE_POINTS, Observed, Scale
from analysis.statistics.two_curves import TwoCurves
from analysis.verdicts import Finding, verdict_columns

Array = NDArray[np.float64]

_RATIOS = ("ratio_small_batch", "ratio_large_batch", "critical_batch_ratio")
_TAILS = ("tail_slope_baseline", "tail_slope_challenger", "tail_slope_difference")
_QUANTITIES = (*_RATIOS, "critical_batch_ratio_equal_tokens", "exponent", *_TAILS)
#: Batches that a curve of two parameters needs on either side.
_MIN_BATCHES = 3
#: Parameters of both curves with one α, and the variance.
_NUM_PARAMETERS_EXPONENT = 6
_NO_INTERVAL = "no interval: too few repeated runs, and too few batches without them"


class Quantity(NamedTuple):
    """One number of the decomposition, and what stands against it."""

    name: str
    estimate: Estimate
    findings: list[Finding]


@dataclass(frozen=True)
class Fitted:
    """One pair at one target with its joint fit; None with fewer than three batches on one side."""

    pair: Pair
    both: tuple[CurveFits, CurveFits]
    sides: Sides
    curves: TwoCurves
    fit: JointFit | None
    level: float

    @cached_property
    def outside(self) -> dict[str, list[Finding]]:
        """Of which optimizer B_crit may lie below or above its batches: T_min or S_min is then extrapolated."""
        findings: dict[str, list[Finding]] = {"below": [], "above": []}
        fit = self.fit
        assert fit is not None
        for side, (name, batches) in enumerate(zip(self.pair.shown, self.sides.batches, strict=True)):
            knee, has_interval = fit.knee(side), fit.scale.allowed_batch is not None
            assert knee.value is not None
            is_outside = {
                "below": knee.value < batches[0] or (has_interval and knee.low is None),
                "above": knee.value > batches[-1] or (has_interval and knee.high is None),
            }
            for end in (end for end, holds in is_outside.items() if holds):
                words = f"{name}: the critical batch may lie {end} the batches tried"
                findings[end].append(Finding("not_identified", words))
        return findings

    @property
    def carried(self) -> list[Finding]:
        """What stands against the cells of either side."""
        named = zip(self.pair.shown, self.both, strict=True)
        return [Finding(name, f"{shown}: {words}") for shown, own in named for name, words in own.series.findings]


def ratio_decomposition(compared: Sequence[Pair], fits_by_series: FitsBySeries, level: float) -> pl.DataFrame:
    """Return the table `ratio_decomposition`: a row per pair and quantity.

    Both optimizers are fitted jointly to their cells, each from its smallest T on where T falls before it rises. One α
    for both is tested where the points allow it, and the tails are those of the kink model of each.

    Source: R_0 and R_∞ follow from arXiv 1812.06162, eq. 2.11.
    """
    rows = []
    fits = [_fit(pair, fits_by_series, level) for pair in compared if not pair.apart]
    for pair in compared:
        if pair.apart:
            unknown = {"value": None, "value_low": None, "value_high": None} | verdict_columns([pair.apart])
            rows += [pair.names | {"quantity": name} | unknown for name in _QUANTITIES]
    for own in fits:
        for name, estimate, findings in [*_joint(own), _at_equal_tokens(own, fits), *_tails(own)]:
            ends = {"value": estimate.value, "value_low": estimate.low, "value_high": estimate.high}
            rows.append(own.pair.names | {"quantity": name} | ends | verdict_columns([*findings, *own.carried]))
    return table(rows, RATIO_DECOMPOSITION)


def _fit(pair: Pair, fits_by_series: FitsBySeries, level: float) -> Fitted:
    baseline, challenger = (fits_by_series[tuple(names[name] for name in SERIES)] for names in pair.series)
    batches = (baseline.series.batches, challenger.series.batches)
    sides = pair.sides(*(own.astype(int).tolist() for own in batches))
    log_batch = np.log(np.concatenate(batches))
    observed = Observed(log_batch, sides.log_tokens, sides.errors, "log", "squares")
    curves = TwoCurves(observed, len(batches[0]))
    enough = min(map(len, sides.batches)) >= _MIN_BATCHES
    return Fitted(pair, (baseline, challenger), sides, curves, fit_two(curves, level) if enough else None, level)


def _joint(own: Fitted) -> Iterator[Quantity]:
    """Yield R_0, R_∞, their ratio and the exponent."""
    fit, drawn = own.fit, own.sides.resamples
    if fit is None:
        yield from (Quantity(name, Estimate(None), [_few_batches(own)]) for name in (*_RATIOS, "exponent"))
        return
    estimates = [fit.ratio_small_batch, fit.ratio_large_batch, fit.critical_batch_ratio]
    if drawn is not None and fit.scale.birge_factor == 1:
        ratios = resampled_ratios(own.curves, fit, drawn)
        estimates = [_with_ends(each, of, own.level) for each, of in zip(estimates, ratios, strict=True)]
    for name, estimate, ends in zip(_RATIOS, estimates, (("below",), ("above",), ("below", "above")), strict=True):
        unknown = [finding for end in ends for finding in own.outside[end]]
        yield _judged(name, estimate, [*unknown, *_of_scale(fit.scale), *_refuted(fit), *_of_options(own)])
    yield _exponent(own, fit)


def _few_batches(own: Fitted) -> Finding:
    fewest = min(own.sides.batches, key=len)
    return Finding("few_points", f"{count_batches(fewest)} of one side, and its curve has two parameters")


def _at_equal_tokens(own: Fitted, fits: Sequence[Fitted]) -> Quantity:
    """Compare the critical batches where both optimizers have spent the same tokens, the better one at a lower loss.

    B_crit of the challenger is that at the target at which its T_min is the baseline's, interpolated in logarithms
    between its targets, never beyond. Assumption: how B_crit grows with T_min is exact.
    """
    name = "critical_batch_ratio_equal_tokens"
    if own.fit is None:
        return Quantity(name, Estimate(None), [_few_batches(own)])
    unknown = [finding for findings in own.outside.values() for finding in findings]
    if unknown:
        return Quantity(name, Estimate(None), unknown)
    alike = [each for each in fits if _but_for_target(each) == _but_for_target(own)]
    known = [each.fit for each in alike if each.fit and not any(each.outside.values())]
    log_t_min, log_b_crit = np.array(sorted((fit.best[2], fit.best[3]) for fit in known)).T
    wanted, start = own.fit.best[0], own.fit.best[2:4]
    if not log_t_min[0] <= wanted <= log_t_min[-1]:
        words = f"no target at which {own.pair.shown[1]} takes as many tokens as {own.pair.shown[0]}"
        return Quantity(name, Estimate(None), [Finding("not_identified", words)])
    rise = float(np.interp(wanted, log_t_min, log_b_crit) - start[1])
    slope = rise / (wanted - start[0]) if rise else 0.0
    return Quantity(name, own.fit.batch_ratio_at_equal_tokens(slope), [*_of_scale(own.fit.scale), *_of_options(own)])


def _but_for_target(own: Fitted) -> dict[str, Any]:
    return {name: value for name, value in own.pair.names.items() if name != "target_loss_nats"}


def _exponent(own: Fitted, fit: JointFit) -> Quantity:
    """Estimate α; the choice between it and α = 1 needs three points beyond the parameters, the variance among them."""
    num, drawn = len(own.sides.log_tokens), own.sides.resamples
    if num < _NUM_PARAMETERS_EXPONENT:
        few = Finding("few_points", f"{num} points for {_NUM_PARAMETERS_EXPONENT - 1} parameters")
        return Quantity("exponent", Estimate(None), [few])
    estimate, scale = common_exponent(own.curves, fit, own.level)
    if num < _NUM_PARAMETERS_EXPONENT + MIN_SPARE_POINTS or scale.allowed is None:
        few = Finding("few_points", f"no interval: {num} points for {_NUM_PARAMETERS_EXPONENT - 1} parameters")
        return Quantity("exponent", Estimate(estimate.value), [few])
    if estimate.low is None or estimate.high is None:
        return _judged("exponent", estimate, [Finding("not_identified", "the data do not bound the exponent")])
    if drawn is not None and scale.birge_factor == 1:
        estimate = _with_ends(estimate, resampled_exponent(own.curves, fit, drawn), own.level)
    return Quantity("exponent", estimate, [*_of_scale(scale), *_of_options(own)])


def _refuted(fit: JointFit) -> list[Finding]:
    if fit.refutation is None:
        return []
    said = f"α is fitted, since the replicates speak against α = 1 (p = {fit.refutation:.2g})"
    return [Finding("ok", f"{said}: it is {np.exp(fit.best[4]):.2f} for both")]


def _of_options(own: Fitted) -> list[Finding]:
    """Say that other residuals or another loss than these do not reach the joint fit."""
    label = own.both[0].label
    if label == "log":
        return []
    words = f"both curves are fitted to log T by least squares: {label} is for single critical batches alone"
    return [Finding("ok", words)]


def _tails(own: Fitted) -> Iterator[Quantity]:
    """Yield d log S / d log B of each side beyond its kink, and the difference: R(B) does not vanish unless it is < 0.

    Source: arXiv 2505.02222, appendix F.
    Assumption: the errors of the two sides are independent; shared seeds make the difference surer than it says.
    """
    tails = [_tail(*each) for each in zip(_TAILS[:2], own.pair.shown, own.both, strict=True)]
    yield from tails
    findings = [finding for tail in tails for finding in tail.findings]
    yield _judged(_TAILS[2], difference(tails[0].estimate, tails[1].estimate), findings)


def _tail(quantity: str, name: str, fits: CurveFits) -> Quantity:
    fit, batches = fits.kink, fits.series.batches
    if fit is None:
        few = f"{name}: {count_batches(batches)}, and the kink model has three parameters"
        return Quantity(quantity, Estimate(None), [Finding("few_points", few)])
    knee, slope = fit.critical_batch_tokens, fit.bend_estimate
    missing = f"no interval: {count_batches(batches)} for three parameters and the variance"
    findings = [Finding(own, f"{name}: {words}") for own, words in _of_scale(fit.scale, missing)]
    is_inside = knee.value is not None and batches[0] < knee.value < batches[-1]
    is_bounded = fit.allowed is None or None not in (knee.low, knee.high)
    if not is_inside or not is_bounded:
        findings.append(Finding("not_identified", f"{name}: no kink is identified within the batches tried"))
    ends = (None if end is None else end - 1 for end in (slope.value, slope.low, slope.high))
    return _judged(quantity, Estimate(*ends), findings)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Return first - second of independent estimates, from the distances to the ends of both intervals.

    Source: G. Y. Zou and A. Donner, Statist. Med. 27 (2008) 1693.
    """
    if first.value is None or second.value is None:
        return Estimate(None)
    value = first.value - second.value
    if first.low is None or second.high is None or first.high is None or second.low is None:
        return Estimate(value)
    below = np.hypot(first.value - first.low, second.high - second.value)
    above = np.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, value - float(below), value + float(above))


def _judged(name: str, estimate: Estimate, findings: list[Finding]) -> Quantity:
    """Withhold a number that is not identified; its interval may still have an end."""
    unknown = any(finding.name == "not_identified" for finding in findings)
    return Quantity(name, replace(estimate, value=None) if unknown else estimate, findings)


def _of_scale(scale: Scale, no_interval: str = _NO_INTERVAL) -> list[Finding]:
    findings = [] if scale.allowed is not None else [Finding("few_points", no_interval)]
    if scale.birge_factor > 1:
        words = f"the curve misses the points by more than the seed noise (p = {scale.lack_of_fit_p:.2g})"
        widened = f", so the interval is widened {scale.birge_factor:.1f} times" if scale.allowed is not None else ""
        findings.append(Finding("misfit", words + widened))
    return findings


def _with_ends(estimate: Estimate, drawn: Array, level: float) -> Estimate:
    """Take the ends from resamples [r], and the value in; an end that the data do not bound stays away."""
    assert estimate.value is not None
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    ends = (min(float(low), estimate.value), max(float(high), estimate.value))
    is_bounded = (estimate.low is not None, estimate.high is not None)
    return Estimate(estimate.value, *(end if known else None for end, known in zip(ends, is_bounded, strict=True)))
