"""Timings of a sweep's steps: what is timed, which runs stand for a sweep, the file and its reader."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from analysis.inputs.timings import read_timings
from harness.config import MachineConfig, RunConfig
from harness.corpus import prepare
from harness.module import LanguageModel
from harness.record import TIMING_COLUMNS, TIMINGS_JSON, write_json
from harness.timing import WARMUP_STEPS, time_step
from harness.train import train
from sweeps.cli import main
from sweeps.store import SweepFolder, claim
from sweeps.timing import kinds, time_sweep
from tests.runs import tiny_run
from tests.test_cli import text_sweep

MACHINE = MachineConfig(accelerator="cpu", threads=1)
PAUSE = 0.3


@pytest.fixture(scope="module")
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache)


def timed(run: RunConfig, cache: Path, micro_batch_tokens: int = 64, repeats: int = 3) -> dict[str, Any]:
    return time_step(run, MACHINE, prepare(run.corpus, cache), micro_batch_tokens, repeats)


def test_time_step_gives_a_row_with_every_column(run: RunConfig, cache: Path) -> None:
    row = timed(run, cache)
    assert list(row) == list(TIMING_COLUMNS)
    assert (row["run_id"], row["optimizer"], row["threads"]) == (run.run_id, "muon", 1)
    assert (row["micro_batch_tokens"], row["repeats"]) == (64, 3)
    assert row["micro_batch_seconds"] > 0
    assert 0 < row["matrix_seconds"] < 10 * row["optimizer_seconds"]
    assert 0 < row["cpu_share"] < 1.5


def test_time_step_counts_the_forward_pass_to_the_micro_batch(
    run: RunConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = LanguageModel.loss
    monkeypatch.setattr(LanguageModel, "loss", lambda *arguments: (time.sleep(PAUSE), loss(*arguments))[1])
    row = timed(run, cache)
    assert row["micro_batch_seconds"] > PAUSE > row["optimizer_seconds"]


@pytest.mark.parametrize("place", ["clip_grad_norm_", "_foreach_lerp_"])
def test_time_step_counts_clipping_and_averaging_to_the_optimizer(
    place: str, run: RunConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`_foreach_lerp_` is Adam's, Muon's and the average's: the step pauses at least once."""
    module = torch.nn.utils if place == "clip_grad_norm_" else torch
    original = getattr(module, place)
    monkeypatch.setattr(module, place, lambda *arguments: (time.sleep(PAUSE), original(*arguments))[1])
    row = timed(run.model_copy(update={"max_grad_norm": 1.0}), cache)
    assert row["optimizer_seconds"] > PAUSE > row["micro_batch_seconds"]


