"""Intervals cover what they claim and are no wider than they must be: 200 sweeps of each kind, with a planted truth.

The reference width is that of an oracle which knows the variance, what seeds share, T of every run and the family, that
is T = T_min (1 + (B / B_crit)^α): no data prove that α is 1, and to know it would make B_crit 2.4 times as certain at
four batches. The oracle needs no t quantile. Against it, t quantiles at the 6 to 12 degrees of freedom that these
sweeps have cost a factor of 1.10 to 1.18, a variance that may grow one of up to 1.15, and the one run in five that
falls short one of 1.12. So a median above 1.5 times the reference is wide for no reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from analysis.quantities.batch_series import Series
from analysis.quantities.cells import Cells, estimate_cells
from analysis.quantities.critical_batch import critical_batches
from analysis.quantities.curve_fits import CurveFits, curve_fits
from analysis.quantities.pairs import pairs
from analysis.quantities.token_ratio import token_ratios
from analysis.statistics.intervals import Estimate
from analysis.statistics.noise import Errors
from tests.synthetic import Laboratory, Planted, many_targets

Array = NDArray[np.float64]

SWEEPS = 200
Z = 1.645
MAX_WIDTH = 1.5
#: Planted where the exponent of the curve is not 1.
B_CRIT = 2_000.0

PLENTY, TIGHT = 3.0, 1.1  # budgets over T at the best rate

LAB = Laboratory(warmup_tokens=0, fresh_seeds=(), budget_over_target=PLENTY)
ADAMW, MUON = LAB.optimizers["adamw"], LAB.optimizers["muon"]


def both(**changes: object) -> dict[str, Planted]:
    return {name: replace(planted, **changes) for name, planted in LAB.optimizers.items()}  # type: ignore[arg-type]


def fresh(seeds: int, **changes: object) -> Laboratory:
    """Return a sweep with so many seeds in the grid and as many fresh ones at the best rate."""
    grid, confirm = tuple(range(seeds)), tuple(range(100, 100 + seeds))
    return replace(LAB, grid_seeds=grid, fresh_seeds=confirm, **changes)  # type: ignore[arg-type]


def short(seeds: int) -> Laboratory:
    """Return a sweep of which one run in five falls short, as in a public record of twenty seeds."""
    return fresh(seeds, budget_over_target=TIGHT, rates=(0.7, 1.0, 1.4))


STRATA = {
    "two seeds": fresh(2),
    "two seeds, some short": short(2),
    "three seeds": fresh(3),
    "three seeds, some short": short(3),
    "ten seeds": fresh(10),
    "ten seeds, some short": short(10),
    "other exponent": fresh(3, batches=tuple(256 * 2**i for i in range(7)), optimizers=both(alpha=1.5)),
    "U-shape": fresh(3, batches=(64, 256, 1024, 4096, 16384), optimizers=both(extra={64: 1.0})),
    "growing noise": fresh(3, noise_growth=0.4),
    "rates of one grid": replace(LAB, grid_seeds=(0, 1, 2), one_grid=True, rates=tuple(2.0**i for i in range(-2, 4))),
    "flat optimum": replace(LAB, grid_seeds=(0, 1, 2), optimizers=both(curvature=0.02)),
}


@dataclass
class Tally:
    """Of the intervals of one quantity: which hold the truth, and their widths over the reference's."""

    holds: list[bool] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)

    def add(self, low: float | None, high: float | None, truth: float, reference: float) -> None:
        self.holds.append((low is None or low <= truth) and (high is None or truth <= high))
        self.widths.append(np.inf if low is None or high is None else np.log(high / low) / reference)

    @property
    def coverage(self) -> float:
        return float(np.mean(self.holds))

    @property
    def width(self) -> float:
        return float(np.median(self.widths))


def seeds_used(lab: Laboratory) -> int:
    return len(lab.fresh_seeds or lab.grid_seeds)


def truths(cells: Cells, lab: Laboratory) -> pl.DataFrame:
    """Return the cells that have an interval with the planted log T at the rate that was chosen for them."""
    known = cells.cells.filter(pl.col("tokens_to_target_low").is_not_null())
    truth = [
        lab.optimizers[name].log_tokens(batch)
        + lab.optimizers[name].curvature * np.log(rate / lab.optimizers[name].optimum(batch)) ** 2
        for name, batch, rate in known.select("optimizer", "global_batch_tokens", "best_lr").iter_rows()
    ]
    return known.with_columns(truth=pl.Series(truth, dtype=pl.Float64))


def tally_cells(known: pl.DataFrame, lab: Laboratory) -> Tally:
    found = Tally()
    for row in known.iter_rows(named=True):
        reference = 2 * Z * lab.noise_at(row["global_batch_tokens"]) / np.sqrt(seeds_used(lab))
        found.add(row["tokens_to_target_low"], row["tokens_to_target_high"], np.exp(row["truth"]), reference)
    return found


