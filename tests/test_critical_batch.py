"""Critical batches from planted laboratories, and every verdict that stands in for a number."""

from dataclasses import replace

import polars as pl
import pytest

from analysis.estimate import EstimateOptions, Estimates, estimate
from tests.synthetic import Laboratory, Planted, plan, records

LAB = Laboratory(optimizers={"adamw": Planted()}, targets=(2.0,), warmup_tokens=0, noise=0.05, draw=1)


def only(estimates: Estimates, definition: str = "emin_over_smin") -> dict[str, object]:
    rows = estimates.critical_batches.filter(pl.col("definition") == definition)
    assert rows.height == 1
    return rows.row(0, named=True)


def planted(lab: Laboratory, **changes: object) -> Laboratory:
    return replace(lab, optimizers={"adamw": replace(Planted(), **changes)})  # type: ignore[arg-type]


def test_emin_over_smin_recovers_the_planted_curve() -> None:
    row = only(estimate(records(replace(LAB, noise=0.02))))
    assert row["verdict"] == "ok"
    assert row["explanation"] == ""
    assert row["critical_batch_tokens"] == pytest.approx(2048, rel=0.1)
    assert row["t_min_tokens"] == pytest.approx(100_000, rel=0.06)
    assert row["s_min_steps"] == pytest.approx(100_000 / 2048, rel=0.06)


def test_overhead_20pct_is_the_other_definition_shifted_and_shrunk() -> None:
    estimates = estimate(records(LAB), EstimateOptions(reference_batch_tokens=512))
    crit, star = only(estimates), only(estimates, "overhead_20pct")
    assert star["critical_batch_tokens"] == pytest.approx(1.2 * 512 + 0.2 * crit["critical_batch_tokens"])  # type: ignore[operator]
    assert star["critical_batch_tokens_low"] <= star["critical_batch_tokens"] <= star["critical_batch_tokens_high"]  # type: ignore[operator]
    assert "512 tokens" in str(star["explanation"])


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.5])
def test_overhead_20pct_is_the_batch_where_steps_are_a_fifth_above_linear_scaling(alpha: float) -> None:
    lab = planted(replace(LAB, noise=0.002, fresh_seeds=(2, 3)), alpha=alpha)
    star = only(estimate(records(lab), EstimateOptions(reference_batch_tokens=256)), "overhead_20pct")[
        "critical_batch_tokens"
    ]
    assert isinstance(star, float)
    steps = [100_000 * (1 + (batch / 2048) ** alpha) / batch for batch in (256, star)]
    assert steps[1] == pytest.approx(1.2 * steps[0] * 256 / star, rel=0.01)


def test_reference_batch_is_the_smallest_that_all_optimizers_share() -> None:
    lab = Laboratory()
    runs = [run for run in plan(lab) if not (run.optimizer == "muon" and run.batch == 256)]
    assert estimate(records(lab, runs)).reference_batch_tokens == 1024


def test_overhead_20pct_is_refused_without_a_shared_batch() -> None:
    lab = Laboratory()
    runs = [run for run in plan(lab) if (run.optimizer == "muon") == (run.batch > 1024)]
    rows = estimate(records(lab, runs)).critical_batches.filter(pl.col("definition") == "overhead_20pct")
    assert set(rows["verdict"]) == {"refused"}
    assert rows["critical_batch_tokens"].null_count() == rows.height


@pytest.mark.parametrize(("b_crit", "end", "side"), [(1e7, "high", "above"), (1.0, "low", "below")])
def test_a_knee_beyond_what_the_batches_show_has_an_open_interval(b_crit: float, end: str, side: str) -> None:
    row = only(estimate(records(planted(replace(LAB, draw=1), b_crit=b_crit))))
    assert row["verdict"] == "not_identified"
    assert row[f"critical_batch_tokens_{end}"] is None
    assert f"may lie {side} the batches tried" in str(row["explanation"])


@pytest.mark.parametrize(("b_crit", "side"), [(100_000.0, "above"), (40.0, "below")])
def test_a_knee_wholly_outside_the_batches_is_not_identified(b_crit: float, side: str) -> None:
    row = only(estimate(records(planted(replace(LAB, noise=0.005), b_crit=b_crit))))
    assert row["verdict"] == "not_identified"
    assert row["critical_batch_tokens"] is None
    known, open_ = ("low", "high") if side == "above" else ("high", "low")
    assert row[f"critical_batch_tokens_{open_}"] is None
    assert row[f"critical_batch_tokens_{known}"] == pytest.approx(b_crit, rel=0.5)
    assert row["s_min_steps" if side == "above" else "t_min_tokens"] is None
    assert f"the knee lies {side} all batches tried" in str(row["explanation"])


