"""From what runs measured to tables and figures: planted noise scales and sharpness come out, pooled over seeds."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure

from analysis.estimate import EstimateOptions, Estimates, estimate
from analysis.inputs.records import DIAGNOSTICS_PARQUET, Records, from_frames, load, save
from analysis.page import plots
from analysis.page.report import write_report
from analysis.quantities.chosen_runs import chosen_runs
from analysis.quantities.noise_scales import noise_scale_table
from analysis.quantities.sharpness import at_loss
from harness.record import DIAGNOSTIC_COLUMNS
from tests.diagnostic_rows import NOISE_SCALE, RATIO, WITHIN_SHARE, with_diagnostics
from tests.synthetic import Laboratory, records

LAB = Laboratory(targets=(2.2, 2.1, 2.0))
FIGURES = ("noise_scales", "sharpness", "update_norms", "spectra")


@pytest.fixture(scope="module")
def whole() -> Records:
    return with_diagnostics(records(LAB))


@pytest.fixture(scope="module")
def estimates(whole: Records) -> Estimates:
    return estimate(whole)


def test_noise_scales_of_the_laboratory_are_those_that_were_planted(estimates: Estimates) -> None:
    found = estimates.noise_scales.filter(group="all")
    assert found.height
    for row in found.iter_rows(named=True):
        planted = NOISE_SCALE[row["optimizer"]]
        assert row["noise_scale_tokens"] == pytest.approx(planted, rel=0.3)
    covered = pl.struct("optimizer", "noise_scale_tokens_low", "noise_scale_tokens_high").map_elements(
        lambda row: row["noise_scale_tokens_low"] < NOISE_SCALE[row["optimizer"]] < row["noise_scale_tokens_high"],
        return_dtype=pl.Boolean,
    )
    assert 0.8 < float(found.select(covered).to_series().mean()) < 0.98  # type: ignore[arg-type]


def test_noise_scale_pools_the_steps_of_all_seeds_as_one_sample(whole: Records) -> None:
    """Signal and noise of every single step are drawn again: their moments are those of one long list."""
    runs = whole.runs.head(1)
    numbers = np.random.default_rng(0).normal(5.0, 1.0, size=(2, 10))
    halves = [numbers[:, :4], numbers[:, 4:]]
    run = runs.row(0, named=True)
    twice = pl.concat([runs, runs.with_columns(run_id=pl.lit("again"))])
    made = [
        {
            "run_id": name,
            "step": 4,
            "tokens_seen": 1024,
            "quantity": "noise_scale_ranks",
            "group": "all",
            "num_steps": part.shape[1],
            "signal": part[0].mean(),
            "noise": part[1].mean(),
            "signal_variance": part[0].var(ddof=1),
            "noise_variance": part[1].var(ddof=1),
            "signal_noise_covariance": np.cov(part)[0, 1],
        }
        for name, part in zip((run["run_id"], "again"), halves, strict=True)
    ]
    rows = pl.DataFrame([dict.fromkeys(DIAGNOSTIC_COLUMNS) | row for row in made], schema=whole.diagnostics.schema)
    [found] = noise_scale_table(dataclasses.replace(whole, runs=twice, diagnostics=rows), 0.9).rows(named=True)
    one = {name: value for name, value in made[0].items() if name != "run_id"} | {
        "run_id": run["run_id"],
        "num_steps": 10,
        "signal": numbers[0].mean(),
        "noise": numbers[1].mean(),
        "signal_variance": numbers[0].var(ddof=1),
        "noise_variance": numbers[1].var(ddof=1),
        "signal_noise_covariance": np.cov(numbers)[0, 1],
    }
    rows = pl.DataFrame([dict.fromkeys(DIAGNOSTIC_COLUMNS) | one], schema=whole.diagnostics.schema)
    [expected] = noise_scale_table(dataclasses.replace(whole, diagnostics=rows), 0.9).rows(named=True)
    for name in ("noise_scale_tokens", "noise_scale_tokens_low", "noise_scale_tokens_high", "num_steps"):
        assert found[name] == pytest.approx(expected[name])
    assert (found["num_runs"], expected["num_runs"]) == (2, 1)


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"signal": -1.0}, "not_identified", "no gradient above its noise is visible"),
        ({"noise": -1.0}, "not_identified", "no noise of the gradient is visible"),
        ({"num_steps": 1, "signal_variance": None}, "few_points", "no interval: 1 step since the last mark"),
        ({"signal_variance": 1e9}, "ok", "no upper end"),
        ({"signal": None, "reason": "a step has one sequence"}, "refused", "a step has one sequence"),
    ],
)
def test_noise_scale_without_a_number_or_an_end_says_why(
    whole: Records, changes: dict[str, Any], verdict: str, words: str
) -> None:
    run = whole.runs["run_id"][0]
    row = whole.diagnostics.filter(pl.col("quantity").str.starts_with("noise"), run_id=run, group="all").row(
        0, named=True
    )
    if "reason" in changes:
        changes = changes | dict.fromkeys(("num_steps", "noise", "value"))
    rows = pl.DataFrame([row | changes], schema=whole.diagnostics.schema)
    [found] = noise_scale_table(dataclasses.replace(whole, diagnostics=rows), 0.9).rows(named=True)
    assert found["verdict"] == verdict
    assert words in found["explanation"]
    if verdict in ("not_identified", "refused"):
        assert found["noise_scale_tokens"] is None
    if verdict == "few_points":
        assert (found["noise_scale_tokens_low"], found["noise_scale_tokens_high"]) == (None, None)


def test_sharpness_at_a_loss_is_interpolated_where_the_curve_first_comes_down_to_it() -> None:
    assert at_loss([3.0, 2.0, 2.5, 1.0], [1.0, 2.0, 5.0, 8.0], 2.25) == pytest.approx(1.75)
    assert at_loss([3.0, 2.0], [1.0, 2.0], 3.5) is None
    assert at_loss([3.0, 2.0], [1.0, 2.0], 1.5) is None
    assert at_loss([2.0, 2.0], [1.0, 2.0], 2.0) == 1.0


def test_sharpness_ratio_at_equal_loss_is_the_one_that_was_planted(estimates: Estimates) -> None:
    found = estimates.sharpness_ratios
    assert set(found["global_batch_tokens"]) == set(LAB.batches)
    assert set(found["verdict"]) == {"ok"}
    for row in found.iter_rows(named=True):
        assert row["sharpness_ratio"] == pytest.approx(RATIO, rel=0.3)
        assert row["sharpness_ratio_low"] < row["sharpness_ratio"] < row["sharpness_ratio_high"]
        assert row["sharpness_ratio"] == pytest.approx(row["baseline_sharpness"] / row["challenger_sharpness"])
    inside = (found["sharpness_ratio_low"] < RATIO) & (found["sharpness_ratio_high"] > RATIO)
    assert float(inside.mean() or 0.0) > 0.75


def test_shares_of_the_sharpness_are_within_and_cross_layers(estimates: Estimates) -> None:
    found = estimates.sharpness
    assert found["within_share"].to_list() == pytest.approx([WITHIN_SHARE] * found.height)
    whole = found["within_layers"] + found["cross_layers"]
    assert whole.to_list() == pytest.approx(found["sharpness"].to_list())


def test_sharpness_that_is_not_above_zero_has_no_shares(whole: Records) -> None:
    downwards = pl.when(pl.col("quantity") == "sharpness").then(-1.0).otherwise("value")
    made = dataclasses.replace(whole, diagnostics=whole.diagnostics.with_columns(value=downwards))
    found = estimate(made, EstimateOptions(questions=("diagnostics",)))
    assert found.sharpness["within_share"].is_null().all()
    assert found.sharpness["explanation"].str.contains("does not curve upwards").all()
    assert found.sharpness_ratios.is_empty()


def test_noise_scale_is_a_definition_of_the_critical_batch_where_it_was_measured(estimates: Estimates) -> None:
    rows = estimates.critical_batches.filter(definition="noise_scale")
    assert set(rows["optimizer"]) == {"adamw", "muon"}
    assert rows.filter(optimizer="adamw")["critical_batch_tokens"].mean() == pytest.approx(
        NOISE_SCALE["adamw"], rel=0.2
    )
    assert rows["explanation"].str.contains("what an optimizer makes of it").all()
    asked = estimate(estimates.records, EstimateOptions(definitions=["noise_scale"], questions=("tokens",)))
    assert asked.critical_batches.equals(rows)
    refused = estimate(records(LAB), EstimateOptions(definitions=["noise_scale"], questions=("tokens",)))
    assert set(refused.critical_batches["verdict"]) == {"refused"}


def test_chosen_runs_are_those_at_the_rate_of_the_hardest_target(estimates: Estimates) -> None:
    found = chosen_runs(estimates.records.runs, estimates.cells)
    cells = estimates.cells.filter(pl.col("target_loss_nats") == 2.0)
    for cell in cells.iter_rows(named=True):
        own = found.filter(optimizer=cell["optimizer"], global_batch_tokens=cell["global_batch_tokens"])
        assert set(own["peak_lr"]) == {cell["best_lr"]}
    unknown = estimates.cells.with_columns(best_lr=pl.lit(None, pl.Float64))
    assert chosen_runs(estimates.records.runs, unknown).is_empty()
    one = estimates.records.runs.filter(
        pl.col("peak_lr") == pl.col("peak_lr").min().over("global_batch_tokens", "optimizer")
    )
    assert chosen_runs(one, unknown).height == one.height


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_diagnostics_are_drawn_or_say_that_nothing_was_measured(estimates: Estimates, name: str) -> None:
    assert isinstance(plots.FIGURES[name](estimates), Figure)
    assert isinstance(plots.FIGURES[name](estimate(records(LAB))), str)


def test_noise_figure_has_a_panel_and_a_line_at_the_batch_for_each_batch(estimates: Estimates) -> None:
    figure = plots.FIGURES["noise_scales"](estimates)
    assert isinstance(figure, Figure)
    for ax, batch in zip(figure.axes, LAB.batches, strict=True):
        dashed = [line for line in ax.lines if set(line.get_ydata()) == {batch}]  # type: ignore[arg-type]
        assert len(dashed) == 1
        assert ax.get_yscale() == "log"


def test_page_has_the_section_only_where_something_was_measured(
    whole: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "FIGURES", {name: plots.FIGURES[name] for name in FIGURES})
    with_section = write_report(estimate(whole), tmp_path / "measured").read_text()
    without = write_report(estimate(records(LAB)), tmp_path / "plain").read_text()
    assert 'id="diagnostics"' in with_section
    assert (tmp_path / "measured" / "tables" / "diagnostics.csv").exists()
    assert 'href="#diagnostics"' not in without
    assert "diagnostics.csv" not in without
    assert not (tmp_path / "plain" / "tables" / "diagnostics.csv").exists()


def test_diagnostics_are_saved_and_loaded_with_the_records_and_only_where_there_are_any(
    whole: Records, tmp_path: Path
) -> None:
    for name, made in (("measured", whole), ("plain", records(LAB))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sweep.json").write_text(made.manifest.model_dump_json())
        save(made, folder)
        assert (folder / DIAGNOSTICS_PARQUET).exists() == (name == "measured")
        assert load(folder).diagnostics.sort(pl.all()).equals(made.diagnostics.sort(pl.all()))


def test_rows_that_a_resumed_run_wrote_twice_count_once(whole: Records) -> None:
    again = pl.concat([whole.diagnostics.with_columns(value=pl.lit(7.0)), whole.diagnostics])
    runs = whole.runs.drop("stage", "tuning")
    assert from_frames(whole.manifest, runs, whole.evaluations, again).diagnostics.equals(whole.diagnostics)
