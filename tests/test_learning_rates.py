"""The choice of the learning rate of a cell, and what is said about its grid."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from analysis.quantities.cells import estimate_cells
from analysis.quantities.learning_rates import (
    Setting,
    best_settings,
    choose_rates,
    fit_rates,
    ranked,
    rate_verdict,
    summarize_rates,
)
from analysis.quantities.targets import targets
from analysis.statistics.noise import Noise
from tests.synthetic import Laboratory, Planted, Run, plan, records

LAB = Laboratory(noise=0.0, fresh_seeds=())
QUIET = Noise(variance=1e-4, same_cell=0.0, other_cell=0.0, dof=12.0, contrast_dof=12.0)


def rates_of(log_tokens: dict[int, dict[float, float]]) -> pl.DataFrame:
    rows = [(b, "", lr, 2, 2, 0, y, y) for b, points in log_tokens.items() for lr, y in points.items()]
    counts = ["num_runs", "num_reached", "num_reached_at_first_eval"]
    names = ["global_batch_tokens", "tuning", "peak_lr", *counts, "log_tokens", "likely_log_tokens"]
    empty = pl.DataFrame(schema=dict.fromkeys(names, pl.Float64)).cast(
        {"tuning": pl.String, "global_batch_tokens": int}
    )
    return pl.DataFrame(rows, schema=empty.schema, orient="row")


def parabola(optimum: float, rates: tuple[float, ...], curvature: float = 0.3) -> dict[float, float]:
    return {rate: 12.0 + curvature * np.log(rate / optimum) ** 2 for rate in rates}


def test_fit_rates_recovers_planted_optima_with_one_shared_curvature() -> None:
    rates = rates_of({256: parabola(0.011, (0.005, 0.01, 0.02)), 1024: parabola(0.03, (0.01, 0.02))})
    fitted = fit_rates(rates, QUIET, 0.9)
    assert fitted is not None
    assert fitted.curvature == pytest.approx(0.3)
    for batch, optimum in ((256, 0.011), (1024, 0.03)):  # two rates suffice where another batch has three
        best, low, high = fitted.optimum(batch)
        assert best == pytest.approx(optimum)
        assert low is not None
        assert high is not None
        assert low < optimum < high


def test_fit_rates_widens_optima_where_one_curvature_misfits() -> None:
    rates = (0.005, 0.01, 0.02)
    alike = rates_of({256: parabola(0.01, rates), 1024: parabola(0.01, rates)})
    unlike = rates_of({256: parabola(0.01, rates, 0.1), 1024: parabola(0.01, rates, 0.5)})
    widths = []
    for frame in (alike, unlike):
        fitted = fit_rates(frame, QUIET, 0.9)
        assert fitted is not None
        _, low, high = fitted.optimum(256)
        widths.append(np.inf if low is None or high is None else high / low)
    assert widths[1] > 1.5 * widths[0]


def test_fit_rates_needs_three_rates_somewhere() -> None:
    assert fit_rates(rates_of({256: parabola(0.01, (0.01, 0.02))}), QUIET, 0.9) is None
    assert fit_rates(rates_of({}), QUIET, 0.9) is None


def test_fit_rates_leaves_a_flat_optimum_unbounded() -> None:
    noisy = replace(QUIET, variance=0.01)
    fitted = fit_rates(rates_of({256: parabola(0.01, (0.005, 0.01, 0.02), curvature=0.02)}), noisy, 0.9)
    assert fitted is not None
    best, low, high = fitted.optimum(256)
    assert best == pytest.approx(0.01)
    assert (low, high) == (None, None)


def test_fit_rates_gives_no_optimum_where_the_curve_bends_down() -> None:
    fitted = fit_rates(rates_of({256: parabola(0.01, (0.005, 0.01, 0.02), curvature=-0.3)}), QUIET, 0.9)
    assert fitted is not None
    assert fitted.optimum(256) == (None, None, None)
    assert fitted.log_tokens(256, 0.01) is None


@pytest.mark.parametrize(
    ("optimum", "rates", "verdict"),
    [
        ((0.01, 0.008, 0.012), [0.005, 0.01, 0.02], "ok"),
        ((0.03, 0.025, 0.036), [0.005, 0.01, 0.02], "edge_of_grid"),
        ((0.002, 0.001, 0.004), [0.005, 0.01, 0.02], "edge_of_grid"),
        ((0.02, 0.017, 0.023), [0.005, 0.01, 0.02], "not_identified"),
        ((0.01, None, None), [0.005, 0.01, 0.02], "not_identified"),
        ((None, None, None), [0.01], "single_rate"),
    ],
)
def test_rate_verdict_follows_from_the_interval(
    optimum: tuple[float | None, float | None, float | None], rates: list[float], verdict: str
) -> None:
    assert rate_verdict(optimum, rates) == verdict


def test_rate_verdict_rarely_blames_the_grid_for_flat_centred_optima() -> None:
    """By argmin an edge would win in 45 of 100."""
    flat = {"adamw": Planted(curvature=0.02)}
    verdicts: list[str] = []
    for draw in range(25):
        lab = replace(LAB, noise=0.1, optimizers=flat, targets=(2.0,), draw=draw)
        verdicts += estimate_cells(targets(records(lab)), 0.9).cells["lr_verdict"].to_list()
    assert verdicts.count("edge_of_grid") <= 0.05 * len(verdicts)


def test_rate_verdict_finds_a_grid_that_misses_the_optimum() -> None:
    low_grid = replace(LAB, noise=0.03, rates=(0.1, 0.2, 0.4), budget_over_target=20)
    cells = estimate_cells(targets(records(low_grid)), 0.9).cells
    assert set(cells["lr_verdict"]) == {"edge_of_grid"}
    assert set(cells.filter(pl.col("verdict") != "warmup_confounded")["verdict"]) == {"edge_of_grid"}


def test_best_rate_is_one_that_was_run_and_follows_the_fit() -> None:
    rates = rates_of({256: {0.005: 12.1, 0.01: 12.05, 0.02: 12.04}})
    fitted = fit_rates(rates_of({256: parabola(0.01, (0.005, 0.01, 0.02))}), QUIET, 0.9)
    assert best_settings(ranked(rates, fitted)) == {256: Setting(0.01, "")}
    assert best_settings(ranked(rates, None)) == {256: Setting(0.02, "")}


def alter(lab: Laboratory, rate_rank: int, seeds: set[int], **changes: object) -> list[Run]:
    """Change the runs at one rank of rate and some seeds, in every cell."""
    rates = {(r.optimizer, r.batch): sorted({q.peak_lr for q in plan(lab) if q.batch == r.batch}) for r in plan(lab)}
    hit = [r.peak_lr == rates[r.optimizer, r.batch][rate_rank] and r.seed in seeds for r in plan(lab)]
    return [replace(r, **changes) if h else r for r, h in zip(plan(lab), hit, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"status": "diverged"}, {"log_tokens": 99.0}])
def test_choice_gives_up_a_rate_if_one_of_its_seeds_fails(changes: dict[str, object]) -> None:
    lab = replace(LAB, optimizers={"adamw": Planted()}, targets=(2.0,))
    middle_fails = records(lab, alter(lab, 1, {1}, **changes))
    cells = estimate_cells(targets(middle_fails), 0.9).cells
    middle = {batch: Planted().optimum(batch) for batch in lab.batches}
    for choice in (cells, choose_rates(middle_fails)):
        assert choice.height == len(lab.batches)
        assert all(row["best_lr"] != middle[row["global_batch_tokens"]] for row in choice.iter_rows(named=True))
    assert set(cells["num_reached"]) == {2}
    summary = summarize_rates(targets(middle_fails))
    assert set(summary.filter(pl.col("num_reached") < pl.col("num_runs"))["log_tokens"]) == {None}


def test_choose_rates_finds_the_planted_optimum_of_every_cell() -> None:
    chosen = choose_rates(records(LAB))
    assert chosen.columns == ["model", "optimizer", "protocol", "global_batch_tokens", "best_lr", "tuning"]
    assert chosen.height == 8
    for row in chosen.iter_rows(named=True):
        planted = LAB.optimizers[row["optimizer"]]
        assert row["best_lr"] == pytest.approx(planted.optimum(row["global_batch_tokens"]))


def test_choose_rates_ignores_fresh_seeds() -> None:
    lab = replace(LAB, noise=0.1, fresh_seeds=(2,))
    without = records(lab, [run for run in plan(lab) if run.stage == "grid"])
    assert choose_rates(records(lab)).equals(choose_rates(without))


def test_choose_rates_falls_back_on_the_loss_where_no_target_was_reached() -> None:
    short = replace(LAB, budget_over_target=0.2)
    chosen = choose_rates(records(short))
    assert chosen.height == 8
    for row in chosen.iter_rows(named=True):
        assert row["best_lr"] == pytest.approx(LAB.optimizers[row["optimizer"]].optimum(row["global_batch_tokens"]))


def test_choose_rates_has_no_row_for_a_cell_that_diverged() -> None:
    runs = [replace(run, status="diverged") if run.batch == 256 else run for run in plan(LAB)]
    assert set(choose_rates(records(LAB, runs))["global_batch_tokens"]) == {1024, 4096, 16384}