def tally_ratios(cells: Cells, known: pl.DataFrame, lab: Laboratory) -> Tally:
    """The reference pairs the seeds: what they share cancels."""
    found = Tally()
    log_tokens = {
        row[:3]: row[3] for row in known.select("model", "optimizer", "global_batch_tokens", "truth").iter_rows()
    }
    ratios = token_ratios(pairs(cells, "adamw"), 0.9)[0]
    for row in ratios.filter(pl.col("token_ratio_low").is_not_null()).iter_rows(named=True):
        model, batch = row["model"], row["global_batch_tokens"]
        reference = 2 * Z * lab.noise_at(batch) * np.sqrt(2 * (1 - lab.shared) / seeds_used(lab))
        truth = np.exp(log_tokens[model, "adamw", batch] - log_tokens[model, "muon", batch])
        found.add(row["token_ratio_low"], row["token_ratio_high"], truth, reference)
    return found


def critical_batch_rows(cells: Cells) -> Iterator[dict[str, Any]]:
    """One optimizer is enough: a row for every sweep."""
    muon = replace(cells, cells=cells.cells.filter(optimizer="muon"))
    yield from critical_batches(curve_fits(muon, 0.9), definitions=("emin_over_smin",))[0].iter_rows(named=True)


def tally_critical_batches(cells: Cells, lab: Laboratory) -> Tally:
    found = Tally()
    planted = lab.optimizers["muon"]
    reference = 2 * Z * error_of_log_b_crit(planted, lab)
    truth = twice_the_least(planted, lab)
    for row in critical_batch_rows(cells):
        found.add(row["critical_batch_tokens_low"], row["critical_batch_tokens_high"], truth, reference)
    return found


def twice_the_least(planted: Planted, lab: Laboratory) -> float:
    """Return B_crit where T only rises; after a step down it is where T is twice that of the first batch beyond it."""
    if not planted.extra:
        return planted.b_crit
    first = min(batch for batch in lab.batches if batch not in planted.extra)
    return planted.b_crit * (1 + 2 * first / planted.b_crit)


