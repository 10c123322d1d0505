"""Losses at equal tokens: marks that every run compared reached, and the ends of token budgets."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from analysis.inputs.records import Records
from analysis.quantities.equal_budget import equal_budget
from analysis.quantities.final_losses import final_losses
from tests.planted_finals import Finals
from tests.synthetic import Laboratory, plan, records

LAB = Laboratory()
MARKS = pl.col("mark") == "intermediate"


def table(made: Records) -> pl.DataFrame:
    return equal_budget(made, final_losses(made, 0.9), 0.9)


def test_marks_are_those_that_every_run_compared_reached() -> None:
    marks = table(records(LAB)).filter(MARKS)
    shortest = min(run.budget for run in plan(LAB))
    assert max(marks["tokens"].to_list()) <= shortest
    assert set(marks.group_by("tokens").len()["len"]) == {8}


def test_the_end_of_a_budget_is_final_and_has_one_row_a_cell() -> None:
    runs = [replace(run, budget=262_144) for run in plan(LAB)]
    found = table(records(LAB, runs))
    assert set(found.filter(tokens=262_144)["mark"]) == {"final"}
    assert found.filter(tokens=262_144).height == 8
    assert set(found.filter(pl.col("tokens") < 262_144)["mark"]) == {"intermediate"}


def test_final_rows_are_the_final_losses() -> None:
    made = Finals().records()
    cells = final_losses(made, 0.9).cells
    found = table(made)
    assert set(found["mark"]) == {"final"}
    assert found.height == cells.height == 24
    both = found.join(
        cells,
        left_on=("optimizer", "global_batch_tokens", "tokens"),
        right_on=("optimizer", "global_batch_tokens", "token_budget"),
    )
    assert both["val_loss_nats"].to_list() == both["final_loss_nats"].to_list()


def test_runs_that_decay_towards_several_budgets_have_no_marks() -> None:
    made = records(replace(LAB, optimizers={"adamw": LAB.optimizers["adamw"]}))
    longer = records(
        replace(LAB, optimizers={"adamw": LAB.optimizers["adamw"]}),
        [replace(run, budget=2 * run.budget, seed=run.seed + 10) for run in plan(LAB) if run.optimizer == "adamw"],
    )
    runs = pl.concat([made.runs, longer.runs]).with_columns(protocol=pl.lit("mid_schedule"))
    found = table(replace(made, runs=runs, evaluations=pl.concat([made.evaluations, longer.evaluations])))
    assert set(found["mark"]) == {"final"}
    assert set(found["protocol"]) == {"decayed"}


def test_marks_inside_the_warmup_of_any_run_are_left_out() -> None:
    made = records(replace(LAB, warmup_tokens=0))
    plain = table(made)
    slow_start = pl.when(pl.col("global_batch_tokens") == 16384).then(65_536).otherwise("warmup_tokens")
    found = table(replace(made, runs=made.runs.with_columns(warmup_tokens=slow_start)))
    assert min(plain["tokens"].to_list()) < 65_536 < min(found["tokens"].to_list())
    assert_frame_equal(found, plain.filter(pl.col("tokens") > 65_536))


def test_there_is_no_row_where_the_warmup_outlasts_a_run() -> None:
    assert table(records(replace(LAB, warmup_tokens=10**7))).is_empty()


def test_a_cell_of_which_a_fresh_run_diverged_has_no_row() -> None:
    lab = replace(LAB, fresh_seeds=(2, 3))
    runs = [replace(r, status="diverged") if (r.batch, r.seed) == (1024, 3) else r for r in plan(lab)]
    assert set(table(records(lab, runs))["global_batch_tokens"]) == {256, 4096, 16384}


def test_losses_are_those_of_the_fresh_runs() -> None:
    lab = replace(LAB, noise=0.05)
    fresh = {(r.optimizer, r.batch): r.log_tokens for r in plan(lab) if r.stage == "confirm"}
    for row in table(records(lab)).iter_rows(named=True):
        log_tokens = fresh[row["optimizer"], row["global_batch_tokens"]]
        truth = 2.0 * np.exp(lab.exponent * (log_tokens - np.log(row["tokens"])))
        assert row["val_loss_nats"] == pytest.approx(truth, rel=2e-3)
        assert row["val_loss_nats_low"] < row["val_loss_nats"] < row["val_loss_nats_high"]


def test_order_of_rows_does_not_matter() -> None:
    made = records(LAB)
    assert_frame_equal(table(made), table(replace(made, runs=made.runs.sample(fraction=1, shuffle=True, seed=1))))
