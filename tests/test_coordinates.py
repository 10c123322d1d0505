"""Coordinate check: sizes grow with the width as the theory says, in both parametrizations."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from analysis.page.coordinates_figure import coordinates
from analysis.quantities.width_slopes import SIZES, width_slopes
from analysis.statistics.slopes import common_slope
from harness.config import CorpusConfig
from harness.corpus import prepare
from sweeps.cli import main
from sweeps.widths.coordinates import check_runs, measure, read_optimizer

#: The effect ΔW·x of hidden updates, in the standard parametrization, to a power of the width.
SLOPES = {
    "adamw": 1.0,
    "lion": 1.0,
    "muon,scale=match_rms_adamw": 0.5,
    "muon,scale=original": 0.0,
    "muon,scale=spectral": 0.0,
    "scion": 0.0,
    "lamb": 0.5,
}


@pytest.fixture(scope="module")
def sizes(text: Path, cache: Path) -> pl.DataFrame:
    corpus = CorpusConfig(source="text", paths=(str(text / "*.txt"),), tokenizer="ascii", validation_share=0.1)
    runs = check_runs(tuple(SLOPES), ("standard", "mup"), (32, 64, 128), 16, steps=2, seeds=1, corpus=corpus)
    return measure(runs, prepare(corpus, cache))


def update_slopes(sizes: pl.DataFrame, parametrization: str, role: str) -> dict[str, float]:
    rows = width_slopes(sizes).filter(pl.col("layer").is_null(), size="update_rms")
    return dict(rows.filter(parametrization=parametrization, role=role).select("optimizer", "slope").iter_rows())


def test_hidden_updates_grow_as_the_theory_says_in_the_standard_parametrization(sizes: pl.DataFrame) -> None:
    found = update_slopes(sizes, "standard", "hidden")
    assert found == {name: pytest.approx(slope, abs=0.2) for name, slope in SLOPES.items()}


def test_hidden_updates_do_not_grow_under_mup(sizes: pl.DataFrame) -> None:
    found = update_slopes(sizes, "mup", "hidden")
    assert found == {name: pytest.approx(0.0, abs=0.15) for name in SLOPES}


@pytest.mark.parametrize("role", ["embedding", "head"])
def test_embedding_and_head_do_not_grow_under_mup(sizes: pl.DataFrame, role: str) -> None:
    assert update_slopes(sizes, "mup", role) == {name: pytest.approx(0.0, abs=0.25) for name in SLOPES}


def test_scions_embedding_shrinks_in_the_standard_parametrization(sizes: pl.DataFrame) -> None:
    assert update_slopes(sizes, "standard", "embedding")["scion"] == pytest.approx(-1.0, abs=0.1)


def test_every_layer_of_every_run_is_measured(sizes: pl.DataFrame) -> None:
    matrices = 2 + 2 * 6
    assert sizes.height == len(SLOPES) * 2 * 3 * matrices
    assert sizes.select((pl.col(SIZES) > 0).all()).row(0) == (True, True, True)
    assert set(sizes["role"]) == {"embedding", "hidden", "head"}


def test_common_slope_recovers_a_power_whose_interval_covers_as_stated() -> None:
    generator = np.random.default_rng(0)
    x, group = np.tile(np.log([64.0, 128.0, 256.0, 512.0]), 3), np.repeat([0, 1, 2], 4)
    covered = 0
    for _ in range(400):
        y = np.array([1.0, -2.0, 5.0])[group] + 0.5 * x + 0.1 * generator.standard_normal(12)
        found = common_slope(x, y, group, level=0.9)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.5 <= found.high
    assert 0.86 < covered / 400 < 0.94
    assert common_slope(x[:2], 0.5 * x[:2], group[:2], 0.9).low is None
    assert common_slope(x[:1], x[:1], group[:1], 0.9).value is None


def test_figure_has_a_panel_per_optimizer_with_both_slopes(sizes: pl.DataFrame) -> None:
    figure = coordinates(sizes, width_slopes(sizes), "update_rms")
    assert len(figure.axes) == len(SLOPES)
    written = [text.get_text() for text in figure.axes[4].texts]
    assert figure.axes[4].get_title(loc="left") == "Muon (scale=spectral)"
    assert [text.split(":")[0] for text in written] == ["standard", "muP"]


def test_command_writes_tables_and_figures_and_prints_slopes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(tmp_path / "cache"))
    small = ["--widths", "16,32", "--steps", "1", "--seeds", "1", "--optimizer", "lamb", "--parametrization", "mup"]
    assert main(["coord-check", *small, "--results", str(tmp_path)]) == 0
    assert "lamb" in capsys.readouterr().out
    tables, figures = (
        {path.name for path in (tmp_path / "coord-check" / name).iterdir()} for name in ("tables", "figures")
    )
    assert tables == {"sizes.csv", "slopes.csv"}
    assert figures == {f"{size}.{kind}" for size in SIZES for kind in ("png", "svg")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--widths", "32,48"], "base_width 32 does not divide the width 48"),
        (["--widths", "20,40"], "--widths 20 is not a multiple of --head-width 16"),
        (["--optimizer", "soap"], "muP has no rule for soap"),
        (["--optimizer", "muno"], "unknown optimizer 'muno'; did you mean 'muon'?"),
        (["--optimizer", "muon,scale"], "expected NAME,KEY=VALUE"),
    ],
)
def test_command_refuses_in_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coord-check", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_one_width_has_no_slope(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["coord-check", "--widths", "64"])
    assert "expected two widths or more" in capsys.readouterr().err


def test_optimizer_is_read_with_its_settings() -> None:
    assert read_optimizer("muon,scale=spectral,peak_lr=0.5")["peak_lr"] == 0.5
    assert read_optimizer("muon,scale=spectral")["scale"] == "spectral"
