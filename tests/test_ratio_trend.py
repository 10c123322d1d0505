"""Slope and largest drop of the ratio against planted truth; what holds among several challengers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from analysis.quantities.ratio_trend import Ratios, ratio_trends
from analysis.statistics.noise import Errors
from analysis.verdicts import Finding, findings_of

BATCHES = [256, 1024, 4096, 16384]
NAMES = {"model": "lab", "baseline": "adamw", "challenger": "muon", "target_loss_nats": 2.0, "protocol": "constant_ema"}


def ratios(log_ratio: ArrayLike, error: float | None = 0.02, challenger: str = "muon") -> Ratios:
    values = np.asarray(log_ratio, float)
    errors = None if error is None else Errors(error**2 * np.eye(len(values)), 12.0, 12.0)
    batches = [4 ** (4 + place) for place in range(len(values))]
    return Ratios(NAMES | {"challenger": challenger}, batches, values, errors, None)


def trend(own: Ratios) -> dict[str, Any]:
    return ratio_trends([own], 0.9).row(0, named=True)


def test_ratio_trend_equals_the_planted_power() -> None:
    row = trend(ratios(0.2 * np.log(BATCHES)))
    assert row["slope"] == pytest.approx(0.2)
    # sqrt(variance / sum of squared log batches) times the 95 % quantile of t with 12 degrees of freedom
    half = 1.7823 * 0.02 / np.sqrt(5.0) / np.log(4)
    assert (row["slope_low"], row["slope_high"]) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-4)


@pytest.mark.parametrize(
    ("log_ratio", "verdict"),
    [
        ((0.0, 0.1, 0.2, 0.3), "rising"),
        ((0.0, -0.1, -0.2, -0.3), "falling"),
        ((0.0, 0.02, -0.02, 0.01), "unresolved"),
        ((0.0, 0.5, 0.3, 0.9), "non_monotone"),
        ((0.0, -0.5, -0.3, -0.9), "non_monotone"),
        ((0.0, 0.3, 0.3, 0.0), "non_monotone"),
    ],
)
def test_ratio_trend_says_whether_the_ratio_rises(log_ratio: tuple[float, ...], verdict: str) -> None:
    assert trend(ratios(log_ratio))["verdict"] == verdict


def test_ratio_trend_names_the_move_against_its_slope() -> None:
    row = trend(ratios((0.0, 0.5, 0.3, 0.9)))
    assert row["slope_low"] > 0
    assert "the ratio goes 18% down from batch 1K to 4K" in row["explanation"]


def test_largest_drop_is_that_between_any_two_batches() -> None:
    row = trend(ratios((0.0, 0.5, 0.4, 0.3)))
    assert row["largest_drop"] == pytest.approx(0.2)
    assert (row["drop_from_tokens"], row["drop_to_tokens"]) == (1024, 16384)
    assert row["largest_drop_low"] < 0.2 < row["largest_drop_high"]


def test_ratio_trend_of_swapped_optimizers_has_the_opposite_slope() -> None:
    own = ratios((0.1, 0.12, 0.3, 0.25))
    row, swapped = trend(own), trend(replace(own, log_ratio=-own.log_ratio))
    assert (swapped["slope"], swapped["slope_low"]) == pytest.approx((-row["slope"], -row["slope_high"]))


def test_ratio_trend_without_errors_takes_them_from_the_residuals_of_five_batches() -> None:
    log_ratio = (0.0, 0.11, 0.2, 0.31, 0.4)
    five, four = trend(ratios(log_ratio, error=None)), trend(ratios(log_ratio[:4], error=None))
    assert five["verdict"] == "rising"
    assert five["slope_low"] < 0.1 / np.log(4) < five["slope_high"]
    assert four["verdict"] == "few_points"
    assert (four["slope_low"], four["largest_drop_low"]) == (None, None)
    assert four["slope"] is not None


def test_ratio_trend_needs_three_batches() -> None:
    row = trend(ratios((0.1, 0.2)))
    assert (row["slope"], row["verdict"]) == (None, "few_points")
    assert row["largest_drop"] == pytest.approx(-0.1)


def test_ratio_trend_of_no_batch_is_empty() -> None:
    row = trend(ratios((), error=None))
    assert (row["slope"], row["largest_drop"], row["verdict"]) == (None, None, "few_points")


def test_ratio_trend_of_resamples_lies_between_their_percentiles() -> None:
    own = ratios((0.0, 0.1, 0.2, 0.3))
    drawn = own.log_ratio + 0.1 * np.random.default_rng(0).standard_normal((20_000, 4))
    row, exact = trend(replace(own, resamples=drawn)), trend(own)
    half = (row["slope_high"] - row["slope_low"]) / 2
    assert half == pytest.approx(1.645 * 0.1 / np.sqrt(5.0) / np.log(4), rel=0.02)
    assert row["largest_drop_high"] > exact["largest_drop_high"]


def test_ratio_trend_of_many_challengers_claims_less() -> None:
    """Alone the slope of 0.06 has p = 0.03; among three challengers, two of which do not move, 0.09 to 0.1 counts."""
    weak = (0.0, 0.02, 0.04, 0.06)
    alone = ratios(weak, error=0.025)
    assert trend(alone)["verdict"] == "rising"
    flat = [ratios((0.0, 0.01, 0.0, 0.01), challenger=name) for name in ("lion", "sgd", "shampoo", "soap")]
    rows = ratio_trends([*flat, alone], 0.9).filter(challenger="muon").row(0, named=True)
    assert rows["slope_low"] > 0
    assert rows["verdict"] == "unresolved"
    assert "Holm" in rows["explanation"]


def test_ratio_trend_keeps_its_direction_beside_the_doubts_of_its_batches() -> None:
    doubt = Finding("warmup_confounded", "AdamW: target too close to the warmup: batch 256")
    row = trend(replace(ratios((0.0, 0.1, 0.2, 0.3)), doubts=[doubt]))
    slope = Finding("ok", "by its slope alone the ratio is rising")
    assert row["verdict"] == "warmup_confounded"
    assert findings_of(row["reasons"], row["explanation"]) == [doubt, slope]
