"""Ratios and tokens saved against planted truth; pairing by seed; what is said of cells without a T."""

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from analysis.quantities.cells import estimate_cells
from analysis.quantities.pairs import pairs
from analysis.quantities.targets import targets
from analysis.quantities.token_ratio import token_ratios
from tests.synthetic import Laboratory, Planted, Run, plan, records, targets_table

LAB = Laboratory(targets=(2.0,), warmup_tokens=0)
ENDS = ("token_ratio", "token_ratio_low", "token_ratio_high")


def ratios(lab: Laboratory, baseline: str = "adamw") -> tuple[pl.DataFrame, pl.DataFrame]:
    return token_ratios(pairs(estimate_cells(targets_table(lab), 0.9), baseline), 0.9)


def ratios_of(runs: list[Run], lab: Laboratory = LAB) -> pl.DataFrame:
    return token_ratios(pairs(estimate_cells(targets(records(lab, runs)), 0.9), "adamw"), 0.9)[0]


def at(table: pl.DataFrame, batch: int) -> dict[str, Any]:
    return table.row(by_predicate=pl.col("global_batch_tokens") == batch, named=True)


def true_ratio(batch: int) -> float:
    return float(np.exp(LAB.optimizers["adamw"].log_tokens(batch) - LAB.optimizers["muon"].log_tokens(batch)))


def width(table: pl.DataFrame) -> float:
    return float(np.mean(np.log(table["token_ratio_high"].to_numpy() / table["token_ratio_low"].to_numpy())))


def test_token_ratio_is_baseline_over_challenger() -> None:
    table, _ = ratios(replace(LAB, noise=0.001))
    for batch, ratio in table.select("global_batch_tokens", "token_ratio").iter_rows():
        assert ratio == pytest.approx(true_ratio(batch), rel=0.01)


def test_token_ratio_of_swapped_optimizers_is_inverted() -> None:
    (table, _), (swapped, _) = ratios(LAB), ratios(LAB, baseline="muon")
    for row, other in zip(table.iter_rows(named=True), swapped.iter_rows(named=True), strict=True):
        inverse = [1 / other[name] for name in ("token_ratio", "token_ratio_high", "token_ratio_low")]
        assert inverse == pytest.approx([row[name] for name in ENDS])
        assert -other["tokens_saved"] == pytest.approx(row["tokens_saved"])
        assert -other["tokens_saved_high"] == pytest.approx(row["tokens_saved_low"], rel=1e-3)


def test_token_ratio_of_scaled_tokens_is_the_same_and_tokens_saved_scale() -> None:
    runs = targets_table(LAB)
    scaled = runs.with_columns(pl.col("global_batch_tokens", "tokens_to_target") * 7)
    (table, trend), (other, other_trend) = (
        token_ratios(pairs(estimate_cells(own, 0.9), "adamw"), 0.9) for own in (runs, scaled)
    )
    for name in ENDS:
        assert other[name].to_list() == pytest.approx(table[name].to_list())
    for name in ("tokens_saved", "tokens_saved_low", "tokens_saved_high"):
        assert (other[name] / 7).to_list() == pytest.approx(table[name].to_list())
    assert other_trend["slope_low"][0] == pytest.approx(trend["slope_low"][0])


def test_token_ratio_of_shared_seeds_is_paired_and_narrower() -> None:
    lab = replace(LAB, shared=0.9, fresh_seeds=(2, 3))
    paired, _ = ratios(lab)
    other_seeds = targets_table(lab).with_columns(
        data_seed=pl.when(pl.col("optimizer") == "muon").then(pl.col("data_seed") + 10).otherwise("data_seed")
    )
    unpaired, _ = token_ratios(pairs(estimate_cells(other_seeds, 0.9), "adamw"), 0.9)
    assert set(paired["num_pairs"]) == {2}
    assert set(unpaired["num_pairs"]) == {0}
    assert width(paired) < 0.6 * width(unpaired)
    assert paired["token_ratio"].to_list() == pytest.approx(unpaired["token_ratio"].to_list())


