"""Whether the token ratio rises with the batch: its slope in logarithms, and its largest fall on the way."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import stdtr

from analysis import format as fmt
from analysis.quantities.pairs import CONTEXT
from analysis.schemas import RATIO_TRENDS, table
from analysis.statistics.fit import MIN_SPARE_POINTS, NUM_PARAMETERS
from analysis.statistics.multiplicity import Drop, draws_of, holm, largest_drop
from analysis.statistics.noise import Errors, t_quantile
from analysis.verdicts import Finding, verdict_columns

Array = NDArray[np.float64]

_NO_INTERVAL = "no interval: too few repeated runs, and too few batches without them"


@dataclass(frozen=True)
class Ratios:
    """log R [batches] of one pair; `names` of the pair, `doubts` what stands against the batches' ratios.

    `errors` are None where the noise is not known; `resamples` [resamples, batches] decide where there are any.
    `apart` is why there are no ratios at all.
    """

    names: dict[str, Any]
    batches: list[int]
    log_ratio: Array
    errors: Errors | None
    resamples: Array | None
    doubts: Sequence[Finding] = ()
    apart: Finding | None = None


@dataclass(frozen=True)
class _Slope:
    """d log R / d log B with its interval and the p-value of no slope; None where there are too few points."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None

    @property
    def direction(self) -> str:
        if self.low is None or self.high is None:
            return "unresolved"
        return "rising" if self.low > 0 else "falling" if self.high < 0 else "unresolved"


def ratio_trends(ratios: Iterable[Ratios], level: float) -> pl.DataFrame:
    """Return the table `ratio_trends`: slope, largest drop with its simultaneous band, and the verdict of each pair.

    The slope is fitted by generalised least squares. A ratio rises or falls where the interval of its slope excludes
    zero, after Holm's correction where one baseline has several challengers, and where the band of its largest move
    the other way does not. `ratios` come grouped by model, protocol and target.
    """
    rows = []
    for _, group in groupby(ratios, key=lambda own: [own.names[name] for name in CONTEXT]):
        own_ratios = list(group)
        rows += [_refused(own, own.apart) for own in own_ratios if own.apart]
        rivals = [own for own in own_ratios if own.apart is None]
        slopes = [_slope(own, level) for own in rivals]
        rows += [_row(*each, level) for each in zip(rivals, slopes, _claims(slopes, level), strict=True)]
    return table(rows, RATIO_TRENDS)


def _refused(ratios: Ratios, why: Finding) -> dict[str, Any]:
    return ratios.names | dict.fromkeys(RATIO_TRENDS.keys() - ratios.names.keys()) | verdict_columns([why])


def _slope(ratios: Ratios, level: float) -> _Slope:
    batches, errors = np.array(ratios.batches, float), ratios.errors
    spare = len(batches) - NUM_PARAMETERS
    if spare < 1:
        return _Slope(None)
    design = np.column_stack([np.ones_like(batches), np.log(batches)])
    weight = np.linalg.inv(errors.covariance) if errors else np.eye(len(batches))
    inverse = np.linalg.inv(design.T @ weight @ design)
    solve = inverse @ design.T @ weight
    solution = solve @ ratios.log_ratio
    slope, residuals = float(solution[1]), ratios.log_ratio - design @ solution
    if ratios.resamples is not None:
        return _resampled_slope(slope, ratios.resamples @ solve[1], level)
    if errors is not None:
        return _slope_with_t(slope, float(inverse[1, 1]), errors.contrast_dof, level)
    if spare >= MIN_SPARE_POINTS and np.any(residuals):
        return _slope_with_t(slope, float(residuals @ residuals / spare * inverse[1, 1]), spare, level)
    return _Slope(slope)


def _slope_with_t(slope: float, variance: float, dof: float, level: float) -> _Slope:
    error = float(np.sqrt(variance))
    half = t_quantile(level, dof) * error
    return _Slope(slope, slope - half, slope + half, 2 * float(stdtr(dof, -abs(slope) / error)))


def _resampled_slope(slope: float, resampled: Array, level: float) -> _Slope:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    beyond_zero = min(np.sum(resampled <= 0), np.sum(resampled >= 0))
    return _Slope(slope, float(low), float(high), float(min(1.0, 2 * (beyond_zero + 1) / (len(resampled) + 1))))


def _claims(slopes: Sequence[_Slope], level: float) -> list[bool]:
    """Say which directions hold together, by Holm's correction over the challengers of one baseline."""
    p_values = holm(np.array([1.0 if slope.p_value is None else slope.p_value for slope in slopes]))
    return [bool(p < 1 - level) or len(slopes) == 1 for p in p_values]


def _row(ratios: Ratios, slope: _Slope, holds: bool, level: float) -> dict[str, Any]:
    fall, rise = (_largest_drop(ratios, sign, level) for sign in (1, -1))
    direction = slope.direction if holds else "unresolved"
    findings = [*_against(ratios, direction, fall, rise), *_missing(ratios, slope), *ratios.doubts]
    if direction != slope.direction:
        findings.append(Finding("ok", f"{slope.direction} by itself, but not among all challengers (Holm)"))
    if findings and direction != "unresolved":
        findings.append(Finding("ok", f"by its slope alone the ratio is {direction}"))
    return {
        **ratios.names,
        "slope": slope.value,
        "slope_low": slope.low,
        "slope_high": slope.high,
        "largest_drop": fall.value if fall else None,
        "largest_drop_low": fall.low if fall else None,
        "largest_drop_high": fall.high if fall else None,
        "drop_from_tokens": ratios.batches[fall.first] if fall else None,
        "drop_to_tokens": ratios.batches[fall.second] if fall else None,
        **verdict_columns(findings, sound=direction),
    }


def _largest_drop(ratios: Ratios, sign: int, level: float) -> Drop | None:
    """Return the largest fall of log R from a batch to a larger one, or with `sign` -1 the largest rise."""
    if len(ratios.batches) < 2:
        return None
    deviations = None
    if ratios.resamples is not None:
        deviations = ratios.resamples - ratios.resamples.mean(axis=0)
    elif ratios.errors is not None:
        deviations = draws_of(ratios.errors)
    return largest_drop(sign * ratios.log_ratio, deviations, level)


def _against(ratios: Ratios, direction: str, fall: Drop | None, rise: Drop | None) -> list[Finding]:
    """Name the moves against the slope, of which the band excludes zero: without a slope, one each way."""
    moves = [("down", fall), ("up", rise)]
    against = {"rising": moves[:1], "falling": moves[1:], "unresolved": moves}[direction]
    real = [(way, move) for way, move in against if move is not None and move.low is not None and move.low > 0]
    if len(real) < len(against):
        return []
    said = [
        f"{abs(np.expm1(move.value if way == 'up' else -move.value)):.0%} {way} from batch "
        f"{fmt.tokens(ratios.batches[move.first])} to {fmt.tokens(ratios.batches[move.second])}"
        for way, move in real
    ]
    return [Finding("non_monotone", f"the ratio goes {fmt.listed(said)}")]


def _missing(ratios: Ratios, slope: _Slope) -> list[Finding]:
    if slope.value is None:
        number = len(ratios.batches)
        return [Finding("few_points", f"a ratio at {number} batch{'' if number == 1 else 'es'}")]
    return [] if slope.low is not None else [Finding("few_points", _NO_INTERVAL)]
