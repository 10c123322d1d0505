"""Tokens to a target read off loss laws: planted truth, protocols, and what one or two budgets cannot tell."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from analysis.inputs.records import Records
from analysis.quantities.cells import Cells
from analysis.quantities.final_losses import final_losses
from analysis.quantities.loss_laws import loss_laws
from analysis.statistics.noise import t_quantile
from tests.planted_finals import Finals, Law
from tests.synthetic import Laboratory, records

LAB = Finals(targets=(2.6,))


def read_laws(made: Records) -> tuple[pl.DataFrame, Cells]:
    return loss_laws(final_losses(made, 0.9), made.losses(), 0.9)


def true_tokens(lab: Finals, row: dict[str, object]) -> float:
    law = lab.optimizers[str(row["optimizer"])]
    return float(np.exp(law.log_tokens(int(str(row["global_batch_tokens"])), float(str(row["target_loss_nats"])))))


def test_loss_laws_give_the_planted_floor_and_exponent() -> None:
    laws, _ = read_laws(replace(LAB, noise=1e-6).records())
    assert laws.height == 6
    assert laws["floor_nats"].to_list() == pytest.approx([1.5] * 6, abs=1e-3)
    assert laws["exponent"].to_list() == pytest.approx([0.4] * 6, abs=1e-3)
    assert set(laws["num_budgets"]) == {4}
    assert set(laws["verdict"]) == {"ok"}


def test_cells_of_a_law_have_the_planted_tokens_with_their_costs() -> None:
    lab = replace(LAB, noise=1e-6)
    _, cells = read_laws(lab.records())
    known = cells.cells.filter(pl.col("tokens_to_target").is_not_null())
    assert known.height == 5
    for row in known.iter_rows(named=True):
        assert row["tokens_to_target"] == pytest.approx(true_tokens(lab, row), rel=1e-3)
        assert row["steps_to_target"] == pytest.approx(row["tokens_to_target"] / row["global_batch_tokens"])
        assert row["flops_to_target"] == pytest.approx(6e5 * row["tokens_to_target"])
        assert row["train_seconds_to_target"] == pytest.approx(1e-5 * row["tokens_to_target"])
        assert row["best_lr"] == pytest.approx(lab.optimizers[row["optimizer"]].optimum(row["global_batch_tokens"]))


def test_a_target_outside_the_budgets_of_a_batch_has_no_tokens_but_a_bound() -> None:
    made = replace(LAB, targets=(1.9, 2.6)).records()
    _, cells = read_laws(made)
    rows = {
        (r["optimizer"], r["global_batch_tokens"], r["target_loss_nats"]): r for r in cells.cells.iter_rows(named=True)
    }
    below, beyond = rows["muon", 1024, 2.6], rows["adamw", 16384, 1.9]
    assert (below["tokens_to_target"], below["verdict"]) == (None, "reached_at_first_eval")
    assert (beyond["tokens_to_target"], beyond["verdict"]) == (None, "not_reached")
    assert "1M tokens" in below["explanation"]
    assert "8M tokens" in beyond["explanation"]
    assert (below["tokens_to_target_low"], below["tokens_to_target_high"]) == (None, pytest.approx(1e6, rel=0.05))
    assert (beyond["tokens_to_target_low"], beyond["tokens_to_target_high"]) == (pytest.approx(8e6, rel=0.05), None)


def test_intervals_of_tokens_and_of_ratios_between_batches_cover_the_truth() -> None:
    inside, contrasts = [], []
    for draw in range(60):
        lab = replace(LAB, draw=draw, noise=0.006, seeds=(0, 1, 2), optimizers={"adamw": Law(drift=0.02)}, shared=0.3)
        _, cells = read_laws(lab.records())
        rows = cells.cells.rows(named=True)
        inside += [r["tokens_to_target_low"] < true_tokens(lab, r) < r["tokens_to_target_high"] for r in rows]
        errors = cells.errors_of(rows[0], [1024, 16384])
        assert errors is not None
        first, last = (np.log(r["tokens_to_target"] / true_tokens(lab, r)) for r in (rows[0], rows[-1]))
        contrasts.append(abs(first - last) < t_quantile(0.9, errors.contrast_dof) * errors.of_difference(0, 1))
    assert 0.82 < np.mean(inside) < 0.98
    assert 0.82 < np.mean(contrasts) < 0.98


def test_errors_of_the_cells_are_those_of_their_intervals() -> None:
    _, cells = read_laws(LAB.records())
    row = cells.cells.row(0, named=True)
    errors = cells.errors_of(row, [row["global_batch_tokens"]])
    assert errors is not None
    half = t_quantile(0.9, errors.dof) * np.sqrt(errors.covariance[0, 0])
    assert row["tokens_to_target_high"] / row["tokens_to_target"] == pytest.approx(np.exp(half))


def test_one_token_budget_is_refused() -> None:
    laws, cells = read_laws(replace(LAB, budgets=(2**20,)).records())
    assert set(laws["verdict"]) == set(cells.cells["verdict"]) == {"refused"}
    assert cells.cells["tokens_to_target"].null_count() == cells.cells.height == 6
    assert cells.cells["explanation"][0] == "one token budget, 1M, identifies no tokens to a target: it takes several"


def test_two_token_budgets_give_numbers_without_intervals() -> None:
    lab = replace(LAB, budgets=(2**20, 2**23), noise=1e-4)
    _, cells = read_laws(lab.records())
    known = cells.cells.filter(pl.col("tokens_to_target").is_not_null())
    assert set(known["verdict"]) == {"few_points"}
    assert known["tokens_to_target_low"].null_count() == known.height == 5
    for row in known.iter_rows(named=True):
        assert row["tokens_to_target"] == pytest.approx(true_tokens(lab, row), rel=0.01)


def test_runs_recorded_on_a_decaying_schedule_have_their_law_as_decayed() -> None:
    laws, cells = read_laws(replace(LAB, protocol="mid_schedule").records())
    assert set(laws["protocol"]) == set(cells.cells["protocol"]) == {"decayed"}


def test_a_table_of_final_losses_keeps_its_protocol() -> None:
    laws, _ = read_laws(replace(LAB, protocol="unstated").records())
    assert set(laws["protocol"]) == {"unstated"}


def test_curves_at_a_constant_rate_have_no_law() -> None:
    laws, cells = read_laws(records(Laboratory()))
    assert laws.is_empty()
    assert cells.cells.is_empty()


def test_without_targets_there_are_three_that_every_batch_comes_to() -> None:
    _, cells = read_laws(replace(LAB, targets=(), batches=(1024, 4096)).records())
    assert cells.cells["target_loss_nats"].n_unique() == 3
    assert cells.cells["tokens_to_target"].null_count() == 0


def test_a_budget_at_which_all_runs_diverged_is_left_out_and_named() -> None:
    made = LAB.records()
    lost = (
        (pl.col("optimizer") == "adamw") & (pl.col("global_batch_tokens") == 1024) & (pl.col("token_budget") == 2**23)
    )
    status = pl.when(lost).then(pl.lit("diverged")).otherwise("status")
    laws, cells = read_laws(replace(made, runs=made.runs.with_columns(status=status)))
    assert laws["num_budgets"].to_list() == [3, 4, 4, 4, 4, 4]
    assert cells.cells["explanation"][0] == "left out, since runs at the chosen rate diverged: budget 8M"


def test_losses_that_rise_with_the_budget_give_no_tokens() -> None:
    made = replace(LAB, optimizers={"adamw": Law()}).records()
    rising = (
        pl.when(pl.col("run_id").str.contains("b4096-")).then(5.0 - pl.col("val_loss_nats")).otherwise("val_loss_nats")
    )
    laws, cells = read_laws(replace(made, evaluations=made.evaluations.with_columns(val_loss_nats=rising)))
    assert "not_identified" in laws.row(by_predicate=pl.col("global_batch_tokens") == 4096, named=True)["reasons"]
    assert cells.cells.filter(global_batch_tokens=4096)["tokens_to_target"].to_list() == [None]


def test_order_of_rows_does_not_matter() -> None:
    made = LAB.records()
    shuffled = replace(made, runs=made.runs.sample(fraction=1, shuffle=True, seed=1))
    (laws, cells), (laws_too, cells_too) = read_laws(made), read_laws(shuffled)
    assert_frame_equal(laws, laws_too)
    assert_frame_equal(cells.cells, cells_too.cells)


def test_cells_of_laws_join_those_of_crossings() -> None:
    _, cells = read_laws(LAB.records())
    _, others = read_laws(replace(LAB, protocol="unstated").records())
    both = cells.joined_with(others)
    assert both.cells.height == 12
    assert both.errors_of(others.cells.row(0, named=True), [1024]) is not None


def test_budgets_that_their_warmup_confounds_are_named() -> None:
    made = LAB.records()
    slow = replace(made, runs=made.runs.with_columns(warmup_tokens=pl.lit(2**19)))
    _, cells = read_laws(slow)
    assert cells.cells["verdict"][0] == "warmup_confounded"
    assert cells.cells["explanation"][0] == "warmup of more than a fifth: budgets 1M and 2M"