def error_of_log_b_crit(planted: Planted, lab: Laboratory) -> float:
    """Return the error of generalised least squares with the planted covariance, linear around the planted truth."""
    batches = np.array([batch for batch in lab.batches if batch not in planted.extra], float)
    bent = (batches / planted.b_crit) ** planted.alpha
    share = bent / (1 + bent)
    slopes = np.column_stack([np.ones(len(batches)), -planted.alpha * share, share * np.log(batches / planted.b_crit)])
    noise = np.array([lab.noise_at(int(batch)) for batch in batches])
    covariance = np.outer(noise, noise) * (lab.shared + (1 - lab.shared) * np.eye(len(batches))) / seeds_used(lab)
    return float(np.sqrt(np.linalg.inv(slopes.T @ np.linalg.inv(covariance) @ slopes)[1, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATA)
def test_intervals_of_ninety_percent_cover_about_ninety_and_are_no_wider_than_they_must(name: str) -> None:
    lab = STRATA[name]
    cells = estimate_cells(many_targets(lab, SWEEPS), 0.9)
    known = truths(cells, lab)
    tallies = {
        "tokens": tally_cells(known, lab),
        "ratio": tally_ratios(cells, known, lab),
        "critical batch": tally_critical_batches(cells, lab),
    }
    assert known.height > 0.95 * cells.cells.height
    found = {quantity: (tally.coverage, tally.width) for quantity, tally in tallies.items()}
    assert all(0.85 <= coverage <= 0.95 and width <= MAX_WIDTH for coverage, width in found.values()), found


#: T = T_min (1 + B / B_c) (1 + B_0 / B): B_c, B_0, the batches, and noise of three seeds.
VALLEYS = {
    "of eight batches": (1e6, 6.5e4, 2.0 ** np.arange(15, 23), 0.05),
    "of five batches": (3_000.0, 150.0, 4.0 ** np.arange(3, 8), 0.1),
    "of nine batches": (3_000.0, 150.0, 64 * 2.0 ** np.arange(9), 0.1),
}


def smooth_u(batch: Array, b_rise: float, b_fall: float) -> Array:
    return np.asarray(np.log1p(batch / b_rise) + np.log1p(b_fall / batch))


def error_of_twice_the_least(batches: Array, noise: float, place: float, least: float) -> float:
    """Return the error of log B at `place`, where T is twice its least, for an oracle that knows the variance.

    Its family is T = T_least (1 + sinh²(α/2 log B/B_least) / sinh²(α/2 log B_twice/B_least)), the planted one at α = 1.
    """

    def curve(parameters: Array) -> Array:
        height, twice, lowest, exponent = parameters
        inner, outer = np.sinh(exponent * (np.log(batches) - lowest) / 2), np.sinh(exponent * (twice - lowest) / 2)
        return np.asarray(height + np.log1p((inner / outer) ** 2))

    truth, step = np.array([0.0, np.log(place), np.log(least), 1.0]), 1e-5
    slopes = np.array([(curve(truth + own) - curve(truth - own)) / (2 * step) for own in step * np.eye(4)]).T
    return float(np.sqrt(np.linalg.inv(slopes.T @ slopes)[1, 1]) * noise)


@pytest.mark.slow
@pytest.mark.parametrize("name", VALLEYS)
def test_intervals_of_a_smooth_u_cover_the_batch_of_twice_the_least_tokens(name: str) -> None:
    b_rise, b_fall, batches, noise = VALLEYS[name]
    ratio, least, random, dof = b_fall / b_rise, np.sqrt(b_rise * b_fall), np.random.default_rng(0), 2 * len(batches)
    middle = 2 * (1 + np.sqrt(ratio)) ** 2 - 1 - ratio
    truth = b_rise * (middle + np.sqrt(middle**2 - 4 * ratio)) / 2
    assert smooth_u(truth, b_rise, b_fall) == pytest.approx(np.log(2) + smooth_u(least, b_rise, b_fall))
    found, error = Tally(), noise / np.sqrt(3)
    for _ in range(SWEEPS):
        drawn = smooth_u(batches, b_rise, b_fall) + random.normal(0, error, len(batches))
        errors = Errors(np.eye(len(batches)) * error**2 * random.chisquare(dof) / dof, dof, dof)
        whole, start = Series(batches, drawn, errors, None, ()), int(np.argmin(drawn))
        knee = CurveFits(replace(whole.part(start), whole=whole), 0.9).knee
        found.add(knee.low, knee.high, truth, 2 * Z * error_of_twice_the_least(batches, error, truth, least))
    assert 0.85 <= found.coverage <= 0.95, found.coverage
    assert found.width <= MAX_WIDTH


@pytest.mark.slow
@pytest.mark.parametrize(("b_crit", "share"), [(500_000.0, (0.95, 1.0)), (2_500.0, (0.0, 0.10))])
def test_a_knee_is_identified_inside_the_grid_alone(b_crit: float, share: tuple[float, float]) -> None:
    lab = fresh(3, optimizers=both(b_crit=b_crit))
    rows = list(critical_batch_rows(estimate_cells(many_targets(lab, SWEEPS), 0.9)))
    unidentified = np.mean([row["verdict"] == "not_identified" for row in rows])
    assert share[0] <= unidentified <= share[1]
    assert all(row["critical_batch_tokens"] is None for row in rows if row["verdict"] == "not_identified")


def intervals_of_a_planted_exponent(exponent: float, noise: float) -> Iterator[tuple[Estimate, Estimate]]:
    """Yield B_crit with the interval that takes α = 1 for granted and with that reported: four batches, two seeds."""
    random = np.random.default_rng(0)
    batches, dof = np.geomspace(256, 16_384, 4), 12
    log_tokens = np.log(1e5 * (1 + (batches / B_CRIT) ** exponent))
    for _ in range(SWEEPS):
        drawn = log_tokens + random.normal(0, noise / 2**0.5, 4)
        errors = Errors(np.eye(4) * noise**2 / 2 * random.chisquare(dof) / dof, dof, dof)
        fits = CurveFits(Series(batches, drawn, errors, None, ()), 0.9)
        assert fits.saturating is not None
        yield fits.saturating.critical_batch_tokens, fits.knee


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.05, 0.1])
@pytest.mark.parametrize("exponent", [0.8, 1.25])
def test_an_interval_that_takes_the_exponent_for_granted_misses_another(exponent: float, noise: float) -> None:
    """results/README.md quotes 16 to 78 %."""
    found = list(intervals_of_a_planted_exponent(exponent, noise))
    granted, reported = (
        np.mean([(k.low or 0) <= B_CRIT <= (k.high or np.inf) for k in own]) for own in zip(*found, strict=True)
    )
    assert 0.15 < granted < 0.79
    assert reported > 0.85


@pytest.mark.slow
def test_leaving_the_exponent_open_widens_an_interval_of_four_batches_two_to_three_times() -> None:
    widths = [
        np.log(reported.high / reported.low) / np.log(granted.high / granted.low)
        for granted, reported in intervals_of_a_planted_exponent(1.0, 0.05)
        if granted.low and granted.high and reported.low and reported.high
    ]
    assert 2 < np.median(widths) < 2.8