def test_token_ratio_pairs_the_batches_that_share_their_seeds() -> None:
    lab = replace(LAB, shared=0.9, fresh_seeds=(2, 3))
    elsewhere = (pl.col("optimizer") == "muon") & (pl.col("global_batch_tokens") == 256)
    runs = targets_table(lab).with_columns(
        data_seed=pl.when(elsewhere).then(pl.col("data_seed") + 10).otherwise("data_seed")
    )
    table, _ = token_ratios(pairs(estimate_cells(runs, 0.9), "adamw"), 0.9)
    assert table["num_pairs"].to_list() == [0, 2, 2, 2]
    assert width(table[:1]) > 1.5 * width(table[1:])


@pytest.mark.slow
def test_token_ratio_covers_the_truth_with_two_seeds_and_with_ten() -> None:
    for seeds, draws, least in ((2, 60, 0.85), (10, 15, 0.8)):
        lab = replace(LAB, fresh_seeds=tuple(range(20, 20 + seeds)), batches=(256, 4096))
        rows = [row for draw in range(draws) for row in ratios(replace(lab, draw=draw))[0].iter_rows(named=True)]
        hits = [
            row["token_ratio_low"] <= true_ratio(row["global_batch_tokens"]) <= row["token_ratio_high"] for row in rows
        ]
        assert least <= np.mean(hits) <= 0.97


def test_tokens_saved_are_the_difference_and_exclude_zero_with_the_ratio() -> None:
    cells = estimate_cells(targets_table(LAB), 0.9)
    table, _ = token_ratios(pairs(cells, "adamw"), 0.9)
    tokens = {
        (row["optimizer"], row["global_batch_tokens"]): row["tokens_to_target"]
        for row in cells.cells.iter_rows(named=True)
    }
    for row in table.iter_rows(named=True):
        batch = row["global_batch_tokens"]
        assert row["tokens_saved"] == pytest.approx(tokens["adamw", batch] - tokens["muon", batch])
        assert (row["tokens_saved_low"] > 0) == (row["token_ratio_low"] > 1)
        assert row["tokens_saved_low"] < row["tokens_saved"] < row["tokens_saved_high"]


def test_tokens_saved_exclude_zero_exactly_where_the_ratio_excludes_one() -> None:
    near = replace(LAB.optimizers["adamw"], t_min=165_000.0)
    signs = []
    for draw in range(20):
        lab = replace(LAB, optimizers={"adamw": LAB.optimizers["adamw"], "muon": near}, draw=draw)
        signs += ratios(lab)[0].select(pl.col("tokens_saved_low") > 0, pl.col("token_ratio_low") > 1).rows()
    assert {False, True} == {saved for saved, _ in signs}
    assert all(saved == ratio for saved, ratio in signs)


def fallen_short(optimizer: str) -> list[Run]:
    """Every run of one optimizer at batch 256 ends before the target."""
    return [
        replace(run, log_tokens=99.0) if (run.optimizer, run.batch) == (optimizer, 256) else run for run in plan(LAB)
    ]


def test_token_ratio_names_the_side_that_has_no_tokens() -> None:
    row = at(ratios_of(fallen_short("muon")), 256)
    assert (row["token_ratio"], row["verdict"]) == (None, "not_reached")
    assert row["explanation"].startswith("Muon: target not reached")


def test_token_ratio_is_bounded_on_one_side_where_the_other_never_reached() -> None:
    """Budgets are 1.5 times what the optimizer takes, so that the missing T is more than that."""
    above, below = (at(ratios_of(fallen_short(name)), 256) for name in ("adamw", "muon"))
    assert above["token_ratio_high"] is None
    assert 1.0 * true_ratio(256) < above["token_ratio_low"] < 1.5 * true_ratio(256)
    assert below["token_ratio_low"] is None
    assert true_ratio(256) / 1.5 < below["token_ratio_high"] < true_ratio(256)
    assert below["tokens_saved"] is None


def test_token_ratios_over_batches_keep_that_a_side_diverged_at_one() -> None:
    lost = (pl.col("optimizer") == "muon") & (pl.col("global_batch_tokens") == 1024) & (pl.col("init_seed") == 0)
    diverged = {"status": pl.when(lost).then(pl.lit("diverged")).otherwise("status")}
    diverged["tokens_to_target"] = pl.when(~lost).then("tokens_to_target")
    lab = replace(LAB, rates=(1.0,), grid_seeds=(0, 1, 2), fresh_seeds=())
    (pair,) = pairs(estimate_cells(targets_table(lab).with_columns(**diverged), 0.9), "adamw")
    (finding,) = [own for own in pair.doubts() if own.name == "diverged"]
    assert finding.words.endswith("batch 1K")
    assert finding.words.startswith("Muon")