def test_time_step_leaves_the_warm_up_out(run: RunConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, calls = LanguageModel.loss, []

    def slow_at_first(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        time.sleep(PAUSE if len(calls) <= WARMUP_STEPS else 0.0)
        return loss(*arguments)

    monkeypatch.setattr(LanguageModel, "loss", slow_at_first)
    assert timed(run, cache)["micro_batch_seconds"] < PAUSE
    assert len(calls) == WARMUP_STEPS + 3


def test_adamw_has_no_matrices_to_share(text: Path, cache: Path) -> None:
    adamw = tiny_run(text, cache, optimizer={"name": "adamw", "peak_lr": 0.01})
    assert timed(adamw, cache)["matrix_seconds"] == 0.0


@pytest.mark.slow
def test_timings_add_up_to_the_train_seconds_of_a_run(text: Path, cache: Path, tmp_path: Path) -> None:
    """Steps of four micro-batches, of which a run's own clock counts the same as its timed parts, within 30 %."""
    run = tiny_run(text, cache, global_batch_tokens=512, token_budget=512 * 60)
    train(run, MACHINE.model_copy(update={"max_micro_batch_tokens": 128}), tmp_path / "run", cache)
    measured = json.loads((tmp_path / "run" / "run.json").read_text())["train_seconds"] / run.steps
    row = timed(run, cache, micro_batch_tokens=128, repeats=60)
    assert 4 * row["micro_batch_seconds"] + row["optimizer_seconds"] == pytest.approx(measured, rel=0.3)


def test_kinds_are_one_run_for_each_model_optimizer_and_micro_batch(text: Path, cache: Path) -> None:
    machine = MachineConfig(max_micro_batch_tokens=256)
    adamw = {"name": "adamw", "peak_lr": 0.01}
    runs = [
        tiny_run(text, cache, optimizer=optimizer, global_batch_tokens=batch, init_seed=seed, token_budget=65_536)
        for optimizer in ({"name": "muon", "peak_lr": 0.02}, {"name": "muon", "peak_lr": 0.04}, adamw)
        for batch in (128, 512, 1024)
        for seed in (0, 1)
    ]
    found = [(run.optimizer.name, micro_batch_tokens) for run, micro_batch_tokens in kinds(runs, machine)]
    assert found == [("muon", 128), ("muon", 256), ("adamw", 128), ("adamw", 256)]


def test_kinds_tell_apart_what_takes_another_time(text: Path, cache: Path) -> None:
    muon = {"name": "muon", "peak_lr": 0.02}
    runs = [
        tiny_run(text, cache, optimizer=muon),
        tiny_run(text, cache, optimizer=muon | {"newton_schulz_dtype": "float32"}),
        tiny_run(text, cache, optimizer=muon | {"momentum": 0.5}),
        tiny_run(text, cache, optimizer=muon, max_grad_norm=1.0),
    ]
    assert [run for run, _ in kinds(runs, MACHINE)] == [runs[0], runs[1], runs[3]]


def test_time_writes_timings_that_the_analysis_reads(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    sweep = text_sweep(tmp_path, text / "*.txt")
    assert main(["bench", sweep, "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert "115k muon: 256 tokens in" in out
    frame = read_timings(Path("results/small"))
    assert frame is not None
    assert frame.columns == list(TIMING_COLUMNS)
    assert sorted(frame.select("optimizer", "micro_batch_tokens").rows()) == [
        ("adamw", 256), ("adamw", 1024), ("muon", 256), ("muon", 1024),
    ]  # fmt: skip
    assert main(["plan", sweep, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["flops_per_second_source"] == "steps timed by critbatch time"
    assert plan["device"] == frame["device"][0]
    assert plan["hours"] > 0


def test_time_is_refused_while_the_sweep_is_trained(run: RunConfig, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    files = folder.run(run.run_id)
    files.path.mkdir(parents=True)
    manifest = {"name": "s", "baseline": "muon", "targets_nats": [2.0], "runs": [{"run_id": run.run_id}]}
    write_json(folder.manifest, manifest)
    with claim(files), pytest.raises(ValueError, match="are being trained; time them when nothing else runs"):
        time_sweep([run], MACHINE, folder, 2, print)


def test_a_folder_without_timings_reads_as_none(tmp_path: Path) -> None:
    assert read_timings(tmp_path) is None


@pytest.mark.parametrize("content", [{"rows": []}, {"rows": [{"model": "115k"}]}, {"rows": [3]}, {}])
def test_timings_of_another_version_are_refused_by_name(content: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / TIMINGS_JSON, content)
    with pytest.raises(ValueError, match=r"timings\.json: not the timings of this version; .*critbatch time"):
        read_timings(tmp_path)


def test_stopwatch_is_the_last_of_the_callbacks(run: RunConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[pl.Callback] = []
    original = pl.Trainer.fit

    def fit(trainer: pl.Trainer, *arguments: Any, **keywords: Any) -> Any:
        seen.extend(trainer.callbacks)  # type: ignore[attr-defined]
        return original(trainer, *arguments, **keywords)

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    timed(run, cache)
    assert [type(callback).__name__ for callback in seen] == ["Accumulation", "WeightAverage", "Stopwatch"]
