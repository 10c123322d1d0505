"""R_0, R_∞ and the ratio of critical batches against planted truth; what they say where they are not identified."""

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from analysis.quantities.cells import estimate_cells
from analysis.quantities.curve_fits import curve_fits
from analysis.quantities.pairs import pairs
from analysis.quantities.ratio_decomposition import difference, ratio_decomposition
from analysis.statistics.intervals import Estimate
from tests.synthetic import Laboratory, Planted, targets_table

MANY = tuple(256 * 2**place for place in range(8))
LAB = Laboratory(targets=(2.0,), warmup_tokens=0, grid_seeds=(0, 1, 4), fresh_seeds=(2, 3), batches=MANY)
TRUTH = {"ratio_small_batch": 1.5, "ratio_large_batch": 2.25, "critical_batch_ratio": 1.5, "exponent": 1.0}


def decomposed(targets: pl.DataFrame, baseline: str = "adamw") -> pl.DataFrame:
    cells = estimate_cells(targets, 0.9)
    return ratio_decomposition(pairs(cells, baseline), curve_fits(cells, 0.9), 0.9)


def decomposition(lab: Laboratory, baseline: str = "adamw") -> dict[str, dict[str, Any]]:
    rows = decomposed(targets_table(lab), baseline)
    return {row["quantity"]: row for row in rows.iter_rows(named=True)}


def test_ratio_decomposition_finds_what_was_planted() -> None:
    rows = decomposition(replace(LAB, noise=0.02, draw=1))
    for name, truth in TRUTH.items():
        assert rows[name]["value"] == pytest.approx(truth, rel=0.03)
        assert rows[name]["value_low"] < truth < rows[name]["value_high"]
        assert rows[name]["verdict"] == "ok"


def test_ratio_decomposition_is_a_product() -> None:
    rows = decomposition(replace(LAB, draw=1))
    product = rows["ratio_small_batch"]["value"] * rows["critical_batch_ratio"]["value"]
    assert product == pytest.approx(rows["ratio_large_batch"]["value"])


def test_ratio_decomposition_of_swapped_optimizers_is_inverted() -> None:
    rows, swapped = decomposition(LAB), decomposition(LAB, baseline="muon")
    for name in ("ratio_small_batch", "ratio_large_batch", "critical_batch_ratio"):
        row, other = rows[name], swapped[name]
        inverse = (1 / other["value"], 1 / other["value_high"], 1 / other["value_low"])
        assert inverse == pytest.approx((row["value"], row["value_low"], row["value_high"]), rel=1e-3)


def test_critical_batch_ratio_at_equal_tokens_is_read_between_targets() -> None:
    """The harder target takes twice the tokens and has B_crit √2 as large, the law that the interpolation follows."""
    lab = replace(LAB, noise=0.02)
    harder = {n: replace(o, t_min=2 * o.t_min, b_crit=2**0.5 * o.b_crit) for n, o in lab.optimizers.items()}
    runs = [targets_table(lab), targets_table(replace(lab, optimizers=harder)).with_columns(target_loss_nats=1.9)]
    table = decomposed(pl.concat(runs))
    rows = table.filter(quantity="critical_batch_ratio_equal_tokens").sort("target_loss_nats", descending=True)
    easy, hard = rows.iter_rows(named=True)
    assert easy["value"] == pytest.approx(1.5 * 1.5**0.5, rel=0.05)
    assert easy["value_low"] < easy["value"] < easy["value_high"]
    assert (hard["value"], hard["verdict"]) == (None, "not_identified")
    assert "no target at which Muon takes as many tokens as AdamW" in hard["explanation"]


def test_ratio_decomposition_of_shared_seeds_is_narrower() -> None:
    lab = replace(LAB, shared=0.9)
    other_seeds = targets_table(lab).with_columns(
        data_seed=pl.when(pl.col("optimizer") == "muon").then(pl.col("data_seed") + 10).otherwise("data_seed")
    )
    paired = decomposition(lab)["ratio_small_batch"]
    unpaired = decomposed(other_seeds)
    row = unpaired.row(by_predicate=pl.col("quantity") == "ratio_small_batch", named=True)
    assert np.log(paired["value_high"] / paired["value_low"]) < 0.7 * np.log(row["value_high"] / row["value_low"])


@pytest.mark.parametrize(
    ("b_crit", "lost", "side"), [(1e6, "ratio_large_batch", "above"), (20.0, "ratio_small_batch", "below")]
)
def test_ratio_decomposition_withholds_what_a_knee_outside_the_grid_hides(b_crit: float, lost: str, side: str) -> None:
    optimizers = {"adamw": LAB.optimizers["adamw"], "muon": Planted(100_000.0 if b_crit > 1e3 else 1_000.0, b_crit)}
    rows = decomposition(replace(LAB, noise=0.05, optimizers=optimizers, draw=1))
    kept = ({"ratio_small_batch", "ratio_large_batch"} - {lost}).pop()
    for name in (lost, "critical_batch_ratio"):
        assert (rows[name]["value"], rows[name]["verdict"]) == (None, "not_identified")
        assert f"Muon: the critical batch may lie {side} the batches tried" in rows[name]["explanation"]
    assert rows[kept]["verdict"] == "ok"


def test_ratio_decomposition_needs_three_batches_of_both() -> None:
    rows = decomposition(replace(LAB, batches=(256, 1024)))
    assert {(row["value"], row["verdict"]) for row in rows.values()} == {(None, "few_points")}


