"""Memory that runs out: half the micro-batch before the first checkpoint, a failure with advice after it."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.batch_plan import plan_batch
from harness.callbacks.interruption import Interrupted
from harness.config import MachineConfig, RunConfig
from harness.failures import FailureKind, TooLargeError, is_out_of_memory, kind_of
from harness.halving import halved_plan, start_smaller, within_memory
from harness.module import LanguageModel
from harness.record import RunFolder, read_json, write_json
from harness.train import train
from sweeps.oom_kills import oom_kills
from sweeps.worker import attempt
from tests.runs import tiny_run
from tests.test_train import EVERY_STEP, MACHINE, CrashError, act_in_micro_batch, crash, science_rows, write_run

CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to")

#: 512 tokens of sequences of 32, in micro-batches of at most 256.
LARGE = MACHINE.model_copy(update={"max_micro_batch_tokens": 256})


@pytest.fixture(scope="module")
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache)


def limit_memory(
    monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception = CUDA_ERROR, after_calls: int = 0
) -> list[int]:
    """Let the network take at most `tokens` in a forward pass; return the list of the sizes that it is asked for."""
    loss, asked = LanguageModel.loss, []

    def limited(self: LanguageModel, sequences: torch.Tensor) -> torch.Tensor:
        size = sequences[:, 1:].numel()
        asked.append(size)
        if size > tokens and len(asked) > after_calls:
            raise error
        return loss(self, sequences)

    monkeypatch.setattr(LanguageModel, "loss", limited)
    return asked


def row_of(micro_batch_tokens: int, **changes: Any) -> dict[str, Any]:
    shape = {"global_batch_tokens": 24 * 32, "sequence_length": 32, "num_devices": 2}
    return shape | {"micro_batch_tokens": micro_batch_tokens, "micro_batch_halvings": 0} | changes


@pytest.mark.parametrize("error", [CUDA_ERROR, CPU_ERROR, MemoryError()])
def test_run_that_is_too_large_starts_anew_with_half_the_micro_batch_until_it_fits(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], error: Exception,
) -> None:  # fmt: skip
    asked = limit_memory(monkeypatch, tokens=64, error=error)
    assert train(run, LARGE, tmp_path, cache) == "finished"
    row = read_json(RunFolder(tmp_path).run)
    assert (row["micro_batch_tokens"], row["accumulation"], row["micro_batch_halvings"]) == (64, 8, 2)
    assert (row["global_batch_tokens"], row["tokens_seen"], row["resumes"]) == (512, run.realized_tokens, 0)
    assert asked[:3] == [256, 128, 64]
    out = capsys.readouterr().out
    assert "Out of memory with micro-batches of 256 tokens; starting anew with 128 and an accumulation of 4" in out
    assert "Out of memory with micro-batches of 128 tokens; starting anew with 64 and an accumulation of 8" in out


def test_halved_run_is_the_run_that_starts_with_that_micro_batch(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run, LARGE.model_copy(update={"max_micro_batch_tokens": 128}), tmp_path / "small", cache)
    limit_memory(monkeypatch, tokens=128, after_calls=30)  # some steps are done when memory runs out
    train(run, LARGE, tmp_path / "halved", cache)
    assert science_rows(tmp_path / "halved") == science_rows(tmp_path / "small")


def test_halved_run_is_resumed_with_its_own_micro_batch(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, tokens=128)
    train(run, LARGE, tmp_path / "undisturbed", cache)
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, 41, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(run, LARGE, tmp_path / "run", cache)
    assert train(run, LARGE, tmp_path / "run", cache) == "finished"
    row = read_json(RunFolder(tmp_path / "run").run)
    assert (row["micro_batch_tokens"], row["micro_batch_halvings"], row["resumes"]) == (128, 1, 1)
    assert science_rows(tmp_path / "run") == science_rows(tmp_path / "undisturbed")


def test_run_of_single_sequences_is_refused_when_memory_runs_out(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, tokens=16)
    with pytest.raises(TooLargeError, match="with a micro-batch of one sequence of 32 tokens; take a device") as caught:
        train(run, LARGE, tmp_path, cache)
    assert kind_of(caught.value) == FailureKind.OUT_OF_MEMORY
    assert read_json(RunFolder(tmp_path).run)["micro_batch_halvings"] == 3  # 256, 128, 64, 32


def test_memory_that_runs_out_after_a_checkpoint_is_a_failure_with_advice(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, 30, crash)
        with pytest.raises(CrashError):
            train(run, EVERY_STEP, tmp_path, cache)
    with monkeypatch.context() as patch:
        limit_memory(patch, tokens=64)
        with pytest.raises(
            TooLargeError, match=r"of 128 tokens, and there is a checkpoint.*max_micro_batch_tokens to 64"
        ):
            train(run, EVERY_STEP, tmp_path, cache)
    assert read_json(RunFolder(tmp_path).run)["micro_batch_halvings"] == 0
    assert train(run, EVERY_STEP, tmp_path, cache) == "finished"


def test_an_error_of_the_code_is_not_tried_again(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = limit_memory(monkeypatch, tokens=64, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(run, LARGE, tmp_path, cache)
    assert asked == [256]


@pytest.mark.parametrize(("micro_batch", "smaller"), [(12, 6), (6, 3), (4, 2), (3, 1), (2, 1)])
def test_half_a_micro_batch_divides_the_batch_over_the_devices_exactly(micro_batch: int, smaller: int) -> None:
    plan = halved_plan(row_of(micro_batch * 32)).final
    assert (plan.micro_batch_sequences, plan.accumulation) == (smaller, 12 // smaller)
    assert plan == plan_batch(24 * 32, 32, 2, smaller * 32)


def test_two_processes_that_run_out_of_memory_at_once_halve_once(tmp_path: Path) -> None:
    files = RunFolder(tmp_path)
    row = row_of(4 * 32)
    write_json(files.run, row)
    assert start_smaller(files, row) == start_smaller(files, row)
    assert read_json(files.run)["micro_batch_halvings"] == 1
    machine = within_memory(MachineConfig(), files)
    assert machine.max_micro_batch_tokens == 64
    assert within_memory(MachineConfig(max_micro_batch_tokens=32), files).max_micro_batch_tokens == 32


#: Runs in every process of the test below; the second device has less memory than the first.
_SMALL_SECOND_DEVICE = """
import os
if os.environ.get("LOCAL_RANK") == "1":
    from harness.module import LanguageModel
    loss = LanguageModel.loss
    def limited(self, sequences):
        if sequences[:, 1:].numel() > 64:
            raise RuntimeError("CUDA out of memory")
        return loss(self, sequences)
    LanguageModel.loss = limited
