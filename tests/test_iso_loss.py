"""The challenger's batch at the baseline's loss: planted truth, and what lies beyond the batches that were run."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.quantities.final_losses import final_losses
from analysis.quantities.iso_loss import iso_loss, largest_batch
from tests.planted_finals import Finals, Law

LAB = Finals(batches=(1024, 2048, 4096, 8192, 16384), budgets=(2**21, 2**22))


def table(lab: Finals, baseline: str = "adamw") -> pl.DataFrame:
    return iso_loss(final_losses(lab.records(), 0.9), baseline, 0.9)


def true_ratio(lab: Finals, batch: int) -> float:
    """Return B'/B: at equal loss gain_A / (1 + B / b_crit) = gain_M / (1 + B' / b_crit)."""
    adamw, muon = lab.optimizers["adamw"], lab.optimizers["muon"]
    return (muon.gain / adamw.gain * (1 + batch / adamw.b_crit) - 1) * muon.b_crit / batch


def test_batch_ratio_is_that_of_equal_loss() -> None:
    found = table(replace(LAB, noise=1e-5)).filter(pl.col("batch_ratio").is_not_null())
    assert found.height == 2 * 4
    for row in found.iter_rows(named=True):
        assert row["batch_ratio"] == pytest.approx(true_ratio(LAB, row["global_batch_tokens"]), rel=0.01)
        assert (row["lower_bound"], row["verdict"]) == (None, "ok")


def test_batch_ratio_beyond_the_largest_batch_is_censored_and_bounded() -> None:
    row = table(LAB).filter(global_batch_tokens=16384).row(0, named=True)
    assert (row["batch_ratio"], row["batch_ratio_low"], row["batch_ratio_high"]) == (None, 1.0, None)
    assert (row["lower_bound"], row["verdict"]) == (1.0, "censored")
    assert "largest batch, 16K" in row["explanation"]


def test_batch_ratio_below_the_smallest_batch_is_not_identified() -> None:
    row = table(LAB, "muon").filter(global_batch_tokens=1024).row(0, named=True)
    assert (row["batch_ratio"], row["batch_ratio_low"], row["lower_bound"]) == (None, None, None)
    assert row["verdict"] == "not_identified"


def test_batch_ratio_of_an_optimizer_with_its_like_is_one() -> None:
    found = table(replace(LAB, optimizers={"adamw": Law(), "muon": Law()}, noise=0.0))
    assert found["batch_ratio"].to_list() == pytest.approx([1.0] * 10)


def test_intervals_of_batch_ratios_cover_the_truth() -> None:
    found = pl.concat([table(replace(LAB, draw=draw, shared=0.0, noise=0.01)) for draw in range(40)])
    inside = [
        (row["batch_ratio_low"] or 0.0)
        < true_ratio(LAB, row["global_batch_tokens"])
        < (row["batch_ratio_high"] or np.inf)
        for row in found.filter(pl.col("global_batch_tokens") < 8192).iter_rows(named=True)
    ]
    assert 0.84 < np.mean(inside) < 0.99


def test_a_baseline_budget_that_the_challenger_never_had_has_no_row() -> None:
    made = LAB.records()
    one = made.runs.filter((pl.col("optimizer") == "adamw") | (pl.col("token_budget") == 2**21))
    found = iso_loss(final_losses(replace(made, runs=one), 0.9), "adamw", 0.9)
    assert set(found["token_budget"]) == {2**21}


def test_largest_batch_is_read_on_the_rising_side_of_a_u() -> None:
    log_batch, losses = np.arange(5.0), np.array([3.0, 2.5, 2.0, 2.5, 3.0])
    assert largest_batch(log_batch, losses, 2.5) == pytest.approx(3.0)
    assert largest_batch(log_batch, losses, 1.9) == -np.inf
    assert largest_batch(log_batch, losses, 3.0) == 4.0
    assert largest_batch(log_batch, losses, 3.1) == np.inf


@given(st.lists(st.floats(2.0, 4.0), min_size=2, max_size=7), st.floats(1.9, 4.1), st.floats(0.0, 0.5))
def test_largest_batch_grows_with_the_loss_allowed(losses: list[float], loss: float, more: float) -> None:
    log_batch, values = np.arange(float(len(losses))), np.array(losses)
    assert largest_batch(log_batch, values, loss) <= largest_batch(log_batch, values, loss + more) + 1e-9
