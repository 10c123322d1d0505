"""Interruptions of every kind: the curve, the weights, their average, the optimizer and the data are those of the run
that nothing disturbed, bit for bit.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch

import harness.train
from harness.callbacks import evaluation, interruption
from harness.callbacks.averaging import WeightAverage
from harness.callbacks.evaluation import Evaluation
from harness.callbacks.interruption import Interrupted
from harness.config import RunConfig
from harness.data import MicroBatches
from harness.module import LanguageModel
from harness.record import RunFolder, read_json
from harness.train import train
from tests.runs import tiny_run
from tests.test_train import EVERY_STEP, MACHINE, CrashError, act_in_micro_batch, crash, science_rows

STEPS, MICRO_BATCHES = 32, 128


class Observed:
    """What a run leaves behind beside its record: its last module and trainer, and the micro-batches that it read."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[int, bytes]] = []
        self._last: tuple[LanguageModel, pl.Trainer] | None = None
        build, get = harness.train.build, MicroBatches.__getitem__

        def keep(*arguments: Any) -> tuple[LanguageModel, pl.Trainer]:
            self._last = build(*arguments)
            return self._last

        def note(batches: MicroBatches, index: int) -> torch.Tensor:
            tokens = get(batches, index)
            self.read.append((index, tokens.numpy().tobytes()))
            return tokens

        patch.setattr(harness.train, "build", keep)
        patch.setattr(MicroBatches, "__getitem__", note)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Weights, their average and the optimizer's state at the end."""
        assert self._last is not None
        module, trainer = self._last
        [average] = [each for each in trainer.callbacks if isinstance(each, WeightAverage)]
        state = trainer.optimizers[0].state_dict()["state"]
        moments = [state[number][name] for number in sorted(state) for name in sorted(state[number])]
        return [*module.state_dict().values(), *average.average, *moments]


@pytest.fixture(scope="module")
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache)


@pytest.fixture(scope="module")
def undisturbed(run: RunConfig, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Observed]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        observed = Observed(patch)
        assert train(run, MACHINE, folder, cache) == "finished"
    assert [index for index, _ in observed.read] == list(range(MICRO_BATCHES))
    assert len(observed.tensors) > 50
    return folder, observed


def assert_undisturbed(folder: Path, observed: Observed, undisturbed: tuple[Path, Observed]) -> None:
    its_folder, its = undisturbed
    assert science_rows(folder) == science_rows(its_folder)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(observed.tensors, its.tensors, strict=True))
    assert dict(observed.read) == dict(its.read)


def test_a_run_interrupted_at_random_is_the_undisturbed_one(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[Path, Observed]
) -> None:
    """Crashes and signals, by turns, up to a dozen micro-batches after each start."""
    dice, interruptions = random.Random(0), 0
    observed = Observed(monkeypatch)
    while not RunFolder(tmp_path).run.exists() or read_json(RunFolder(tmp_path).run)["status"] == "running":
        acts: list[Callable[[], Any]] = [crash, lambda: os.kill(os.getpid(), signal.SIGTERM)]
        with monkeypatch.context() as patch:
            act_in_micro_batch(patch, dice.randint(1, 12), acts[interruptions % 2])
            try:
                train(run, EVERY_STEP, tmp_path, cache)
            except (CrashError, Interrupted):
                interruptions += 1
    assert interruptions > 12
    assert_undisturbed(tmp_path, observed, undisturbed)


def crash_in_the_evaluation(patch: pytest.MonkeyPatch, number: int) -> None:
    """Crash while the `number`-th row is measured: nothing of it is written."""
    calls, measure = [], Evaluation._train_loss

    def measured(*arguments: Any) -> Any:
        calls.append(None)
        return measure(*arguments) if len(calls) < number else crash()

    patch.setattr(Evaluation, "_train_loss", measured)


def crash_after_the_row(patch: pytest.MonkeyPatch, number: int) -> None:
    """Crash when the `number`-th row is written, before the checkpoint that knows of it."""
    rows, append = [], evaluation.append_row

    def appended(path: Path, row: Any) -> None:
        append(path, row)
        rows.append(row)
        if len(rows) == number:
            crash()

    patch.setattr(evaluation, "append_row", appended)