"""


@pytest.mark.slow
def test_all_devices_start_anew_when_memory_runs_out_on_one(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_SMALL_SECOND_DEVICE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}")
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))
    files = RunFolder(tmp_path / "run")
    write_run(files.path, run, MACHINE.model_copy(update={"devices": 2}))
    assert attempt(files, "harness.train:train") == "finished"
    row = read_json(files.run)
    assert (row["num_devices"], row["micro_batch_tokens"], row["micro_batch_halvings"]) == (2, 64, 1)
    assert row["tokens_seen"] == run.realized_tokens
    assert not files.failure.exists()


def test_only_want_of_memory_is_out_of_memory() -> None:
    assert all(is_out_of_memory(error) for error in (CUDA_ERROR, CPU_ERROR, MemoryError(), OSError(12, "no memory")))
    assert not any(is_out_of_memory(error) for error in (ValueError("out of memory"), OSError(28, "disk"), KeyError()))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone overcommits memory that it says it has not")
def test_what_the_processor_says_when_memory_runs_out_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("line", "file", "content"),
    [
        ("0::/job", "job/memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n"),
        ("4:memory:/job", "memory/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ],
)
def test_kills_for_want_of_memory_are_counted_in_both_versions_of_control_groups(
    tmp_path: Path, line: str, file: str, content: str
) -> None:
    (tmp_path / "membership").write_text(f"5:devices:/\n{line}\n")
    (tmp_path / file).parent.mkdir(parents=True)
    count: Callable[[], int] = lambda: oom_kills(tmp_path, tmp_path / "membership")  # noqa: E731
    assert count() == 0
    (tmp_path / file).write_text(content)
    assert count() == 2
