"""Telescoping and transfer on the runs of a sweep's folder, trained by a plant."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from analysis.inputs.records import load
from analysis.page.telescope_figure import surfaces
from analysis.page.transfer_figure import transfer
from analysis.quantities.transfer import best_rates, rate_slopes, width_losses
from harness.config import RunConfig
from harness.record import read_json
from sweeps.cli import main
from sweeps.grid import expand
from sweeps.launch import run_folder
from sweeps.spec import SweepSpec
from sweeps.store import SweepFolder, write_sweep
from sweeps.widths.families import Family, families
from sweeps.widths.telescope import Found, answers_table, base_runs, levels_table, points_table, read, telescoped
from tests.planted_widths import ALPHA, LIMIT, best_rate
from tests.sweep_examples import prepared, write_yaml

TRAIN = "tests.planted_widths:train"
RATES = [0.0015 * 2**power for power in range(8)]
MULTIPLIERS = [0.25, 0.5, 1, 2, 4]
MULTIPLIER, DECAY = "optimizers.muon.auxiliary.lr_multiplier", "optimizers.muon.weight_decay"
CROSS = {MULTIPLIER: [0.5, 1, 2], DECAY: [0.05, 0.1, 0.2]}


def spec(**changes: Any) -> SweepSpec:
    content: dict[str, Any] = {
        "name": "wide",
        "base": {
            "corpus": {"source": "python-stdlib", "tokenizer": "ascii"},
            "model": {"layers": 1, "sequence_length": 64, "parametrization": {"kind": "mup", "base_width": 32}},
            "global_batch_tokens": 256,
        },
        "optimizers": {"muon": {"learning_rate": RATES}},
        "grid": {"optimizers.muon.auxiliary.lr_multiplier": MULTIPLIERS},
        "zip": {"model.width": [32, 64, 128], "model.heads": [2, 4, 8]},
        "token_budget": 4096,
        "targets_nats": [2.5],
    }
    return SweepSpec.parse(content | changes, source="wide")


def begun(path: Path, **changes: Any) -> tuple[SweepFolder, list[Family], list[RunConfig]]:
    own = spec(**changes)
    runs, folder = expand(own, prepared), SweepFolder(path)
    found = families(runs)
    write_sweep(own, base_runs(found, runs), folder, like=runs)
    return folder, found, runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepFolder, list[Found]]:
    folder, found, _ = begun(tmp_path_factory.mktemp("whole"))
    return folder, telescoped(folder, found, slots=1, train=TRAIN)


def test_telescope_trains_the_base_grid_then_fewer_runs_at_each_doubling(
    whole: tuple[SweepFolder, list[Found]],
) -> None:
    folder, (found,) = whole
    assert [(each.width, len(each.points)) for each in found.telescope.levels] == [(32, 40), (64, 15), (128, 9)]
    listed = folder.read_manifest().runs
    assert len(listed) == 40 + 15 + 9
    widths = [read_json(folder.run(run.run_id).config)["model"]["width"] for run in listed]
    assert [widths.count(width) for width in (32, 64, 128)] == [40, 15, 9]


def test_telescope_finds_the_planted_optimum_with_its_interval(whole: tuple[SweepFolder, list[Found]]) -> None:
    _, found = whole
    answers = {row["hyperparameter"]: row for row in answers_table(found).iter_rows(named=True)}
    rate, multiplier = answers["optimizer.peak_lr"], answers["optimizer.auxiliary.lr_multiplier"]
    assert rate["optimum_low"] < best_rate(128) < rate["optimum_high"]
    assert rate["alpha_log2_low"] < ALPHA < rate["alpha_log2_high"]
    assert rate["limit_low"] < 2.0**LIMIT < rate["limit_high"]
    assert multiplier["optimum_low"] < 1.0 < multiplier["optimum_high"]


def test_telescope_says_what_it_cost(whole: tuple[SweepFolder, list[Found]]) -> None:
    _, (found,) = whole
    levels = levels_table([found]).unique("width", maintain_order=True)
    assert levels["level_flops"].to_list() == found.level_flops
    assert found.level_flops[0] == 40 * found.run_flops[32]
    assert found.brute_force_flops == 40 * found.run_flops[128]


def test_telescope_of_the_base_grid_shares_the_runs_of_the_plain_sweep(tmp_path: Path) -> None:
    _, (family,), runs = begun(tmp_path)
    base = {run.run_id for run in runs if run.model.width == 32}
    points = np.stack(np.meshgrid(*family.grid, indexing="ij"), axis=-1).reshape(-1, 2)
    assert {run.run_id for point in points for run in family.runs_at(32, point)} == base


def test_telescope_goes_on_where_it_was_killed_and_ends_the_same(
    tmp_path: Path, whole: tuple[SweepFolder, list[Found]]
) -> None:
    folder, found, _ = begun(tmp_path)
    for left in (10, 35, 5):
        (tmp_path / "die_after.txt").write_text(str(left))
        with pytest.raises(ValueError, match="have no result"):
            telescoped(folder, found, slots=1, train=TRAIN)
    (tmp_path / "die_after.txt").unlink()
    again = telescoped(folder, found, slots=1, train=TRAIN)
    assert answers_table(again).equals(answers_table(whole[1]))
    assert folder.read_manifest().runs == whole[0].read_manifest().runs
    begun(tmp_path)  # as the command does when it is started again: nothing is forgotten
    assert folder.read_manifest().runs == whole[0].read_manifest().runs


def test_telescope_takes_the_mean_over_seeds(tmp_path: Path) -> None:
    grid = {"optimizers.muon.auxiliary.lr_multiplier": [0.5, 1, 2], "seed": [0, 1]}
    folder, found, _ = begun(tmp_path, grid=grid)
    (each,) = telescoped(folder, found, slots=1, train=TRAIN)
    assert len(folder.read_manifest().runs) == 2 * sum(len(level.points) for level in each.telescope.levels)


def test_telescope_figure_has_a_panel_per_width(whole: tuple[SweepFolder, list[Found]]) -> None:
    _, found = whole
    figure = surfaces(points_table(found), levels_table(found))
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == ["Width 32", "Width 64", "Width 128"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zip": {"model.width": [32, 128], "model.heads": [2, 8]}}, "telescoping goes through doubled widths"),
        ({"zip": {"model.width": [32, 64], "model.heads": [2, 2]}}, "heads are 16 wide at width 32 and 32 at width 64"),
        ({"optimizers": {"muon": {"learning_rate": [0.01]}}, "grid": {}}, "nothing to tune"),
        ({"optimizers": {"muon": {"learning_rate": [0.01, 0.02, 0.08]}}}, "needs three values or more at one ratio"),
        ({"grid": {"optimizers.muon.nesterov": [True, False]}}, "telescoped in its logarithm"),
        ({"base": spec().base | {"stop_at_loss_nats": 2.0}}, "compares losses at equal tokens"),
        ({"grid": CROSS, "where": [{DECAY: 0.1}, {MULTIPLIER: 1}]}, "has 40 of the 72 runs of the full grid"),
    ],
)
def test_telescope_refuses_what_is_no_grid_over_widths_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        families(expand(spec(**changes), prepared))
    assert len(str(caught.value).splitlines()) == 1


def test_transfer_finds_the_best_rate_of_every_width_and_its_slope(whole: tuple[SweepFolder, list[Found]]) -> None:
    losses = width_losses(load(whole[0].path))
    rates = best_rates(losses)
    assert rates["width"].to_list()[0] == 32
    first = rates.row(0, named=True)
    assert first["verdict"] == "ok"
    assert first["best_lr_low"] < best_rate(32) < first["best_lr_high"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    """Every rate at every width, one of which diverges."""
    folder = SweepFolder(tmp_path_factory.mktemp("plain"))
    own = spec(grid={"seed": [0, 1]}, zip={"model.width": [32, 64, 128, 256], "model.heads": [2, 4, 8, 16]})
    runs = expand(own, prepared)
    write_sweep(own, runs, folder)
    run_folder(folder, slots=1, train=TRAIN)
    return folder


def test_transfer_covers_the_planted_rates_and_their_slope(plain: SweepFolder) -> None:
    losses = width_losses(load(plain.path))
    rates, slopes = best_rates(losses), rate_slopes(losses)
    for row in rates.iter_rows(named=True):
        assert row["verdict"] == "ok"
        assert row["best_lr_low"] * 0.9 < best_rate(row["width"]) < row["best_lr_high"] * 1.1
    widths = np.log([32.0, 64.0, 128.0, 256.0])
    truth = np.polyfit(widths, np.log([best_rate(round(float(np.exp(width)))) for width in widths]), 1)[0]
    slope = slopes.row(0, named=True)
    assert slope["slope_low"] < truth < slope["slope_high"]
    assert slope["num_widths"] == 4


def test_transfer_says_where_an_optimum_is_at_the_edge() -> None:
    rows = [
        ("muon", "mup", 256, 4096, width, rate, -rate + 0.01 * rate**2)
        for width in (32, 64)
        for rate in (1.0, 2.0, 4.0, 8.0)
    ]
    schema = ["optimizer", "parametrization", "global_batch_tokens", "token_budget", "width", "peak_lr", "loss_nats"]
    losses = pl.DataFrame(rows, schema=schema, orient="row")
    assert best_rates(losses)["verdict"].to_list() == ["edge_of_grid"] * 2
    assert rate_slopes(losses)["slope"].to_list() == [None]
    lost = losses.with_columns(loss_nats=pl.lit(None, dtype=pl.Float64))
    assert best_rates(lost)["verdict"].to_list() == ["diverged"] * 2


def test_transfer_command_writes_tables_and_the_figure(plain: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transfer", str(plain.path)]) == 0
    assert "256" in capsys.readouterr().out
    assert (plain.path / "figures" / "transfer.png").stat().st_size > 10_000
    assert pl.read_csv(plain.path / "tables" / "transfer_slopes.csv")["num_widths"].to_list() == [4]


def test_transfer_figure_has_curves_over_a_strip_of_optima(plain: SweepFolder) -> None:
    losses = width_losses(load(plain.path))
    figure = transfer(losses, best_rates(losses), rate_slopes(losses))
    assert len(figure.axes) == 2
    assert len(figure.axes[0].lines) == 4


def test_transfer_of_one_width_is_refused() -> None:
    reference = Path(__file__).parents[1] / "results" / "reference" / "quickstart"
    with pytest.raises(ValueError, match="two widths or more"):
        width_losses(load(reference))


@pytest.mark.slow
def test_telescope_command_trains_for_real_and_has_nothing_left_to_do(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(tmp_path / "cache"))
    base = {
        "corpus": {"source": "text", "paths": [str(text / "*.txt")], "tokenizer": "ascii", "validation_share": 0.1},
        "model": {"layers": 1, "sequence_length": 32, "parametrization": {"kind": "mup", "base_width": 16}},
        "global_batch_tokens": 256,
        "evaluation": {"tokens": 2048},
    }
    rates = {"adamw": {"learning_rate": [0.01, 0.02, 0.04]}}
    widths = {"model.width": [16, 32], "model.heads": [1, 2]}
    content = spec(base=base, optimizers=rates, grid={}, zip=widths).model_dump(mode="json", exclude_unset=True)
    arguments = ["telescope", write_yaml(tmp_path, content), "--results", str(tmp_path), "--slots", "1"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "of the full grid at width 32" in out
    assert "peak_lr" in out
    made = {path.name for kind in ("tables", "figures") for path in (tmp_path / "wide" / kind).iterdir()}
    assert {"telescope_levels.csv", "telescope_answers.csv", "telescope_points.csv", "telescope.png"} <= made
    before = sorted((tmp_path / "wide" / "runs").iterdir())
    assert main(arguments) == 0
    assert sorted((tmp_path / "wide" / "runs").iterdir()) == before


def test_reference_tables_are_what_the_code_makes_of_its_records() -> None:
    """To refresh them: `critbatch telescope telescope-small`, and what it writes copied there but for its runs."""
    reference = Path(__file__).parents[1] / "results" / "reference" / "telescope-small"
    configs = load(reference).runs["config_json"]
    found = read(SweepFolder(reference), families([RunConfig.parse(json.loads(text), "record") for text in configs]))
    made = {"answers": answers_table(found), "levels": levels_table(found), "points": points_table(found)}
    for name, frame in made.items():
        committed = pl.read_csv(reference / "tables" / f"telescope_{name}.csv", schema=frame.schema)
        assert_frame_equal(committed, frame, rel_tol=1e-6)