def crash_in_the_checkpoint(patch: pytest.MonkeyPatch, number: int) -> None:
    """Be killed with half of the `number`-th checkpoint written, which then lies there under its temporary name."""
    saves, save = [], torch.save

    def half(content: Any, file: Any) -> None:
        saves.append(None)
        save(content, file)
        if len(saves) == number:
            file.truncate(file.tell() // 2)
            shutil.copy(file.name, f"{file.name}9")  # the writer tidies up, as one that is killed cannot
            crash()

    patch.setattr(interruption.torch, "save", half)


def crash_at_the_end(patch: pytest.MonkeyPatch, number: int) -> None:
    """Crash after the last step, before the record says that the run has finished."""
    del number
    patch.setattr(harness.train, "finish", lambda *_: crash())


Strike = Callable[[pytest.MonkeyPatch, int], None]


@pytest.mark.parametrize(
    ("strike", "number"),
    [
        (crash_in_the_evaluation, 1),
        (crash_in_the_evaluation, 4),
        (crash_in_the_evaluation, 8),
        (crash_after_the_row, 1),
        (crash_after_the_row, 2),
        (crash_after_the_row, 8),
        (crash_in_the_checkpoint, 1),
        (crash_in_the_checkpoint, 12),
        (crash_at_the_end, 1),
    ],
)
def test_a_run_that_crashes_at_a_bad_moment_is_the_undisturbed_one(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[Path, Observed],
    strike: Strike, number: int,
) -> None:  # fmt: skip
    observed = Observed(monkeypatch)
    with monkeypatch.context() as patch:
        strike(patch, number)
        with pytest.raises(CrashError):
            train(run, EVERY_STEP, tmp_path, cache)
    assert train(run, EVERY_STEP, tmp_path, cache) == "finished"
    assert_undisturbed(tmp_path, observed, undisturbed)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.json", "machine.json", "routing.json", "run.json", "starts.jsonl", "evaluations.jsonl"}


def test_signal_in_the_last_step_lets_the_run_finish(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[Path, Observed]
) -> None:
    observed = Observed(monkeypatch)
    act_in_micro_batch(monkeypatch, MICRO_BATCHES, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(run, MACHINE, tmp_path, cache) == "finished"
    assert_undisturbed(tmp_path, observed, undisturbed)


@pytest.fixture(scope="module")
def stopped(run: RunConfig, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after ten steps."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        act_in_micro_batch(patch, 40, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(run, MACHINE, folder, cache)
    return folder


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_one_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip_one_bit, lambda _: b"", lambda content: b"\0" * len(content)])
def test_damaged_checkpoint_is_removed_and_the_run_starts_anew(
    run: RunConfig, cache: Path, tmp_path: Path, stopped: Path, undisturbed: tuple[Path, Observed],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    files = RunFolder(shutil.copytree(stopped, tmp_path / "run"))
    files.checkpoint.write_bytes(damage(files.checkpoint.read_bytes()))
    observed = Observed(monkeypatch)
    assert train(run, MACHINE, files.path, cache) == "finished"
    aside = f"damaged-{files.checkpoint.name}"
    said = f"{files.checkpoint} was damaged: set aside as {aside}; the run starts from the beginning"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    assert (files.path / aside).exists()
    assert read_json(files.run)["resumes"] == 0
    assert_undisturbed(files.path, observed, undisturbed)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)")])
def test_checkpoint_that_the_machine_cannot_read_now_is_left_alone(
    run: RunConfig, cache: Path, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    files = RunFolder(shutil.copytree(stopped, tmp_path / "run"))
    before = files.checkpoint.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", Mock(side_effect=error))
        with pytest.raises(type(error)):
            train(run, MACHINE, files.path, cache)
    assert files.checkpoint.read_bytes() == before
    assert train(run, MACHINE, files.path, cache) == "finished"
    assert read_json(files.run)["resumes"] > 0


def test_run_goes_on_on_another_processor_and_says_so(
    run: RunConfig, cache: Path, tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = RunFolder(shutil.copytree(stopped, tmp_path / "run"))
    record = read_json(files.run)
    files.run.write_text(json.dumps(record | {"device": "another processor"}))
    assert train(run, MACHINE, files.path, cache) == "finished"
    assert f"Goes on on {record['device']}, before on another processor: sums may round" in capsys.readouterr().out
    assert read_json(files.run)["resumes"] > 0


def test_run_does_not_go_from_a_gpu_to_a_processor(run: RunConfig, cache: Path, tmp_path: Path, stopped: Path) -> None:
    files = RunFolder(shutil.copytree(stopped, tmp_path / "run"))
    files.run.write_text(json.dumps(read_json(files.run) | {"device": "NVIDIA H200", "driver": "570"}))
    with pytest.raises(ValueError, match=r"made on NVIDIA H200, and this is .*: one of them is no GPU"):
        train(run, MACHINE, files.path, cache)
    assert files.checkpoint.exists()


def test_checkpoint_of_another_run_is_refused(
    run: RunConfig, text: Path, cache: Path, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors have the same shapes, and its record that of this run."""
    other = tiny_run(text, cache, optimizer={"name": "muon", "peak_lr": 0.01, "momentum": 0.9})
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, 40, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(other, MACHINE, tmp_path / "other", cache)
    files = RunFolder(shutil.copytree(stopped, tmp_path / "run"))
    shutil.copy(tmp_path / "other" / files.checkpoint.name, files.checkpoint)
    with pytest.raises(ValueError, match=rf"is one of {other.run_id}, not of {run.run_id}; remove it to start anew"):
        train(run, MACHINE, files.path, cache)
    files.checkpoint.unlink()
    assert train(run, MACHINE, files.path, cache) == "finished"