def test_token_ratio_carries_the_caveat_of_a_censored_cell() -> None:
    runs = plan(replace(LAB, fresh_seeds=(2, 3, 4)))
    short = next(run for run in runs if (run.stage, run.optimizer, run.batch) == ("confirm", "adamw", 256))
    table = ratios_of([replace(run, log_tokens=99.0) if run == short else run for run in runs])
    row, whole = at(table, 256), at(ratios_of(runs), 256)
    assert (row["verdict"], row["num_pairs"]) == ("censored", 3)
    assert row["explanation"].startswith("AdamW: 1 of 3 runs")
    assert row["token_ratio"] > whole["token_ratio"]
    assert at(table, 1024)["num_pairs"] == 3


def test_token_ratio_without_repeated_runs_is_a_number_without_interval() -> None:
    table, _ = ratios(replace(LAB, grid_seeds=(0,)))
    assert set(table["verdict"]) == {"few_points"}
    assert None not in table["token_ratio"].to_list()
    assert set(table["token_ratio_low"]) == {None}


def test_token_ratio_has_one_series_for_each_challenger() -> None:
    three = replace(LAB, optimizers={**LAB.optimizers, "sgd": Planted(300_000.0)})
    table, trends = ratios(three)
    assert set(table["challenger"]) == {"muon", "sgd"}
    assert set(table["baseline"]) == {"adamw"}
    assert trends.height == 2


def test_token_ratio_without_the_baseline_has_no_rows() -> None:
    cells = estimate_cells(targets_table(LAB).filter(pl.col("optimizer") == "muon"), 0.9)
    table, trends = token_ratios(pairs(cells, "adamw"), 0.9)
    assert (table.height, trends.height) == (0, 0)


def test_token_ratio_passes_on_the_reservations_of_both_sides() -> None:
    table, _ = ratios(replace(LAB, rates=(1.0,), grid_seeds=(0, 1, 4)))
    assert set(table["verdict"]) == {"single_rate"}
    one = "only one learning rate was tried"
    assert set(table["explanation"]) == {f"AdamW: {one}; Muon: {one}"}


@pytest.mark.parametrize(
    ("muon", "verdict"),
    [
        (Planted(120_000.0, 20_000.0), "rising"),
        (Planted(120_000.0, 500.0), "falling"),
        (Planted(120_000.0, 2_000.0), "unresolved"),
    ],
)
def test_ratio_trend_of_planted_optimizers(muon: Planted, verdict: str) -> None:
    _, trends = ratios(replace(LAB, optimizers={"adamw": LAB.optimizers["adamw"], "muon": muon}))
    assert trends["verdict"].to_list() == [verdict]


@pytest.mark.parametrize("fresh", [(2, 3), tuple(range(2, 14))])
def test_p_values_are_small_where_the_interval_excludes_one_and_holm_makes_them_larger(fresh: tuple[int, ...]) -> None:
    near = {f"rival{number}": Planted(180_000.0 - 4_000 * number, 2_000.0) for number in range(6)}
    lab = replace(LAB, optimizers={"adamw": Planted(180_000.0, 2_000.0), **near}, fresh_seeds=fresh)
    table = ratios(lab)[0]
    excludes = (table["token_ratio_low"] > 1) | (table["token_ratio_high"] < 1)
    assert 3 < excludes.sum() < len(table)
    assert (table["p_value"] < 0.1).to_list() == excludes.to_list()
    assert (table["p_value_holm"] >= table["p_value"]).all()
    smallest = table.row(table["p_value"].arg_min(), named=True)  # type: ignore[arg-type]
    assert smallest["p_value_holm"] == pytest.approx(min(len(table) * smallest["p_value"], 1.0))


@pytest.mark.slow
def test_holm_claims_of_equal_optimizers_are_rare_together() -> None:
    """In at most a tenth of the laboratories, within simulation error, one of six equal rivals seems to differ."""
    equal = {name: Planted() for name in ("adamw", *(f"rival{number}" for number in range(6)))}
    claimed = [
        bool((ratios(replace(LAB, optimizers=equal, fresh_seeds=(2, 3, 4), draw=draw))[0]["p_value_holm"] < 0.1).any())
        for draw in range(100)
    ]
    assert np.mean(claimed) <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / 100)
