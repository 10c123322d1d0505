"""Speedups at a token budget: planted truth, bounds beyond the baseline's budgets, few budgets."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from analysis.quantities.final_losses import final_losses
from analysis.quantities.speedup import speedups
from tests.planted_finals import Finals, Law

LAB = Finals()


def table(lab: Finals, baseline: str = "adamw") -> pl.DataFrame:
    return speedups(final_losses(lab.records(), 0.9), baseline, 0.9)


def test_speedup_is_the_planted_gain_within_the_baselines_budgets() -> None:
    found = table(replace(LAB, noise=1e-6))
    assert found["token_ratio"].to_list()[:3] == pytest.approx([1.5] * 3, rel=1e-3)
    assert found["verdict"].to_list() == ["ok", "ok", "ok", "censored"]


def test_speedup_beyond_the_baselines_largest_budget_is_bounded_below() -> None:
    row = table(LAB).row(-1, named=True)
    assert (row["token_ratio"], row["token_ratio_low"], row["token_ratio_high"]) == (None, 1.0, None)
    assert row["explanation"] == "beyond the baseline's largest budget: the ratio is above 1.00"


def test_speedup_below_the_baselines_smallest_budget_is_bounded_above() -> None:
    row = table(LAB, "muon").row(0, named=True)
    assert (row["token_ratio"], row["token_ratio_low"], row["verdict"]) == (None, None, "not_identified")
    assert row["token_ratio_high"] == pytest.approx(1.0)


@pytest.mark.slow
def test_intervals_of_speedups_cover_the_truth() -> None:
    lab = replace(LAB, shared=0.0, noise=0.01)
    found = pl.concat([table(replace(lab, draw=draw)).head(3) for draw in range(60)])
    inside = ((found["token_ratio_low"] < 1.5) & (found["token_ratio_high"] > 1.5)).to_numpy()
    assert 0.84 < np.mean(inside) < 0.97


def test_speedup_with_one_budget_of_the_baseline_is_refused() -> None:
    found = table(replace(LAB, budgets=(2**20,)))
    assert (found["token_ratio"][0], found["verdict"][0]) == (None, "refused")
    assert found["explanation"][0] == "one token budget of AdamW, 1M: a loss law takes several"


def test_speedup_with_two_budgets_is_a_number_without_an_interval() -> None:
    row = table(replace(LAB, budgets=(2**20, 2**22), noise=1e-5)).row(0, named=True)
    assert row["token_ratio"] == pytest.approx(1.5, rel=0.1)
    assert (row["token_ratio_low"], row["verdict"]) == (None, "few_points")


def test_speedup_takes_the_best_batch_of_each_side() -> None:
    lab = Finals({"adamw": Law(b_crit=1e9), "muon": Law(gain=1.5, b_crit=1024.0)}, noise=1e-6)
    assert table(lab)["token_ratio"].to_list()[1:] == pytest.approx([0.75] * 3, rel=1e-2)


def test_speedup_against_a_baseline_that_has_levelled_off_is_not_identified() -> None:
    made = LAB.records()
    level = pl.when(pl.col("run_id").str.contains("adamw")).then(2.5).otherwise("val_loss_nats")
    found = speedups(
        final_losses(replace(made, evaluations=made.evaluations.with_columns(val_loss_nats=level)), 0.9), "adamw", 0.9
    )
    assert set(found["verdict"]) == {"not_identified"}
    assert found["token_ratio"].null_count() == found.height


def test_speedup_where_every_batch_had_a_budget_of_its_own_is_refused() -> None:
    made = LAB.records()
    own = dict(zip(LAB.batches, LAB.budgets, strict=False))
    runs = made.runs.filter(pl.col("token_budget") == pl.col("global_batch_tokens").replace_strict(own))
    found = speedups(final_losses(replace(made, runs=runs), 0.9), "adamw", 0.9)
    assert set(found["verdict"]) == {"refused"}
    assert found["explanation"][0] == "no batch of AdamW ran at several token budgets: a loss law takes them"