def test_ratio_decomposition_tests_the_exponent_from_nine_points_on() -> None:
    four, five = (decomposition(replace(LAB, batches=MANY[:number]))["exponent"] for number in (4, 5))
    assert (four["value"] is None, four["value_low"], four["verdict"]) == (False, None, "few_points")
    assert five["value_low"] is not None


def test_ratio_decomposition_says_where_the_exponent_is_not_one() -> None:
    bent = {name: replace(own, extra={b: own_power(own, b) for b in MANY}) for name, own in LAB.optimizers.items()}
    rows = decomposition(replace(LAB, noise=0.02, optimizers=bent))
    assert rows["exponent"]["value"] == pytest.approx(2.0, rel=0.1)
    assert rows["exponent"]["value_low"] > 1
    assert rows["ratio_small_batch"]["value"] == pytest.approx(1.5, rel=0.05)
    assert rows["ratio_large_batch"]["value"] == pytest.approx(1.5 * 1.5**2, rel=0.1)
    assert "the replicates speak against α = 1" in rows["ratio_small_batch"]["explanation"]


def own_power(planted: Planted, batch: int) -> float:
    """What turns 1 + B / B_crit into 1 + (B / B_crit)²."""
    share = batch / planted.b_crit
    return float(np.log1p(share**2) - np.log1p(share))


def kinked(log_s_slope: float) -> Planted:
    """T flat up to a batch of 2,896, then of the slope that gives log S the slope planted."""
    flat = Planted(100_000.0, 1e12)
    rise = {batch: (1 + log_s_slope) * max(0.0, float(np.log(batch / 2_896))) for batch in MANY}
    return replace(flat, extra=rise)


def test_tail_slopes_are_those_planted() -> None:
    optimizers = {"adamw": kinked(-0.3), "muon": kinked(-0.6)}
    rows = decomposition(replace(LAB, noise=0.02, optimizers=optimizers, draw=1))
    for name, slope in (("baseline", -0.3), ("challenger", -0.6), ("difference", 0.3)):
        row = rows[f"tail_slope_{name}"]
        assert row["value"] == pytest.approx(slope, abs=0.05)
        assert row["value_low"] < slope < row["value_high"]
        assert row["verdict"] == "ok"


def test_ratio_decomposition_names_the_options_that_it_does_not_follow() -> None:
    cells = estimate_cells(targets_table(LAB), 0.9)
    robust = ratio_decomposition(pairs(cells, "adamw"), curve_fits(cells, 0.9, loss="huber"), 0.9)
    told = dict(robust.select("quantity", "explanation").iter_rows())
    words = "both curves are fitted to log T by least squares: log, huber is for single critical batches alone"
    joint = ("ratio_small_batch", "ratio_large_batch", "critical_batch_ratio", "exponent")
    assert all(words in told[quantity] for quantity in joint)
    assert not any(words in row["explanation"] for row in decomposition(LAB).values())


def test_ratio_decomposition_of_a_misfit_is_as_wide_with_twelve_seeds_as_with_nine() -> None:
    zigzag = {batch: 0.12 * (-1) ** place for place, batch in enumerate(MANY)}
    bent = {name: replace(own, extra=zigzag) for name, own in LAB.optimizers.items()}
    lab = replace(LAB, batches=MANY, noise=0.03, optimizers=bent, rates=(1.0,), fresh_seeds=())
    nine, twelve = (decomposition(replace(lab, grid_seeds=tuple(range(seeds)))) for seeds in (9, 12))
    for name in ("ratio_small_batch", "ratio_large_batch", "critical_batch_ratio", "exponent"):
        assert "misfit" in twelve[name]["reasons"]
        widths = [np.log(rows[name]["value_high"] / rows[name]["value_low"]) for rows in (nine, twelve)]
        assert widths[1] == pytest.approx(widths[0], rel=0.25)


def test_tail_slope_without_a_kink_is_withheld() -> None:
    optimizers = {"adamw": kinked(-0.3), "muon": Planted(100_000.0, 1e12)}
    rows = decomposition(replace(LAB, noise=0.02, optimizers=optimizers))
    assert rows["tail_slope_baseline"]["verdict"] == "ok"
    for name in ("tail_slope_challenger", "tail_slope_difference"):
        assert (rows[name]["value"], rows[name]["verdict"]) == (None, "not_identified")


def test_difference_adds_the_distances_to_the_ends_in_squares() -> None:
    assert difference(Estimate(5.0, 2.0, 6.0), Estimate(1.0, 0.0, 5.0)) == Estimate(4.0, -1.0, 4.0 + np.sqrt(2.0))
    assert difference(Estimate(5.0), Estimate(1.0)) == Estimate(4.0)
    assert difference(Estimate(None), Estimate(1.0)) == Estimate(None)


def test_ratio_decomposition_fits_the_rising_branch_alone() -> None:
    dip = replace(LAB.optimizers["muon"], extra={256: 1.5, 512: 0.7})
    rows = decomposition(replace(LAB, noise=0.02, optimizers={"adamw": LAB.optimizers["adamw"], "muon": dip}))
    assert rows["critical_batch_ratio"]["verdict"] == "non_monotone"
    assert rows["critical_batch_ratio"]["value"] == pytest.approx(1.5, rel=0.15)
    assert (
        "Muon: T falls before it rises: its rise is fitted, from batch 1K on"
        in rows["critical_batch_ratio"]["explanation"]
    )
