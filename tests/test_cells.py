"""T of each cell: runs that fall short, settings beside the rate, the luck of the choice, resamples, verdicts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from analysis.quantities.cells import Cells, estimate_cells
from analysis.schemas import TARGETS, table
from tests.synthetic import Laboratory, Planted, many_targets

LAB = Laboratory(warmup_tokens=0, fresh_seeds=(), budget_over_target=20.0)
TEN = replace(LAB, grid_seeds=tuple(range(10)))

Row = dict[str, Any]


def run(batch: int, seed: int, log_tokens: float, **changes: object) -> Row:
    """Return a row of `targets` at batch, with settings and status as given."""
    names = {"model": "m", "optimizer": "adamw", "protocol": "unstated", "target_loss_nats": 2.0, "stage": "grid"}
    row = (
        dict.fromkeys(TARGETS)
        | names
        | {"global_batch_tokens": batch, "tuning": "", "peak_lr": 0.01, "data_seed": seed}
    )
    row |= {"status": "reached", "tokens_to_target": float(np.exp(log_tokens)), "tokens_seen": 10**9} | changes
    if row["status"] != "reached":
        row["tokens_to_target"] = None
    return row | {"run_id": " ".join(map(str, row.values()))}


def estimated(rows: Sequence[Row]) -> Cells:
    return estimate_cells(table(rows, TARGETS), 0.9)


def cell(cells: Cells, batch: int = 1024) -> Row:
    return cells.cells.row(by_predicate=pl.col("global_batch_tokens") == batch, named=True)


def steady(
    seeds: Sequence[int] = (0, 1, 2), batches: Sequence[int] = (256, 1024, 4096), **changes: object
) -> list[Row]:
    """Return runs of three batches whose log T is 12 with a spread of about 0.1."""
    rng = np.random.default_rng(0)
    return [run(batch, seed, 12.0 + 0.1 * rng.standard_normal(), **changes) for batch in batches for seed in seeds]


def short(row: Row, log_bound: float) -> Row:
    return row | {"status": "not_reached", "tokens_to_target": None, "bound_tokens": float(np.exp(log_bound))}


def test_a_cell_with_a_run_that_fell_short_has_a_wider_interval_above_its_survivors() -> None:
    rows = steady()
    whole = cell(estimated(rows))
    rows[3:6] = sorted(rows[3:6], key=lambda row: row["tokens_to_target"])
    rows[5] = short(rows[5], np.log(rows[4]["tokens_to_target"]) + 0.01)
    censored = cell(estimated(rows))
    survivors = np.exp(np.mean(np.log([row["tokens_to_target"] for row in rows[3:5]])))
    assert (censored["num_seeds"], censored["num_reached"], censored["num_censored"]) == (3, 2, 1)
    assert censored["tokens_to_target"] > survivors
    ratio = {
        name: row["tokens_to_target_high"] / row["tokens_to_target_low"]
        for name, row in (("w", whole), ("c", censored))
    }
    assert ratio["c"] > ratio["w"]
    assert censored["verdict"] == "censored"
    assert "1 of 3 runs at the chosen rate fell short" in censored["explanation"]
    assert censored["steps_to_target"] == pytest.approx(censored["tokens_to_target"] / 1024)


def test_a_cell_with_a_run_at_the_target_too_early_is_bounded_from_above() -> None:
    rows = steady()
    rows[3] |= {"status": "reached_at_first_eval", "tokens_to_target": None, "bound_tokens": float(np.exp(11.8))}
    row = cell(estimated(rows))
    later = np.exp(np.mean(np.log([other["tokens_to_target"] for other in rows[4:6]])))
    assert row["verdict"] == "censored"
    assert "too early" in row["explanation"]
    assert row["tokens_to_target"] < later


@pytest.mark.parametrize(
    ("status", "number", "verdict", "words"),
    [
        ("diverged", 3, "diverged", "all 3 runs diverged"),
        ("diverged", 1, "diverged", "1 of 3 runs at the chosen rate diverged"),
        ("not_reached", 3, "not_reached", "target not reached"),
        ("not_reached", 1, "censored", "nobody knows"),  # no bound is stated
        ("reached_at_first_eval", 3, "reached_at_first_eval", "earlier marks"),
    ],
)
def test_a_cell_without_tokens_says_why(status: str, number: int, verdict: str, words: str) -> None:
    rows = steady()
    for place in range(3, 3 + number):
        rows[place] |= {"status": status, "tokens_to_target": None}
    row = cell(estimated(rows))
    assert (row["tokens_to_target"], row["verdict"]) == (None, verdict)
    assert words in row["explanation"]


def test_a_cell_without_tokens_counts_its_runs_and_bounds_them() -> None:
    rows = steady()
    rows[3:6] = [short(rows[3], 12.3), short(rows[4], 12.2), rows[5] | {"status": "diverged", "tokens_to_target": None}]
    row = cell(estimated(rows))
    assert row["verdict"] == "not_reached"
    assert [row[f"num_{name}"] for name in ("seeds", "reached", "censored", "diverged")] == [3, 0, 2, 1]
    assert "1 of 3 runs diverged" in row["explanation"]
    assert row["tokens_to_target_low"] == pytest.approx(np.exp(12.2))
    assert (row["tokens_to_target"], row["tokens_to_target_high"]) == (None, None)


def test_a_cell_whose_chosen_rate_diverged_once_is_bounded_by_its_other_runs() -> None:
    rows = steady()
    rows[5] |= {"status": "diverged", "tokens_to_target": None}
    row = cell(estimated(rows))
    assert [row[f"num_{name}"] for name in ("seeds", "reached", "censored", "diverged")] == [3, 2, 0, 1]
    assert row["tokens_to_target_low"] == pytest.approx(min(other["tokens_to_target"] for other in rows[3:5]))
    assert row["tokens_to_target_high"] is None


def test_a_cell_at_the_target_too_early_is_bounded_from_above() -> None:
    rows = steady()
    early = {"status": "reached_at_first_eval", "tokens_to_target": None}
    rows[3:6] = [row | early | {"bound_tokens": bound} for row, bound in zip(rows[3:6], (5e4, 7e4, 6e4), strict=True)]
    row = cell(estimated(rows))
    assert row["verdict"] == "reached_at_first_eval"
    assert (row["tokens_to_target_low"], row["tokens_to_target_high"]) == (None, pytest.approx(7e4))


def test_a_run_that_fell_short_has_no_weight_without_repeated_runs_to_tell_the_spread() -> None:
    rows = [run(256, 0, 12.0), run(256, 1, 12.1), short(run(256, 2, 0.0), 12.2)]
    row = cell(estimated(rows), 256)
    assert (row["tokens_to_target"], row["verdict"]) == (None, "censored")
    assert "too few repeated runs" in row["explanation"]


def test_single_runs_give_a_number_without_an_interval() -> None:
    row = cell(estimated(steady(seeds=(0,))))
    assert row["tokens_to_target"] is not None
    assert (row["tokens_to_target_low"], row["verdict"]) == (None, "few_points")


def test_diverged_runs_are_listed_where_another_rate_was_chosen() -> None:
    rows = steady() + steady(peak_lr=0.1, status="diverged")
    row = cell(estimated(rows))
    assert row["best_lr"] == 0.01
    assert row["verdict"] == "ok"
    assert "3 of 6 runs diverged, at learning rate 0.1" in row["explanation"]


def test_settings_beside_the_rate_have_curves_of_their_own() -> None:
    rows = []
    for tuning, optimum, lift in (("momentum=0.9", 0.01, 0.3), ("momentum=0.95", 0.04, 0.0)):
        for rate in (0.005, 0.01, 0.02, 0.04, 0.08):
            penalty = lift + 0.3 * np.log(rate / optimum) ** 2
            rows += [
                row | {"tokens_to_target": row["tokens_to_target"] * np.exp(penalty)}
                for row in steady(peak_lr=rate, tuning=tuning)
            ]
    cells = estimated(rows)
    for row in cells.cells.iter_rows(named=True):
        assert (row["tuning"], row["best_lr"]) == ("momentum=0.95", 0.04)
        assert row["optimal_lr"] == pytest.approx(0.04, rel=0.3)
    assert cells.rates.height == 30
    assert set(cells.rates["tuning"]) == {"momentum=0.9", "momentum=0.95"}


def test_a_rate_that_is_not_stated_is_a_reservation() -> None:
    row = cell(estimated(steady(peak_lr=None)))
    assert (row["best_lr"], row["lr_verdict"], row["verdict"]) == (None, "single_rate", "ok")
    assert row["explanation"] == "learning rate not stated"


def test_runs_without_a_stated_seed_are_not_taken_for_the_same_seed() -> None:
    cells = estimated([row | {"run_id": str(place)} for place, row in enumerate(steady(data_seed=None))])
    assert cells.runs["seed"].n_unique() == 9
    key = {"model": "m", "optimizer": "adamw", "protocol": "unstated", "target_loss_nats": 2.0}
    errors = cells.errors_of(key, [256, 1024])
    assert errors is not None
    assert errors.covariance[0, 1] == 0.0


def test_fresh_seeds_are_not_corrected_for_luck_and_grid_seeds_are() -> None:
    flat = replace(LAB, optimizers={"adamw": Planted(curvature=0.02)})
    grid = estimate_cells(many_targets(flat, 20), 0.9)
    raw = grid.chosen.group_by("model", "global_batch_tokens").agg(raw=pl.col("log_tokens").mean())
    luck = grid.cells.join(raw, on=["model", "global_batch_tokens"]).select(
        pl.col("tokens_to_target").log() - pl.col("raw")
    )
    assert luck.min().item() > -1e-3
    assert luck.mean().item() > 0.01
    assert grid.cells["explanation"].str.contains("luck of the chosen rate").sum() > 64
    fresh = estimate_cells(many_targets(replace(flat, fresh_seeds=(5, 6)), 5), 0.9)
    raw = fresh.chosen.group_by("model", "global_batch_tokens").agg(raw=pl.col("log_tokens").mean())
    both = fresh.cells.join(raw, on=["model", "global_batch_tokens"])
    assert both["tokens_to_target"].log().to_numpy() == pytest.approx(both["raw"].to_numpy())


def test_a_setting_without_rivals_needs_no_luck() -> None:
    for seeds in (3, 10):
        cells = estimate_cells(many_targets(replace(LAB, rates=(1.0,), grid_seeds=tuple(range(seeds))), 2), 0.9)
        raw = cells.chosen.group_by("model", "optimizer", "global_batch_tokens").agg(raw=pl.col("log_tokens").mean())
        both = cells.cells.join(raw, on=["model", "optimizer", "global_batch_tokens"])
        assert both["tokens_to_target"].log().to_numpy() == pytest.approx(both["raw"].to_numpy(), abs=1e-9)


def series(model: str, optimizer: str) -> Row:
    return {"model": model, "optimizer": optimizer, "protocol": "constant_ema", "target_loss_nats": 2.0}


def test_ten_seeds_are_resampled_alike_for_all_optimizers_so_that_ratios_pair() -> None:
    cells = estimate_cells(many_targets(replace(TEN, shared=0.9), 1), 0.9)
    adamw, muon = (cells.resamples_of(series("lab-0", name), [256, 4096]) for name in ("adamw", "muon"))
    assert adamw is not None
    assert muon is not None
    assert adamw.shape == (1000, 2)
    assert np.corrcoef(adamw[:, 0], muon[:, 0])[0, 1] > 0.7
    assert np.std(adamw[:, 0] - muon[:, 0]) < 0.7 * np.std(adamw[:, 0])


def test_intervals_from_ten_seeds_are_percentiles_of_the_resamples() -> None:
    cells = estimate_cells(many_targets(TEN, 1), 0.9)
    row = cells.cells.row(
        by_predicate=(pl.col("optimizer") == "adamw") & (pl.col("global_batch_tokens") == 256), named=True
    )
    resamples = cells.resamples_of(series("lab-0", "adamw"), [256])
    assert resamples is not None
    assert row["tokens_to_target_low"] == pytest.approx(np.exp(np.quantile(resamples, 0.05)))
    assert row["tokens_to_target_high"] == pytest.approx(np.exp(np.quantile(resamples, 0.95)))
    assert np.exp(resamples.mean()) == pytest.approx(row["tokens_to_target"])


def test_fewer_seeds_are_not_resampled() -> None:
    cells = estimate_cells(many_targets(LAB, 1), 0.9)
    assert cells.resampled == {}
    assert cells.resamples_of(series("lab-0", "adamw"), [256]) is None


def test_resamples_repeat_the_likelihood_of_runs_that_fell_short() -> None:
    lab = replace(TEN, rates=(1.0,), budget_over_target=1.1)  # a sixth of the runs falls short
    tables = many_targets(lab, 4)
    cells = estimate_cells(tables, 0.9)
    assert "censored" in set(cells.cells["verdict"])
    whole = estimate_cells(many_targets(replace(lab, budget_over_target=20.0), 4), 0.9)
    both = cells.cells.join(whole.cells, on=["model", "optimizer", "global_batch_tokens"], suffix="_whole")
    shift = (both["tokens_to_target"] / both["tokens_to_target_whole"]).log()
    assert abs(float(np.mean(shift.to_numpy()))) < 0.02
    widths = [
        (both[f"tokens_to_target_high{end}"] / both[f"tokens_to_target_low{end}"]).log().mean()
        for end in ("", "_whole")
    ]
    assert 0.9 < widths[0] / widths[1] < 1.4  # type: ignore[operator]


def test_errors_are_given_for_the_batches_that_are_asked_for() -> None:
    cells = estimate_cells(many_targets(LAB, 1), 0.9)
    whole = cells.errors_of(series("lab-0", "adamw"), [256, 1024, 4096, 16384])
    part = cells.errors_of(series("lab-0", "adamw"), [16384, 256])
    assert whole is not None
    assert part is not None
    assert part.covariance == pytest.approx(whole.covariance[np.ix_([3, 0], [3, 0])])
    assert cells.errors_of(series("lab-0", "sgd"), [256]) is None
    assert cells.errors_of(series("lab-0", "adamw"), []) is None


def test_joined_cells_answer_for_the_series_of_both() -> None:
    tables = many_targets(LAB, 2)
    apart = [estimate_cells(tables.filter(model=model), 0.9) for model in ("lab-0", "lab-1")]
    joined, together = apart[0].joined_with(apart[1]), estimate_cells(tables, 0.9)
    assert joined.cells.sort(pl.all()).equals(together.cells.sort(pl.all()))
    for model in ("lab-0", "lab-1"):
        assert joined.errors_of(series(model, "muon"), [256]) is not None


def test_cells_are_the_same_whatever_the_order_of_the_rows() -> None:
    tables = many_targets(replace(LAB, budget_over_target=1.1), 2)
    first, second = estimate_cells(tables, 0.9), estimate_cells(tables.sample(fraction=1.0, shuffle=True, seed=1), 0.9)
    assert_frame_equal(first.cells, second.cells)
    assert_frame_equal(first.rates, second.rates)


def test_tokens_scaled_by_a_factor_scale_the_cells_by_it() -> None:
    tables = many_targets(replace(LAB, budget_over_target=1.1), 1)
    tripled = tables.with_columns(pl.col("tokens_to_target", "bound_tokens") * 3)
    first, second = estimate_cells(tables, 0.9), estimate_cells(tripled, 0.9)
    for name in ("tokens_to_target", "tokens_to_target_low", "tokens_to_target_high"):
        assert (second.cells[name] / first.cells[name]).drop_nulls().to_numpy() == pytest.approx(3.0)


def test_no_runs_give_no_cells() -> None:
    cells = estimated([])
    assert cells.cells.is_empty()
    assert cells.rates.is_empty()
