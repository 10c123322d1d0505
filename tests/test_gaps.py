"""Gaps of final loss against planted truth: sign, pairing, tests, Holm's correction, coverage."""

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


def table(made: Records, baseline: str = "adamw") -> pl.DataFrame:
    return gaps(final_losses(made, 0.9), baseline, 0.9)


def true_gap(lab: Finals, row: dict[str, int]) -> float:
    adamw, muon = (
        lab.optimizers[name].loss(row["global_batch_tokens"], row["token_budget"]) for name in ("adamw", "muon")
    )
    return adamw - muon


def test_gap_is_the_baselines_loss_less_the_challengers() -> None:
    found = table(replace(LAB, noise=1e-5).records())
    assert found.height == 3 * 4
    for row in found.iter_rows(named=True):
        assert row["gap_nats"] == pytest.approx(true_gap(LAB, row), abs=1e-4)


def test_swapping_the_optimizers_flips_the_sign_of_the_gaps() -> None:
    one, other = table(LAB.records()), table(LAB.records(), "muon")
    for flipped, name in (
        ("gap_nats", "gap_nats"),
        ("gap_nats_low", "gap_nats_high"),
        ("gap_nats_high", "gap_nats_low"),
    ):
        assert one[flipped].to_list() == pytest.approx((-other[name]).to_list())
    assert one["p_value"].to_list() == pytest.approx(other["p_value"].to_list())


def test_gaps_of_the_same_seeds_are_paired_and_narrower() -> None:
    lab = replace(LAB, shared=0.9, seeds=(0, 1, 2))
    made = lab.records()
    other = pl.when(pl.col("optimizer") == "muon").then(pl.col("data_seed") + 10).otherwise("data_seed")
    paired, unpaired = table(made), table(replace(made, runs=made.runs.with_columns(data_seed=other)))
    widths = [float((t["gap_nats_high"] - t["gap_nats_low"]).to_numpy().mean()) for t in (paired, unpaired)]
    assert set(paired["num_pairs"]) == {3}
    assert set(unpaired["num_pairs"]) == {0}
    assert widths[0] < 0.6 * widths[1]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2)])
def test_intervals_of_gaps_cover_the_truth_and_p_values_tell_the_same(seeds: tuple[int, ...]) -> None:
    lab = Finals({"adamw": Law(), "muon": Law()}, budgets=(2**20, 2**22), seeds=seeds, noise=0.01)
    found = pl.concat([table(replace(lab, draw=draw).records()) for draw in range(40)])
    inside = ((found["gap_nats_low"] < 0) & (found["gap_nats_high"] > 0)).to_numpy()
    assert 0.84 < np.mean(inside) < 0.96
    assert (found["p_value"].to_numpy() < 0.1).tolist() == (~inside).tolist()


def test_p_values_are_corrected_over_challengers_and_batches_of_a_budget() -> None:
    lab = Finals({"adamw": Law(), "muon": Law(gain=1.01), "sgd": Law(gain=0.99)}, budgets=(2**20, 2**21))
    found = table(lab.records()).sort("token_budget", "p_value")
    for _, family in found.group_by("token_budget"):
        assert family.height == 6
        raw, adjusted = family["p_value"].to_numpy(), family["p_value_holm"].to_numpy()
        assert adjusted[0] == pytest.approx(min(1.0, 6 * raw[0]))
        assert np.all(adjusted >= raw)


def test_optimizers_that_share_no_batch_and_budget_are_refused() -> None:
    made = LAB.records()
    apart = pl.when(pl.col("optimizer") == "muon").then(pl.col("token_budget") + 1).otherwise("token_budget")
    row = table(replace(made, runs=made.runs.with_columns(token_budget=apart))).row(0, named=True)
    assert (row["gap_nats"], row["verdict"]) == (None, "refused")
    assert row["explanation"] == "AdamW and Muon share no batch and token budget"


def test_a_gap_names_the_side_that_diverged() -> None:
    made = LAB.records()
    lost = (pl.col("optimizer") == "muon") & (pl.col("global_batch_tokens") == 1024)
    status = pl.when(lost).then(pl.lit("diverged")).otherwise("status")
    row = table(replace(made, runs=made.runs.with_columns(status=status))).row(0, named=True)
    assert (row["gap_nats"], row["p_value"], row["verdict"]) == (None, None, "diverged")
    assert row["explanation"] == "Muon: 2 of 2 runs at the chosen rate diverged"


def test_without_repeated_seeds_a_gap_has_no_interval_and_no_test() -> None:
    found = table(replace(LAB, seeds=(0,)).records())
    assert found["gap_nats"].null_count() == 0
    assert found["gap_nats_low"].null_count() == found["p_value_holm"].null_count() == found.height
    assert set(found["verdict"]) == {"few_points"}


def test_order_of_rows_does_not_matter() -> None:
    made = LAB.records()
    shuffled = replace(made, runs=made.runs.sample(fraction=1, shuffle=True, seed=1))
    assert_frame_equal(table(made), table(shuffled))
