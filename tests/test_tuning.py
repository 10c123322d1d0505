"""What tuning cost, against plans that are counted by hand."""

from dataclasses import replace

import polars as pl
from polars.testing import assert_frame_equal

from analysis.quantities.tuning import tuning
from tests.planted_finals import Finals

LAB = Finals(batches=(1024, 4096), budgets=(2**20, 2**21), fresh_seeds=(7,))


def test_tuning_counts_runs_settings_and_tokens_of_each_optimizer() -> None:
    rows = tuning(LAB.records()).rows(named=True)
    grid = 2 * 3 * 2 * (2**20 + 2**21)
    fresh = 2 * (2**20 + 2**21)
    assert [row["optimizer"] for row in rows] == ["adamw", "muon"]
    for row in rows:
        assert (row["num_runs"], row["num_settings"], row["num_batches"]) == (2 * 2 * 3 * 2 + 2 * 2, 12, 2)
        assert (row["grid_tokens"], row["tokens"]) == (grid, grid + fresh)
        assert row["train_flops"] == 6e5 * row["tokens"]


def test_tuning_counts_diverged_runs_and_those_still_under_way() -> None:
    made = LAB.records()
    under_way = made.runs.with_columns(status=pl.lit("running"), tokens_seen=pl.lit(None, pl.Int64))
    assert_frame_equal(tuning(replace(made, runs=under_way)), tuning(made))


def test_tuning_without_the_flops_of_one_run_has_no_total() -> None:
    made = LAB.records()
    first = pl.col("run_id") == made.runs["run_id"][0]
    gone = made.evaluations.with_columns(train_flops=pl.when(~first).then("train_flops"))
    found = tuning(replace(made, evaluations=gone))
    assert found["train_flops"].null_count() == 1
