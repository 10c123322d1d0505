"""How much the token ratio owes to the rule of the learning rate: tuned at each batch, scaled by √B, or fixed.

T at a rate is read off the quadratic in log rate that was fitted to the grid, within the rates tried and no further.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis import format as fmt
from analysis.quantities.pairs import Pair
from analysis.schemas import RATE_RULES, table
from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import NO_NOISE, t_quantile
from analysis.statistics.quadratics import Quadratics
from analysis.verdicts import Finding, verdict_columns

Array = NDArray[np.float64]

RULES = ("tuned", "square_root", "fixed")


@dataclass(frozen=True)
class Parabola:
    """log T = level + slope x + curvature x², x = log rate less `centre`, between two log rates that were tried.

    `covariance` [3, 3] of `coefficients` [3] is in units of the variance of one run.
    """

    centre: float
    coefficients: Array
    covariance: Array
    lowest: float
    highest: float

    @property
    def optimum(self) -> float:
        """The log rate of the least T."""
        return float(self.centre - self.coefficients[1] / (2 * self.coefficients[2]))

    def reaches(self, log_rate: float) -> bool:
        return self.lowest <= log_rate <= self.highest

    def log_tokens(self, log_rate: float) -> float:
        return float(self._terms(log_rate) @ self.coefficients)

    def leverage(self, log_rate: float) -> float:
        """Return the variance of log T there, in units of that of one run."""
        return float(self._terms(log_rate) @ self.covariance @ self._terms(log_rate))

    def _terms(self, log_rate: float) -> Array:
        return np.asarray((log_rate - self.centre) ** np.arange(3), float)


def rate_rules(compared: Sequence[Pair], level: float) -> pl.DataFrame:
    """Return the table `rate_rules`: the token ratio at each batch under each rule, the same for both optimizers.

    The rules start from the smallest batch at which the optima of both lie inside the rates tried: square_root takes
    the optima there times √(B / B_ref), fixed takes them as they are. Intervals take the rates as given.
    """
    rows = []
    for pair in compared:
        sides = zip(pair.series, pair.frames, strict=True)
        curves = [parabolas(pair.estimated.rates.filter(**series), frame) for series, frame in sides]
        rows += [pair.names | row for row in _rows(pair, curves, level)]
    return table(rows, RATE_RULES)


def parabolas(rates: pl.DataFrame, cells: pl.DataFrame) -> dict[int, Parabola]:
    """Recover the quadratics of a series from its `fitted_tokens`, at the tuning chosen for each batch.

    There is none with one rate; and none at all without three rates at a batch, or without a minimum.
    """
    curve = ["global_batch_tokens", "tuning"]
    points = rates.filter(pl.col("fitted_tokens").is_not_null(), pl.col("num_reached") > 0)
    points = points.filter(pl.len().over(curve) >= 2).sort(*curve, "peak_lr")
    if points.filter(pl.len().over(curve) >= 3).is_empty():
        return {}
    points = points.with_columns(log_rate=pl.col("peak_lr").log(), curve=pl.struct(curve).rle_id())
    points = points.with_columns(centre=pl.col("log_rate").mean().over("curve"))
    x, number = (points["log_rate"] - points["centre"]).to_numpy(), points["curve"].to_numpy().astype(int)
    quadratics = Quadratics(x, number, points["num_reached"].to_numpy().astype(float))
    coefficients = quadratics.solution @ points["fitted_tokens"].log().to_numpy()
    if coefficients[-1] <= 0:
        return {}
    found = {}
    for (batch,), own in points.join(cells, on=curve, how="semi").group_by(["global_batch_tokens"]):
        place = 2 * own["curve"][0]
        terms = [place, place + 1, len(coefficients) - 1]
        covariance = quadratics.covariance[np.ix_(terms, terms)]
        log_rates = own["log_rate"].to_list()
        found[batch] = Parabola(own["centre"][0], coefficients[terms], covariance, min(log_rates), max(log_rates))
    return found


def _rows(pair: Pair, curves: list[dict[int, Parabola]], level: float) -> Iterator[dict[str, Any]]:
    fitted = [batch for batch in pair.batches if all(batch in own for own in curves)]
    inside = (b for b in fitted if all(own[b].reaches(own[b].optimum) for own in curves))
    reference = next(inside, None)
    for rule in RULES:
        for batch in pair.batches:
            estimate, findings = Estimate(None), _unknown(pair, curves, batch, rule, reference)
            if not findings:
                estimate, findings = _under(pair, curves, batch, _log_rates(curves, rule, batch, reference), level)
            yield {
                "rule": rule,
                "global_batch_tokens": batch,
                "token_ratio": estimate.value,
                "token_ratio_low": estimate.low,
                "token_ratio_high": estimate.high,
                **verdict_columns([*findings, *_about_cells(pair, batch)]),
            }


def _unknown(
    pair: Pair, curves: list[dict[int, Parabola]], batch: int, rule: str, reference: int | None
) -> list[Finding]:
    """Say why nothing can be read off: a side has no quadratic at the batch, or the rule has no reference."""
    if lacking := [name for name, own in zip(pair.shown, curves, strict=True) if batch not in own]:
        words = f"{fmt.listed(lacking)}: no minimum could be fitted to the rates tried"
        return [Finding("not_identified", words)]
    if rule != "tuned" and reference is None:
        return [Finding("not_identified", "no batch at which both optima lie inside the rates tried")]
    return []


def _log_rates(curves: list[dict[int, Parabola]], rule: str, batch: int, reference: int | None) -> list[float]:
    """Return the log rate of each side that a rule prescribes at a batch."""
    if rule == "tuned" or reference is None:
        return [own[batch].optimum for own in curves]
    scaled = 0.5 * np.log(batch / reference) if rule == "square_root" else 0.0
    return [own[reference].optimum + float(scaled) for own in curves]


def _under(
    pair: Pair, curves: list[dict[int, Parabola]], batch: int, log_rates: list[float], level: float
) -> tuple[Estimate, list[Finding]]:
    """Return R at one batch and the rates given, or which side it has outside its grid."""
    sides = [own[batch] for own in curves]
    outside = [
        f"{name}: rate {np.exp(rate):.3g} lies outside {np.exp(own.lowest):.3g} to {np.exp(own.highest):.3g}"
        for name, own, rate in zip(pair.shown, sides, log_rates, strict=True)
        if not own.reaches(rate)
    ]
    if outside:
        return Estimate(None), [Finding("edge_of_grid", "; ".join(outside))]
    log_tokens = [own.log_tokens(rate) for own, rate in zip(sides, log_rates, strict=True)]
    ratio = float(np.exp(log_tokens[0] - log_tokens[1]))
    leverage = max(own.leverage(rate) for own, rate in zip(sides, log_rates, strict=True))
    half = _half_width(pair, batch, leverage, level)
    if half is None:
        return Estimate(ratio), [Finding("few_points", NO_NOISE)]
    return Estimate(ratio, ratio * float(np.exp(-half)), ratio * float(np.exp(half))), []


def _half_width(pair: Pair, batch: int, leverage: float, level: float) -> float | None:
    """Return the half width of the interval of log R, from the differences of runs of the same seed.

    What a seed does to all rates of a batch alike does not average out over them. Assumption: both sides vary as the
    one whose quadratic is the less certain there.
    """
    noise, num_pairs = pair.noise_of_differences, pair.num_grid_pairs(batch)
    if noise is None or not num_pairs:
        return None
    variance = noise.same_cell / num_pairs + (noise.variance - noise.same_cell) * leverage
    scale, dof = float(noise.scale_at(np.log(batch))), float(noise.dof_at(np.log(batch)))
    return t_quantile(level, dof) * float(np.sqrt(variance * scale))


def _about_cells(pair: Pair, batch: int) -> list[Finding]:
    """Return what stands against the cells; where their rates lie, the rules say by themselves."""
    return [own for own in pair.doubts(batch) if own.name not in ("edge_of_grid", "single_rate")]
