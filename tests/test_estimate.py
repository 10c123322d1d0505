"""The whole of the analysis: schemas, sweeps with parts missing, equal budgets, agreement, fresh seeds."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from analysis.estimate import Estimates, estimate
from analysis.inputs.records import Records
from analysis.schemas import TABLES, polars_schema
from tests.synthetic import Laboratory, plan, records

LAB = Laboratory()


def all_diverged() -> Records:
    return records(LAB, [replace(run, status="diverged") for run in plan(LAB)])


def half_unfinished() -> Records:
    return records(
        LAB, [replace(run, status="running", budget=run.budget // 2 // run.batch * run.batch) for run in plan(LAB)]
    )


SWEEPS: dict[str, Callable[[], Records]] = {
    "whole": lambda: records(LAB),
    "no run": lambda: records(LAB, []),
    "one run": lambda: records(LAB, plan(LAB)[:1]),
    "one batch": lambda: records(replace(LAB, batches=(1024,))),
    "one seed": lambda: records(replace(LAB, grid_seeds=(0,), fresh_seeds=())),
    "one rate": lambda: records(replace(LAB, rates=(1.0,))),
    "one seed, one rate": lambda: records(replace(LAB, rates=(1.0,), grid_seeds=(0,), fresh_seeds=())),
    "one optimizer": lambda: records(replace(LAB, optimizers={"adamw": LAB.optimizers["adamw"]})),
    "no noise": lambda: records(replace(LAB, noise=0.0)),
    "all diverged": all_diverged,
    "none reached": lambda: records(replace(LAB, budget_over_target=0.2)),
    "some reached": lambda: records(replace(LAB, budget_over_target=0.6)),
    "under way": half_unfinished,
    "at the target at once": lambda: records(replace(LAB, first_mark_tokens=2**21, budget_over_target=20)),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_estimate_of_any_sweep_has_its_schema_and_no_number_that_is_none(name: str) -> None:
    made = SWEEPS[name]()
    estimates = estimate(made, reference=made)
    for table, columns in TABLES.items():
        frame = getattr(estimates, table)
        assert frame.schema == polars_schema(columns), table
        numbers = frame.select(pl.selectors.float())
        finite = numbers.select(pl.all().is_finite().fill_null(True).all())
        assert all(finite.row(0) if finite.width else ()), table
        if {"verdict", "explanation"} <= set(frame.columns):
            unexplained = frame.filter((pl.col("verdict") != "ok") & (pl.col("explanation") == ""))
            trends = ("rising", "falling", "unresolved")
            assert unexplained.filter(~pl.col("verdict").is_in(trends)).is_empty(), table


@pytest.mark.parametrize("name", SWEEPS)
def test_estimate_explains_every_missing_number(name: str) -> None:
    estimates = estimate(SWEEPS[name]())
    for table, quantity in (
        ("cells", "tokens_to_target"),
        ("critical_batches", "critical_batch_tokens"),
        ("token_ratios", "token_ratio"),
        ("ratio_trends", "slope"),
    ):
        frame = getattr(estimates, table)
        assert "ok" not in set(frame.filter(pl.col(quantity).is_null())["verdict"]), table
        unbounded = frame.filter(pl.col(quantity).is_not_null() & pl.col(f"{quantity}_low").is_null())
        assert "" not in set(unbounded["explanation"]), table


def test_estimate_is_the_same_whatever_the_order_of_the_rows() -> None:
    made = records(LAB)
    shuffled = Records(made.manifest, made.runs.sample(fraction=1, shuffle=True, seed=1), made.evaluations.reverse())
    first, second = estimate(made), estimate(shuffled)
    for table in TABLES:
        assert_frame_equal(getattr(first, table), getattr(second, table), rel_tol=1e-9)


def test_cells_with_fresh_seeds_are_estimated_from_those_alone() -> None:
    flattered = [replace(r, log_tokens=r.log_tokens - (0.5 if r.stage == "grid" else 0.0)) for r in plan(LAB)]
    cells = estimate(records(LAB, flattered)).cells.filter(pl.col("target_loss_nats") == 2.0)
    fresh = {(r.optimizer, r.batch): r.log_tokens for r in flattered if r.stage == "confirm"}
    assert set(cells["seeds_from"]) == {"fresh"}
    for row in cells.iter_rows(named=True):
        assert np.log(row["tokens_to_target"]) == pytest.approx(
            fresh[row["optimizer"], row["global_batch_tokens"]], abs=0.01
        )


def test_a_cell_with_one_seed_short_of_the_target_has_tokens_beyond_those_of_the_survivor() -> None:
    lab = replace(LAB, fresh_seeds=(2, 3))
    runs = [replace(r, log_tokens=99.0) if r.seed == 3 and r.batch == 4096 else r for r in plan(lab)]
    estimates = estimate(records(lab, runs))
    cells = estimates.cells.filter(pl.col("global_batch_tokens") == 4096)
    assert set(cells.select("verdict", "num_seeds", "num_reached", "num_censored").rows()) == {("censored", 2, 1, 1)}
    fresh = estimates.targets.filter(pl.col("stage") == "confirm", pl.col("global_batch_tokens") == 4096)
    survivors = fresh.filter(status="reached").select("optimizer", "target_loss_nats", survivor="tokens_to_target")
    both = cells.join(survivors, on=["optimizer", "target_loss_nats"])
    assert both.height == cells.height
    assert (both["tokens_to_target"] > both["survivor"]).all()


def test_a_cell_whose_fresh_seeds_all_fall_short_is_censored_not_unreached() -> None:
    lab = replace(LAB, fresh_seeds=(2, 3))
    runs = [replace(r, log_tokens=99.0) if r.stage == "confirm" and r.batch == 4096 else r for r in plan(lab)]
    cells = estimate(records(lab, runs)).cells.filter(pl.col("global_batch_tokens") == 4096)
    assert set(cells["verdict"]) == {"censored"}
    assert set(cells["explanation"]) == {"2 of 2 runs at the chosen rate fell short"}


def early(stage: str) -> Records:
    """One batch of one optimizer is at the target at its first evaluation, in one of the stages."""
    lab = replace(LAB, batches=(1024, 4096, 16384), first_mark_tokens=32_768)
    there = (stage, "adamw", 4096)
    runs = [replace(r, log_tokens=9.0) if (r.stage, r.optimizer, r.batch) == there else r for r in plan(lab)]
    return records(lab, runs)


@pytest.mark.parametrize(("stage", "expected"), [("confirm", {"reached_at_first_eval"}), ("grid", {"ok"})])
def test_a_cell_at_the_target_at_its_first_evaluation_is_judged_by_the_seeds_it_reports(
    stage: str, expected: set[str]
) -> None:
    cells = estimate(early(stage)).cells.filter(
        pl.col("optimizer") == "adamw", pl.col("global_batch_tokens") == 4096, pl.col("target_loss_nats") == 2.0
    )
    assert set(cells["verdict"]) == expected


@pytest.mark.filterwarnings("error")
def test_a_target_that_nobody_reached_gives_no_warning() -> None:
    cells = estimate(records(replace(LAB, targets=(2.0, 1.0)))).cells.filter(pl.col("target_loss_nats") == 1.0)
    assert set(cells["verdict"]) == {"not_reached"}


@pytest.mark.filterwarnings("error")
def test_a_sweep_without_fresh_seeds_of_which_nobody_reached_a_target_gives_no_warning() -> None:
    cells = estimate(records(replace(LAB, targets=(1.0,), fresh_seeds=()))).cells
    assert (set(cells["num_seeds"]), set(cells["num_reached"])) == ({6}, {0})


def test_a_missing_interval_is_explained_once() -> None:
    estimates = estimate(records(replace(LAB, grid_seeds=(0,), fresh_seeds=())))
    assert set(estimates.token_ratios["explanation"].str.count_matches("no interval")) == {1}


def test_a_cell_read_off_a_decaying_rate_is_marked_as_biased() -> None:
    made = records(LAB)
    decaying = replace(made, runs=made.runs.with_columns(protocol=pl.lit("mid_schedule")))
    estimates = estimate(decaying)
    frames = (estimates.cells, estimates.token_ratios, estimates.critical_batches)
    assert all("ok" not in set(frame["verdict"]) for frame in frames)
    assert "mid_schedule" in set(estimates.cells["verdict"])


def test_a_cell_tells_all_its_caveats() -> None:
    low_grid = replace(LAB, noise=0.03, rates=(0.1, 0.2, 0.4), budget_over_target=20, warmup_tokens=200_000)
    cells = estimate(records(low_grid)).cells
    both = cells.filter(pl.col("verdict") == "warmup_confounded", pl.col("lr_verdict") == "edge_of_grid")
    assert both.height > 0
    assert both["explanation"].str.contains("upper bound").all()


def test_a_cell_of_one_rate_says_that_it_was_not_tuned() -> None:
    cells = estimate(records(replace(LAB, rates=(1.0,)))).cells
    assert cells["explanation"].str.contains("only one learning rate was tried").all()


def test_a_cell_names_the_rate_that_its_fresh_seeds_should_have_had() -> None:
    lab = replace(LAB, noise=0.01)
    runs = [replace(r, peak_lr=r.peak_lr / 2) if r.stage == "confirm" else r for r in plan(lab)]
    cells = estimate(records(lab, runs)).cells
    best = LAB.optimizers["adamw"].optimum(1024)
    reasons = cells.filter(pl.col("optimizer") == "adamw", pl.col("global_batch_tokens") == 1024)["explanation"]
    assert all(f"learning rate {best:.3g} takes 1" in reason for reason in reasons)  # 1 - exp(-.3 ln(2)^2) = 13 %


def compared(reference: Records) -> Estimates:
    return estimate(records(LAB), reference=reference)


def test_agreement_of_a_sweep_with_itself_is_complete() -> None:
    table = compared(records(LAB)).agreement
    assert table["agrees"].all()
    assert {"tokens_to_target", "critical_batch_tokens", "token_ratio", "slope"} == set(table["quantity"])


@pytest.mark.slow
def test_agreement_holds_for_another_draw_and_fails_for_another_truth() -> None:
    again = compared(records(replace(LAB, draw=7))).agreement
    assert again["agrees"].mean() > 0.75
    slower = [replace(run, log_tokens=run.log_tokens + 0.7) for run in plan(LAB)]
    lab = replace(LAB, budget_over_target=4)
    other = estimate(records(lab), reference=records(lab, slower)).agreement
    assert not other.filter(pl.col("quantity") == "tokens_to_target")["agrees"].any()


def test_agreement_is_not_claimed_over_another_corpus() -> None:
    made = records(LAB)
    other = replace(made, runs=made.runs.with_columns(corpus_fingerprint=pl.lit("f2")))
    table = compared(other).agreement
    assert table.height > 0
    assert table["agrees"].null_count() == table.height
    assert set(table["reason"]) == {"the corpus differs: f1 here, f2 in the reference"}


def test_agreement_is_not_claimed_over_other_settings() -> None:
    ours, theirs = (
        replace(made, runs=made.runs.with_columns(config_json=pl.lit(config)))
        for made, config in (
            (records(LAB), '{"optimizer": {"momentum": 0.9, "peak_lr": 1}}'),
            (records(LAB), '{"optimizer": {"momentum": 0.95, "peak_lr": 2}}'),
        )
    )
    assert set(estimate(ours, reference=theirs).agreement["reason"]) == {"the settings differ: optimizer.momentum"}
    assert estimate(ours, reference=ours).agreement["agrees"].all()


def test_analysis_loads_no_torch_and_no_plotting() -> None:
    code = "import sys, analysis.estimate; print({'torch', 'lightning', 'seaborn', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