def test_a_u_shaped_curve_is_fitted_on_its_rising_branch_and_said_to_be() -> None:
    row = only(estimate(records(planted(replace(LAB, noise=0.02), extra={256: 0.8}))))
    assert row["verdict"] == "non_monotone"
    assert row["num_batches"] == 3
    assert row["critical_batch_tokens"] == pytest.approx(4096, rel=0.25)  # twice T of the first batch that is fitted
    assert "its rise is fitted, from batch 1K on" in str(row["explanation"])


def test_a_curve_that_misfits_beyond_the_noise_says_so() -> None:
    row = only(estimate(records(planted(LAB, extra={4096: 0.5}))))
    p_value = row["lack_of_fit_p"]
    assert isinstance(p_value, float)
    assert p_value < 0.01
    assert row["verdict"] in ("misfit", "not_identified")  # the wider interval may be open
    assert "widened" in str(row["explanation"])


def test_two_batches_give_no_number() -> None:
    row = only(estimate(records(replace(LAB, batches=(1024, 4096)))))
    assert (row["verdict"], row["critical_batch_tokens"]) == ("few_points", None)


def test_one_seed_at_four_batches_gives_a_number_without_an_interval() -> None:
    row = only(estimate(records(replace(LAB, grid_seeds=(0,), fresh_seeds=()))))
    assert row["verdict"] == "few_points"
    assert row["critical_batch_tokens"] is not None
    assert row["critical_batch_tokens_low"] is None
    assert "no interval" in str(row["explanation"])


def test_a_batch_that_fell_short_is_left_out_and_named() -> None:
    runs = [replace(run, log_tokens=99.0) if run.batch == 16384 else run for run in plan(LAB)]
    row = only(estimate(records(LAB, runs)))
    assert (row["verdict"], row["num_batches"]) == ("censored", 3)
    assert "no run reached the target: batch 16K" in str(row["explanation"])


def test_a_series_that_never_reached_the_target_says_how_low_it_came() -> None:
    lab = replace(LAB, budget_over_target=0.5, noise=0.0)
    row = only(estimate(records(lab)))
    lowest = 2.0 * 2**lab.exponent
    assert (row["verdict"], row["num_batches"], row["critical_batch_tokens"]) == ("not_reached", 0, None)
    seen = float(str(row["explanation"]).removeprefix("target not reached: the lowest loss seen was "))
    assert seen == pytest.approx(lowest, abs=0.01)


def test_what_the_grid_leaves_open_reaches_the_fit() -> None:
    row = only(estimate(records(replace(LAB, rates=(1.0,), grid_seeds=(0, 1, 2)))))
    assert (row["verdict"], row["explanation"]) == ("single_rate", "only one learning rate was tried")


def test_a_target_close_to_the_warmup_marks_cell_and_fit() -> None:
    estimates = estimate(records(replace(LAB, warmup_tokens=33_000)))
    assert estimates.cells.filter(pl.col("verdict") == "warmup_confounded")["global_batch_tokens"].to_list() == [
        256,
        1024,
    ]
    assert only(estimates)["verdict"] == "warmup_confounded"


def test_protocols_never_mix_in_one_fit() -> None:
    made = records(replace(LAB, budget_over_target=4))
    raw = pl.when(pl.col("global_batch_tokens") == 256).then(pl.lit("constant_raw")).otherwise("protocol")
    fits = estimate(replace(made, runs=made.runs.with_columns(protocol=raw))).critical_batches
    assert dict(fits.filter(definition="emin_over_smin").select("protocol", "num_batches").iter_rows()) == {
        "constant_ema": 3,
        "constant_raw": 1,
    }


def test_fit_curves_pass_through_the_cells_of_a_quiet_laboratory() -> None:
    curve = estimate(records(replace(LAB, noise=0.01))).fit_curves
    for batch, tokens, low, high in curve.select(
        "global_batch_tokens", "tokens_to_target", "tokens_to_target_low", "tokens_to_target_high"
    ).iter_rows():
        assert tokens == pytest.approx(100_000 * (1 + batch / 2048), rel=0.05)
        assert low < tokens < high
