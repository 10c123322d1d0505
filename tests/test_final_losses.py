"""Final losses: which runs have one, which setting stands for a cell, and the interval of its mean."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from analysis.inputs.records import Records
from analysis.quantities.final_losses import final_losses
from analysis.quantities.gaps import gaps
from tests.planted_finals import Finals, Law

LAB = Finals()


def altered(made: Records, **columns: pl.Expr) -> Records:
    return replace(made, runs=made.runs.with_columns(**columns))


def cell(made: Records, optimizer: str = "adamw", batch: int = 1024, budget: int = 2**20) -> dict[str, object]:
    cells = final_losses(made, 0.9).cells
    return cells.row(
        by_predicate=(pl.col("optimizer") == optimizer)
        & (pl.col("global_batch_tokens") == batch)
        & (pl.col("token_budget") == budget),
        named=True,
    )


def test_final_loss_is_the_mean_at_the_best_rate_of_every_batch_and_budget() -> None:
    cells = final_losses(replace(LAB, noise=1e-6).records(), 0.9).cells
    assert cells.height == 2 * 3 * 4
    for row in cells.iter_rows(named=True):
        law = LAB.optimizers[row["optimizer"]]
        assert row["final_loss_nats"] == pytest.approx(law.loss(row["global_batch_tokens"], row["tokens"]), abs=1e-5)
        assert row["peak_lr"] == pytest.approx(law.optimum(row["global_batch_tokens"]))
        assert (row["num_runs"], row["lr_verdict"], row["verdict"]) == (2, "ok", "ok")


def test_final_loss_comes_from_fresh_seeds_where_there_are_any() -> None:
    made = replace(LAB, fresh_seeds=(2, 3, 4), noise=0.01).records()
    row = cell(made)
    fresh = made.runs.filter(stage="confirm", optimizer="adamw", global_batch_tokens=1024, token_budget=2**20)
    losses = made.evaluations.join(fresh, on="run_id", how="semi")["val_loss_nats"]
    assert (row["seeds_from"], row["num_runs"]) == ("fresh", 3)
    assert row["final_loss_nats"] == pytest.approx(losses.mean())


def test_final_loss_of_a_run_that_stopped_at_a_target_takes_no_part() -> None:
    one = (pl.col("optimizer") == "adamw") & (pl.col("global_batch_tokens") == 1024) & (pl.col("data_seed") == 0)
    stopped = pl.when(one).then(pl.lit("target")).otherwise("stop_reason")
    cells = final_losses(altered(LAB.records(), stop_reason=stopped), 0.9).cells
    assert set(cells.filter(optimizer="adamw")["global_batch_tokens"]) == {4096, 16384}
    assert set(cells.filter(optimizer="muon")["global_batch_tokens"]) == {1024, 4096, 16384}


def test_a_rate_at_which_a_run_diverged_is_not_chosen() -> None:
    best = LAB.optimizers["adamw"].optimum(1024)
    lost = (pl.col("optimizer") == "adamw") & (pl.col("peak_lr") == best) & (pl.col("data_seed") == 1)
    status = pl.when(lost).then(pl.lit("diverged")).otherwise("status")
    row = cell(altered(LAB.records(), status=status))
    assert row["peak_lr"] != best
    assert row["verdict"] == "ok"


def test_a_cell_of_which_all_runs_diverged_has_no_loss_and_says_so() -> None:
    lost = (pl.col("optimizer") == "muon") & (pl.col("global_batch_tokens") == 4096)
    row = cell(altered(LAB.records(), status=pl.when(lost).then(pl.lit("diverged")).otherwise("status")), "muon", 4096)
    assert row["final_loss_nats"] is None
    assert (row["verdict"], row["explanation"]) == ("diverged", "2 of 2 runs at the chosen rate diverged")


def test_runs_of_a_decaying_schedule_count_as_decayed_at_their_end() -> None:
    made = replace(LAB, protocol="mid_schedule").records()
    assert_frame_equal(final_losses(made, 0.9).cells, final_losses(LAB.records(), 0.9).cells)


def test_a_run_that_ends_inside_its_warmup_has_no_final_loss() -> None:
    cells = final_losses(altered(LAB.records(), warmup_tokens=pl.lit(2**21)), 0.9).cells
    assert cells["token_budget"].min() == 2**22


def test_rates_outside_those_tried_make_a_final_loss_edge_of_grid() -> None:
    cells = final_losses(replace(LAB, rates=(0.1, 0.15, 0.2)).records(), 0.9).cells
    assert set(cells["verdict"]) == {"edge_of_grid"}


def test_without_repeated_seeds_a_final_loss_has_no_interval() -> None:
    row = cell(replace(LAB, seeds=(0,)).records())
    assert row["final_loss_nats"] is not None
    assert (row["final_loss_nats_low"], row["verdict"]) == (None, "few_points")


def test_a_table_without_rates_or_seeds_gives_final_losses_without_intervals() -> None:
    made = replace(LAB, rates=(1.0,), seeds=(0,)).records()
    bare = altered(made, peak_lr=pl.lit(None, pl.Float64), init_seed=pl.lit(None), data_seed=pl.lit(None))
    cells = final_losses(bare, 0.9).cells
    assert cells["final_loss_nats"].null_count() == 0
    assert set(cells["verdict"]) == {"few_points"}
    assert cells["explanation"].str.ends_with("; learning rate not stated").all()


def test_further_settings_are_chosen_with_the_rate() -> None:
    made = LAB.records()
    worse = made.runs.with_columns(run_id=pl.col("run_id") + "-m", tuning=pl.lit("momentum=0.9"))
    poor = made.evaluations.with_columns(run_id=pl.col("run_id") + "-m", val_loss_nats=pl.col("val_loss_nats") + 0.01)
    runs = pl.concat([made.runs.with_columns(tuning=pl.lit("momentum=0.95")), worse])
    both = replace(made, runs=runs, evaluations=pl.concat([made.evaluations, poor]))
    assert set(final_losses(both, 0.9).cells["tuning"]) == {"momentum=0.95"}
    assert final_losses(both, 0.9).cells["num_runs"].to_list() == final_losses(made, 0.9).cells["num_runs"].to_list()


def test_order_of_rows_does_not_matter() -> None:
    made = LAB.records()
    shuffled = replace(made, runs=made.runs.sample(fraction=1, shuffle=True, seed=1), evaluations=made.evaluations)
    assert_frame_equal(final_losses(made, 0.9).cells, final_losses(shuffled, 0.9).cells)


@pytest.mark.slow
def test_final_losses_are_unbiased_and_covered_though_the_rate_was_chosen() -> None:
    flat = Finals({"adamw": Law(curvature=0.02)}, batches=(1024, 4096), budgets=(2**20, 2**21), shared=0.0, noise=0.01)
    errors, inside = [], []
    for draw in range(100):
        for row in final_losses(replace(flat, draw=draw).records(), 0.9).cells.iter_rows(named=True):
            law, batch = flat.optimizers["adamw"], row["global_batch_tokens"]
            truth = law.loss(batch, row["tokens"]) + 0.02 * np.log(row["peak_lr"] / law.optimum(batch)) ** 2
            errors.append(row["final_loss_nats"] - truth)
            inside.append(row["final_loss_nats_low"] < truth < row["final_loss_nats_high"])
    assert abs(np.mean(errors)) < 0.0008  # the lowest of three rates by itself is .0018 too low
    assert 0.84 < np.mean(inside) < 0.95


def test_a_warmup_of_more_than_a_fifth_confounds_a_final_loss() -> None:
    row = cell(altered(LAB.records(), warmup_tokens=pl.lit(2**19)))
    assert (row["verdict"], row["explanation"]) == ("warmup_confounded", "the warmup took 50% of the budget")
    assert cell(altered(LAB.records(), warmup_tokens=pl.lit(2**19)), budget=2**22)["verdict"] == "ok"


@pytest.mark.parametrize(("stated", "verdict"), [(True, "single_rate"), (False, "ok")])
def test_a_single_rate_is_a_verdict_where_it_is_stated_and_a_reservation_where_it_is_not(
    stated: bool, verdict: str
) -> None:
    made = replace(LAB, rates=(1.0,)).records()
    finals = final_losses(made if stated else altered(made, peak_lr=pl.lit(None, pl.Float64)), 0.9)
    assert set(finals.cells["verdict"]) == {verdict}
    assert set(gaps(finals, "adamw", 0.9)["verdict"]) == {verdict}
