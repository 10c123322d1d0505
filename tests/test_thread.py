"""One number on its way: `global_batch_tokens` from the sweep file to the axis of the figure, nothing faked."""

from pathlib import Path

import pytest

from analysis.estimate import estimate
from analysis.inputs.records import load
from analysis.page.plots import FIGURES
from harness.config import RunConfig
from harness.record import RunFolder, read_json, read_rows
from sweeps.cli import main

SWEEP = """
name: thread
base:
  corpus: {{source: text, paths: ["{text}/*.txt"], tokenizer: ascii, validation_share: 0.1}}
  model: {{width: 32, layers: 1, heads: 2, sequence_length: 32, norm: layernorm}}
  schedule: {{warmup_tokens: 1024}}
  averaging: {{kind: power_ema}}
  evaluation: {{tokens: 2048, first_mark_tokens: 1024}}
  stop_at_loss_nats: 2.0
optimizers:
  adamw: {{learning_rate: 0.02}}
  muon: {{learning_rate: [0.02, 0.04], momentum: 0.9}}
grid:
  global_batch_tokens: [64, 256, 1024]
  seed: [0]
token_budget: 61440
confirm: {{seeds: [1, 2]}}
targets_nats: [2.5, 2.0]
machine: {{accelerator: cpu, max_micro_batch_tokens: 256}}
"""
BATCHES = [64, 256, 1024]


@pytest.fixture(scope="module")
def sweep(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the sweep as a user would, in workers of its own; return its folder."""
    folder = tmp_path_factory.mktemp("thread")
    (folder / "thread.yaml").write_text(SWEEP.format(text=text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRITBATCH_CACHE", str(folder / "cache"))
        assert main(["run", str(folder / "thread.yaml"), "--results", str(folder), "--slots", "2"]) == 0
    return folder / "thread"


def test_batch_goes_unchanged_from_the_sweep_file_to_the_tokens_counted(sweep: Path) -> None:
    seen = set()
    for path in sorted((sweep / "runs").iterdir()):
        files = RunFolder(path)
        batch = RunConfig.parse(read_json(files.config), str(path)).global_batch_tokens
        row = read_json(files.run)
        assert f"-b{batch}-" in path.name
        assert row["global_batch_tokens"] == batch
        assert row["micro_batch_tokens"] * row["accumulation"] * row["num_devices"] == batch
        assert row["micro_batch_tokens"] <= 256
        assert all(
            evaluation["tokens_seen"] == evaluation["step"] * batch for evaluation in read_rows(files.evaluations)
        )
        assert row["tokens_seen"] == row["step"] * batch
        assert row["stop_reason"] == "target" or row["tokens_seen"] == row["realized_tokens"]
        seen.add(batch)
    assert sorted(seen) == BATCHES


def test_batch_goes_unchanged_from_the_record_to_the_estimates(sweep: Path) -> None:
    estimates = estimate(load(sweep))
    reached = estimates.targets.filter(status="reached")
    assert (
        reached["tokens_to_target"] - reached["steps_to_target"] * reached["global_batch_tokens"]
    ).abs().max() < 1e-6
    assert estimates.cells["global_batch_tokens"].unique().sort().to_list() == BATCHES
    confirmed = estimates.records.runs.filter(stage="confirm")
    assert confirmed.height == 2 * len(BATCHES) * 2  # optimizers, batches, fresh seeds
    assert set(estimates.cells["seeds_from"]) == {"fresh"}
    assert estimates.token_ratios["global_batch_tokens"].unique().sort().to_list() == BATCHES


def test_batch_stands_on_the_axis_of_the_figure(sweep: Path) -> None:
    figure = FIGURES["tokens_to_target"](estimate(load(sweep)))
    for axes in figure.axes:
        assert axes.get_xlabel() == "Global batch size (tokens)"
        assert axes.get_xscale() == "log"
        shown = {
            round(position): label.get_text()
            for position, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        }
        assert [shown.get(batch) for batch in BATCHES] == ["64", "256", "1K"]


def test_report_is_rebuilt_from_the_two_parquet_files_alone(sweep: Path, tmp_path: Path) -> None:
    for name in ("sweep.json", "sweep.yaml", "runs.parquet", "evaluations.parquet"):
        (tmp_path / name).write_bytes((sweep / name).read_bytes())
    assert main(["report", str(tmp_path)]) == 0
    for table in sorted((sweep / "tables").iterdir()):
        assert (tmp_path / "tables" / table.name).read_bytes() == table.read_bytes(), table.name


def test_run_again_changes_nothing(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(sweep.parent / "cache"))
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("runs/*/run.json")}
    assert main(["run", str(sweep.parent / "thread.yaml"), "--results", str(sweep.parent)]) == 0
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("runs/*/run.json")} == before
