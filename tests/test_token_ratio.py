"""Ratios and their trend against planted truth; pairing by seed."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from analysis.estimate import estimate
from analysis.quantities.cells import estimate_cells
from analysis.quantities.token_ratio import token_ratios
from tests.synthetic import Laboratory, Planted, plan, records, targets_table

LAB = Laboratory(targets=(2.0,), warmup_tokens=0)


def ratios(lab: Laboratory) -> tuple[pl.DataFrame, pl.DataFrame]:
    return token_ratios(estimate_cells(targets_table(lab), 0.9), "adamw", 0.9)


def true_ratio(batch: int) -> float:
    return float(np.exp(LAB.optimizers["adamw"].log_tokens(batch) - LAB.optimizers["muon"].log_tokens(batch)))


def test_token_ratio_is_baseline_over_challenger() -> None:
    table, _ = ratios(replace(LAB, noise=0.001))
    for batch, ratio in table.select("global_batch_tokens", "token_ratio").iter_rows():
        assert ratio == pytest.approx(true_ratio(batch), rel=0.01)


def width(table: pl.DataFrame) -> float:
    return float(np.mean(np.log(table["token_ratio_high"].to_numpy() / table["token_ratio_low"].to_numpy())))


def test_token_ratio_of_shared_seeds_is_paired_and_narrower() -> None:
    lab = replace(LAB, shared=0.9, fresh_seeds=(2, 3))
    paired, _ = ratios(lab)
    other_seeds = targets_table(lab).with_columns(
        data_seed=pl.when(pl.col("optimizer") == "muon").then(pl.col("data_seed") + 10).otherwise("data_seed")
    )
    unpaired, _ = token_ratios(estimate_cells(other_seeds, 0.9), "adamw", 0.9)
    assert set(paired["num_pairs"]) == {2}
    assert set(unpaired["num_pairs"]) == {0}
    assert width(paired) < 0.6 * width(unpaired)
    assert paired["token_ratio"].to_list() == pytest.approx(unpaired["token_ratio"].to_list())


def test_token_ratio_names_the_side_that_has_no_tokens() -> None:
    runs = [replace(r, log_tokens=99.0) if (r.optimizer, r.batch) == ("muon", 256) else r for r in plan(LAB)]
    row = estimate(records(LAB, runs)).token_ratios.row(by_predicate=pl.col("global_batch_tokens") == 256, named=True)
    assert (row["token_ratio"], row["verdict"]) == (None, "not_reached")
    assert row["explanation"].startswith("Muon: target not reached")


def test_token_ratio_has_one_series_for_each_challenger() -> None:
    three = replace(LAB, optimizers={**LAB.optimizers, "sgd": Planted(300_000.0)})
    table, trends = ratios(three)
    assert set(table["challenger"]) == {"muon", "sgd"}
    assert set(table["baseline"]) == {"adamw"}
    assert trends.height == 2


@pytest.mark.parametrize(
    ("muon", "verdict"),
    [
        (Planted(120_000.0, 20_000.0), "rising"),
        (Planted(120_000.0, 500.0), "falling"),
        (Planted(120_000.0, 2_000.0), "unresolved"),
    ],
)
def test_ratio_trend_says_whether_the_ratio_rises(muon: Planted, verdict: str) -> None:
    lab = replace(LAB, optimizers={"adamw": LAB.optimizers["adamw"], "muon": muon})
    _, trends = ratios(lab)
    assert trends["verdict"].to_list() == [verdict]


def test_ratio_trend_equals_the_planted_power() -> None:
    bent = {batch: -0.2 * float(np.log(batch)) for batch in LAB.batches}
    base = LAB.optimizers["adamw"]
    lab = replace(LAB, noise=0.01, optimizers={"adamw": base, "muon": replace(base, extra=bent)})
    _, trends = ratios(lab)
    assert trends["slope"][0] == pytest.approx(0.2, abs=0.01)
    assert trends["slope_low"][0] < 0.2 < trends["slope_high"][0]


def test_ratio_trend_with_a_fall_on_its_way_is_not_called_rising() -> None:
    base, dip = LAB.optimizers["adamw"], {1024: -1.0, 4096: -0.5, 16384: -2.0}
    lab = replace(LAB, noise=0.05, optimizers={"adamw": base, "muon": replace(base, extra=dip)})
    _, trends = ratios(lab)
    assert trends["slope_low"][0] > 0
    assert trends["verdict"].to_list() == ["non_monotone"]
    assert "down from batch 1K to 4K" in trends["explanation"][0]


def test_token_ratio_passes_on_the_reservations_of_both_sides() -> None:
    table, _ = ratios(replace(LAB, rates=(1.0,), grid_seeds=(0, 1, 4)))
    assert set(table["verdict"]) == {"ok"}
    one = "only one learning rate was tried"
    assert set(table["explanation"]) == {f"AdamW: {one}; Muon: {one}"}


def test_ratio_trend_needs_three_batches() -> None:
    _, trends = ratios(replace(LAB, batches=(256, 1024)))
    assert trends.select("slope", "verdict").row(0) == (None, "few_points")
