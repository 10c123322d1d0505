"""R(B): the tokens that the baseline takes to a target over those of a challenger, at the same batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import stdtr

from analysis.quantities.cells import Cells
from analysis.quantities.multiple_tests import add_holm
from analysis.quantities.pairs import CONTEXT, Pair, Sides
from analysis.quantities.ratio_trend import Ratios, ratio_trends
from analysis.schemas import TOKEN_RATIOS, table
from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import NO_NOISE, Errors, t_quantile
from analysis.verdicts import Finding, findings_of, verdict_columns

Array = NDArray[np.float64]

_ELLIPSE_POINTS = 720

Row = dict[str, Any]


def token_ratios(compared: Sequence[Pair], level: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the tables `token_ratios` and `ratio_trends`: the baseline against every other optimizer.

    Two that share no batch are refused. Tests of R = 1 are corrected over all challengers and batches at one target.

    Source: R_L(B) is arXiv 2505.02222, eq. 2.
    """
    rows, ratios = [], []
    for pair in compared:
        if pair.apart:
            rows.append(_refused(pair, pair.apart))
            ratios.append(Ratios(pair.names, [], np.zeros(0), None, None, apart=pair.apart))
            continue
        both = [batch for batch in pair.batches if all(batch in known for known in pair.known)]
        sides = pair.sides(both, both)
        rows += [_row(pair, batch, sides, level) for batch in pair.batches]
        ratios.append(_ratios(pair, sides))
    add_holm(rows, CONTEXT)
    return table(rows, TOKEN_RATIOS), ratio_trends(ratios, level)


def _refused(pair: Pair, why: Finding) -> Row:
    unknown = dict.fromkeys(TOKEN_RATIOS.keys() - pair.names.keys())
    return pair.names | unknown | {"num_pairs": 0} | verdict_columns([why])


def _ratios(pair: Pair, sides: Sides) -> Ratios:
    """Return log R with its errors, for the trend over batches."""
    number = len(sides.batches[0])
    contrast = np.hstack([np.eye(number), -np.eye(number)])
    errors = sides.errors and Errors(
        contrast @ sides.errors.covariance @ contrast.T, sides.errors.dof, sides.errors.contrast_dof
    )
    resamples = None if sides.resamples is None else sides.resamples @ contrast.T
    batches = sides.batches[0]
    doubts = pair.doubts(*batches) if batches else []
    return Ratios(pair.names, batches, contrast @ sides.log_tokens, errors, resamples, doubts)


def _row(pair: Pair, batch: int, sides: Sides, level: float) -> Row:
    findings = _handed_on(pair, batch)
    if batch in sides.batches[0]:
        place = sides.batches[0].index(batch)
        ratio, saved = _estimates(sides, place, level)
        p_value = _p_value(sides, place)
        findings += [] if ratio.low is not None else [Finding("few_points", NO_NOISE)]
    else:
        ratio, saved, p_value = _bounds(pair, batch, level), Estimate(None), None
    return {
        **pair.names,
        "global_batch_tokens": batch,
        "token_ratio": ratio.value,
        "token_ratio_low": ratio.low,
        "token_ratio_high": ratio.high,
        "tokens_saved": saved.value,
        "tokens_saved_low": saved.low,
        "tokens_saved_high": saved.high,
        "p_value": p_value,
        "num_pairs": sides.num_pairs.get(batch, 0),
        **verdict_columns(findings),
    }


def _handed_on(pair: Pair, batch: int) -> list[Finding]:
    """Return the findings of both cells; that one alone has no interval is no finding about their ratio."""
    findings = []
    for name, frame in zip(pair.shown, pair.frames, strict=True):
        cell = frame.row(by_predicate=pl.col("global_batch_tokens") == batch, named=True)
        own = findings_of(cell["reasons"], cell["explanation"])
        findings += [Finding(reason, f"{name}: {words}") for reason, words in own if reason != "few_points"]
    return findings


def _estimates(sides: Sides, place: int, level: float) -> tuple[Estimate, Estimate]:
    """Return R and the tokens saved at one batch, each with its interval.

    The ends of the tokens saved are its extremes over the (T_A, T_M) within t standard errors in logarithms, so that
    they exclude zero where those of R exclude one.
    """
    places = [place, place + len(sides.batches[0])]
    log_tokens = sides.log_tokens[places]
    ratio, saved = float(np.exp(log_tokens[0] - log_tokens[1])), float(_saved(log_tokens))
    if sides.resamples is not None:
        drawn = sides.resamples[:, places].T
        ends = [(1 - level) / 2, (1 + level) / 2]
        return (
            Estimate(ratio, *np.quantile(np.exp(drawn[0] - drawn[1]), ends).tolist()),
            Estimate(saved, *np.quantile(_saved(drawn), ends).tolist()),
        )
    if sides.errors is None:
        return Estimate(ratio), Estimate(saved)
    own = sides.errors.at(places)
    t = t_quantile(level, own.dof)
    factor = float(np.exp(t * own.of_difference(0, 1)))
    around = _saved(log_tokens[:, None] + t * _ellipse(own.covariance))
    return Estimate(ratio, ratio / factor, ratio * factor), Estimate(saved, float(around.min()), float(around.max()))


def _p_value(sides: Sides, place: int) -> float | None:
    """Return the two-sided p-value of equal tokens: of a t test, or the share of resamples on the other side of 1 (of
    at least one resample), twice.
    """
    places = [place, place + len(sides.batches[0])]
    if sides.resamples is not None:
        drawn = sides.resamples[:, places[0]] - sides.resamples[:, places[1]]
        beyond = max(1, min(int((drawn <= 0).sum()), int((drawn >= 0).sum())))
        return min(2 * beyond / len(drawn), 1.0)
    if sides.errors is None:
        return None
    own = sides.errors.at(places)
    log_ratio = sides.log_tokens[places[0]] - sides.log_tokens[places[1]]
    return float(2 * stdtr(own.dof, -abs(log_ratio) / own.of_difference(0, 1)))


def _saved(log_tokens: Array) -> Array:
    """Return T_A - T_M from log T [2, ...]."""
    return np.asarray(np.exp(log_tokens[0]) - np.exp(log_tokens[1]))


def _ellipse(covariance: Array) -> Array:
    """Return the points [2, n] one standard error from the origin: a smooth function has its extremes there."""
    angle = np.linspace(0, 2 * np.pi, _ELLIPSE_POINTS, endpoint=False)
    return np.asarray(np.linalg.cholesky(covariance) @ np.stack([np.cos(angle), np.sin(angle)]))


def _bounds(pair: Pair, batch: int, level: float) -> Estimate:
    """Return the end of R's interval that is known where no run of one side reached the target: T is above its marks.

    Assumption: the side's log T has the largest error of its other cells.
    """
    for side, other in ((0, 1), (1, 0)):
        fell_short, reached = pair.series[side], pair.known[other].get(batch)
        least = _least_tokens(pair.estimated, fell_short, batch)
        elsewhere = pair.estimated.errors_of(fell_short, list(pair.known[side]))
        here = pair.estimated.errors_of(pair.series[other], [batch]) if reached is not None else None
        if least is None or reached is None or elsewhere is None or here is None:
            continue
        error = np.sqrt(np.max(np.diag(elsewhere.covariance)) + here.covariance[0, 0])
        low = float(np.exp(np.log(least) - reached - t_quantile(level, min(elsewhere.dof, here.dof)) * error))
        return Estimate(None, low, None) if side == 0 else Estimate(None, None, 1 / low)
    return Estimate(None)


def _least_tokens(estimated: Cells, series: Mapping[str, Any], batch: int) -> float | None:
    """Return the tokens that any run of a cell saw at least without reaching the target; None where one reached it."""
    cell = estimated.runs_of(series).filter(global_batch_tokens=batch)
    if cell.is_empty() or cell["status"].str.starts_with("reached").any():
        return None
    least = cell.filter(pl.col("status") == "not_reached")["bound_tokens"].min()
    return least if isinstance(least, float) else None
