"""One run from its configuration to its record: what it computes, how it stops, how it goes on."""

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import STOPPED
from harness.batch_plan import plan_run
from harness.callbacks.interruption import AtomicCheckpointIO, Checkpoints, Interrupted
from harness.config import MachineConfig, RunConfig
from harness.corpus import prepare
from harness.data import MicroBatches
from harness.identity import SCIENCE_VERSION
from harness.model import Transformer
from harness.module import LanguageModel
from harness.origin import code_difference, lock_hash
from harness.record import EVALUATION_COLUMNS, RUN_COLUMNS, RunFolder, read_json, read_rows
from harness.shards import open_shard
from harness.train import train
from sweeps.store import is_missing, result_state
from tests.runs import tiny_run

CLOCKS = {"train_seconds", "train_cpu_seconds", "eval_seconds", "other_seconds"}
MACHINE = MachineConfig(accelerator="cpu", threads=1, max_micro_batch_tokens=128)
EVERY_STEP = MACHINE.model_copy(update={"checkpoint_every_seconds": 0.0})


def science_rows(folder: Path) -> list[dict[str, Any]]:
    """The record without its clocks: what must not depend on interruptions."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_rows(RunFolder(folder).evaluations)]


@pytest.fixture(scope="module")
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache)


@pytest.fixture(scope="module")
def finished(run: RunConfig, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / run.run_id
    assert train(run, MACHINE, folder, cache) == "finished"
    return folder


def test_train_uses_the_budget_exactly_and_learns(run: RunConfig, finished: Path) -> None:
    row = read_json(RunFolder(finished).run)
    assert row["tokens_seen"] == row["realized_tokens"] == run.realized_tokens == 16_384
    assert (row["status"], row["stop_reason"], row["step"]) == ("finished", "budget", 32)
    assert row.keys() == RUN_COLUMNS.keys()
    rows = read_rows(RunFolder(finished).evaluations)
    assert [r["step"] for r in rows] == [0, 4, 6, 8, 12, 16, 23, 32]
    assert rows[-1]["val_loss_nats"] < rows[0]["val_loss_nats"] - 1.0
    assert not RunFolder(finished).checkpoint.exists()


def test_train_records_every_column_at_every_mark(finished: Path) -> None:
    rows = read_rows(RunFolder(finished).evaluations)
    assert all(row.keys() == EVALUATION_COLUMNS.keys() for row in rows)
    assert all(value is not None for row in rows[1:] for value in row.values())
    nulls_at_start = {name for name, value in rows[0].items() if value is None}
    assert nulls_at_start == {"learning_rate", "train_loss_nats", "grad_norm", "update_rms_matrices", "update_rms_rest"}
    for name in CLOCKS:
        seconds = [row[name] for row in rows]
        assert seconds == sorted(seconds)


def test_train_records_where_it_ran_and_with_what(finished: Path) -> None:
    row = read_json(RunFolder(finished).run)
    assert (row["host"], row["lock_hash"]) == (platform.node(), lock_hash())
    assert (row["driver"], row["cuda_version"]) == (None, None)  # on a processor
    assert (row["code_snapshot"], row["micro_batch_halvings"]) == (None, 0)


def test_train_notes_every_start_with_its_code_and_packages(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, 9, crash)
        with pytest.raises(CrashError):
            train(run, EVERY_STEP, tmp_path, cache)
    monkeypatch.setattr("harness.provenance.host_name", lambda: "elsewhere")
    assert train(run, EVERY_STEP, tmp_path, cache) == "finished"
    starts = [json.loads(line) for line in RunFolder(tmp_path).starts.read_text().splitlines()]
    assert [start["host"] for start in starts] == [platform.node(), "elsewhere"]
    row = read_json(RunFolder(tmp_path).run)
    for name in ("code_commit", "code_snapshot", "lock_hash", "python_version", "device", "driver"):
        assert starts[-1][name] == row[name]
    assert starts[-1]["packages"]["torch"] == torch.__version__
    assert starts[-1]["code_difference"] == code_difference()
    assert read_json(RunFolder(tmp_path).machine) == EVERY_STEP.model_dump(mode="json")
    assert RunConfig.model_validate_json(row["config_json"]) == run


def test_train_records_which_algorithm_updates_which_tensor(run: RunConfig, finished: Path) -> None:
    tensors = read_json(RunFolder(finished).routing)["tensors"]
    assert [tensor["name"] for tensor in tensors] == [name for name, _ in Transformer(run.model).named_parameters()]
    muon = sum(math.prod(tensor["shape"]) for tensor in tensors if tensor["algorithm"] == "muon")
    rest = sum(math.prod(tensor["shape"]) for tensor in tensors if tensor["algorithm"] == "adamw")
    assert read_json(RunFolder(finished).run)["routing"] == f"adamw: {rest}, muon: {muon}"
    assert muon == 2 * 12 * 32 * 32  # two layers of twelve width² weights


def test_muon_update_rms_is_the_one_that_its_scale_promises(finished: Path) -> None:
    """match_rms_adamw gives each matrix a change of about 0.2 · lr; Newton–Schulz leaves it between .68 and 1.14 of
    that.
    """
    for row in read_rows(RunFolder(finished).evaluations)[3:]:
        relative = row["update_rms_matrices"] / row["learning_rate"]
        assert 0.6 * 0.2 < relative < 1.3 * 0.2


def test_train_of_a_finished_run_changes_nothing(run: RunConfig, finished: Path, cache: Path) -> None:
    before = RunFolder(finished).run.read_bytes()
    assert train(run, MACHINE, finished, cache) == "finished"
    assert RunFolder(finished).run.read_bytes() == before


def test_accumulated_gradient_equals_that_of_the_full_batch(run: RunConfig, cache: Path) -> None:
    """In float64 the micro-batches of a step sum to the gradient of the whole batch."""
    corpus = prepare(run.corpus, cache)
    gradients = []
    for limit in (512, 128, 32):
        plan = plan_run(run.clock, run.model.sequence_length, 1, limit)
        module = LanguageModel(run).double()
        dataset = MicroBatches(open_shard(corpus.folder, "train"), plan, run.data_seed)
        for number in range(plan.final.accumulation):
            (module.loss(dataset[number]) / plan.final.accumulation).backward()
        gradients.append(torch.cat([w.grad.flatten() for w in module.network.parameters() if w.grad is not None]))
    full, *parts = gradients
    for part in parts:
        # the rotary table is float32, the same for all
        assert torch.allclose(part, full, rtol=0, atol=1e-14)


def test_micro_batch_does_not_change_the_curve(run: RunConfig, finished: Path, cache: Path, tmp_path: Path) -> None:
    whole_batch = MACHINE.model_copy(update={"max_micro_batch_tokens": 512})
    train(run, whole_batch, tmp_path / "run", cache)
    assert read_json(RunFolder(tmp_path / "run").run)["accumulation"] == 1
    pairs = zip(science_rows(finished), science_rows(tmp_path / "run"), strict=True)
    for ours, theirs in pairs:
        assert theirs["val_loss_nats"] == pytest.approx(ours["val_loss_nats"], abs=5e-3)


class CrashError(Exception):
    """Stands in for a kill: nothing runs after it."""


def act_in_micro_batch(monkeypatch: pytest.MonkeyPatch, number: int, act: Any) -> None:
    """Call `act` at the start of the `number`-th micro-batch of this process."""
    seen = 0
    original = LanguageModel.training_step

    def training_step(self: LanguageModel, sequences: Any, index: int) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            act()
        return original(self, sequences, index)

    monkeypatch.setattr(LanguageModel, "training_step", training_step)


def crash() -> None:
    raise CrashError


@pytest.mark.parametrize("micro_batch", [2, 4, 5, 30, 47, 126, 128])
def test_resume_after_a_crash_is_bit_exact(
    run: RunConfig, finished: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    """Four micro-batches a step: the crash falls before, inside and at the end of an accumulated batch, and in the
    last step.
    """
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, micro_batch, crash)
        with pytest.raises(CrashError):
            train(run, EVERY_STEP, folder, cache)
    assert train(run, EVERY_STEP, folder, cache) == "finished"
    assert science_rows(folder) == science_rows(finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_signal_saves_at_the_step_boundary_and_resume_is_bit_exact(
    run: RunConfig, finished: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = tmp_path / "run"
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2)]
    for micro_batch in (18, 41):
        with monkeypatch.context() as patch:
            act_in_micro_batch(patch, micro_batch, lambda: os.kill(os.getpid(), number))
            with pytest.raises(Interrupted):
                train(run, MACHINE, folder, cache)
        assert RunFolder(folder).checkpoint.exists()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2)] == handlers
    assert train(run, MACHINE, folder, cache) == "finished"
    assert science_rows(folder) == science_rows(finished)
    assert read_json(RunFolder(folder).run)["resumes"] == 2


def test_signal_before_the_first_step_stops_the_run_after_it(
    run: RunConfig, finished: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would take it meanwhile, and end the process with status 0."""
    configure = LanguageModel.configure_optimizers

    def signalled(self: LanguageModel) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return configure(self)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "configure_optimizers", signalled)
        with pytest.raises(Interrupted, match="after step 1;"):
            train(run, MACHINE, tmp_path, cache)
    assert train(run, MACHINE, tmp_path, cache) == "finished"
    assert science_rows(tmp_path) == science_rows(finished)


@pytest.mark.parametrize(
    ("every", "save_seconds", "saves"),
    [
        ("auto", 1.0, [60, 121, 182, 243, 304]),
        ("auto", 10.0, [60, 270]),
        (100.0, 10.0, [100, 210, 320]),
        (0.0, 0.0, list(range(10, 320, 10))),
    ],
)
def test_checkpoints_are_as_seldom_as_keeps_saving_under_a_twentieth_of_the_time(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    every: float | str, save_seconds: float, saves: list[float],
) -> None:  # fmt: skip
    """A clock of ten seconds a step, over 31 steps that may end in a checkpoint, and a writer of `save_seconds`."""
    now, saved_at = 0.0, []
    save, step = AtomicCheckpointIO.save_checkpoint, Checkpoints.on_step_end

    def slow_save(self: AtomicCheckpointIO, *arguments: Any, **keywords: Any) -> None:
        nonlocal now
        saved_at.append(now)
        now += save_seconds
        save(self, *arguments, **keywords)

    def slow_step(self: Checkpoints, *arguments: Any) -> None:
        nonlocal now
        now += 10.0
        step(self, *arguments)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", slow_save)
    monkeypatch.setattr(Checkpoints, "on_step_end", slow_step)
    monkeypatch.setattr("harness.callbacks.interruption.time", SimpleNamespace(monotonic=lambda: now))
    machine = MachineConfig.parse(MACHINE.model_dump() | {"checkpoint_every_seconds": every}, "test")
    train(run, machine, tmp_path, cache)
    assert saved_at == saves


def test_resume_refuses_another_factorisation_and_another_run(
    run: RunConfig, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, 9, crash)
        with pytest.raises(CrashError):
            train(run, EVERY_STEP, tmp_path, cache)
    other = EVERY_STEP.model_copy(update={"max_micro_batch_tokens": 64})
    with pytest.raises(ValueError, match="made with micro_batch_tokens 128, now it is 64"):
        train(run, other, tmp_path, cache)
    other_rate = tiny_run(text, cache, optimizer={"name": "muon", "peak_lr": 0.01, "momentum": 0.9})
    with pytest.raises(ValueError, match=r"made with run_id \S+-lr0.02-\S+, now it is \S+-lr0.01-"):
        train(other_rate, EVERY_STEP, tmp_path, cache)
    assert train(run, EVERY_STEP, tmp_path, cache) == "finished"


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("evaluations.jsonl", r"rows of steps \[\], but .* of \[0, 4, 6\]"),
        ("run.json", "checkpoint.ckpt is there without"),
    ],
)
def test_resume_refuses_a_record_that_lost_a_file(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, message: str
) -> None:
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, 30, crash)
        with pytest.raises(CrashError):
            train(run, EVERY_STEP, tmp_path, cache)
    (tmp_path / lost).unlink()
    with pytest.raises(ValueError, match=message):
        train(run, EVERY_STEP, tmp_path, cache)
    RunFolder(tmp_path).checkpoint.unlink()
    assert train(run, EVERY_STEP, tmp_path, cache) == "finished"


@pytest.mark.parametrize(
    ("change", "machine", "message"),
    [
        ({"science_version": SCIENCE_VERSION + 1}, {}, "this code is 1 and gives other numbers"),
        ({"fingerprint": None}, {}, "corpus.fingerprint is not in the configuration"),
        ({"vocab_size": 100}, {}, "model.vocab_size 100 is less than the 128 of the corpus"),
        ({}, {"devices": 2}, "takes as many processes, here are 1"),
    ],
)
def test_train_refuses_what_its_run_id_would_not_name(
    run: RunConfig, cache: Path, tmp_path: Path, change: dict[str, Any], machine: dict[str, Any], message: str
) -> None:
    changed = run.model_copy(
        update={
            "corpus": run.corpus.model_copy(update={k: v for k, v in change.items() if k == "fingerprint"}),
            "model": run.model.model_copy(update={k: v for k, v in change.items() if k == "vocab_size"}),
            "science_version": change.get("science_version", run.science_version),
        }
    )
    with pytest.raises(ValueError, match=message):
        train(changed, MACHINE.model_copy(update=machine), tmp_path / "run", cache)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_named(run: RunConfig, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accelerator is gpu, but PyTorch finds no CUDA device"):
        train(run, MACHINE.model_copy(update={"accelerator": "gpu"}), tmp_path / "run", cache)
    assert not (tmp_path / "run").exists()


def test_bf16_learns_as_fp32_does_but_is_not_the_same(text: Path, cache: Path, finished: Path, tmp_path: Path) -> None:
    run = tiny_run(text, cache, precision="bf16")
    assert train(run, MACHINE, tmp_path, cache) == "finished"
    ours, theirs = science_rows(tmp_path)[-1], science_rows(finished)[-1]
    assert ours["val_loss_nats"] == pytest.approx(theirs["val_loss_nats"], abs=0.02)
    assert ours["val_loss_nats"] != theirs["val_loss_nats"]


@pytest.mark.parametrize("schedule", [{}, {"kind": "cosine"}])
def test_run_of_one_step_is_a_run(text: Path, cache: Path, tmp_path: Path, schedule: dict[str, Any]) -> None:
    run = tiny_run(text, cache, token_budget=700, schedule=schedule)
    assert train(run, MACHINE, tmp_path, cache) == "finished"
    assert [row["step"] for row in science_rows(tmp_path)] == [0, 1]
    assert read_json(RunFolder(tmp_path).run)["tokens_seen"] == 512


def test_stop_at_loss_ends_the_run_at_the_mark_that_reached_it(run: RunConfig, cache: Path, tmp_path: Path) -> None:
    stopping = run.model_copy(update={"stop_at_loss_nats": 3.0})
    assert train(stopping, MACHINE, tmp_path, cache) == "finished"
    row, rows = read_json(RunFolder(tmp_path).run), read_rows(RunFolder(tmp_path).evaluations)
    assert row["stop_reason"] == "target"
    assert rows[-1]["val_loss_averaged_nats"] <= 3.0 < rows[-2]["val_loss_averaged_nats"]
    assert row["tokens_seen"] == rows[-1]["tokens_seen"] < row["realized_tokens"]


@pytest.mark.parametrize(("peak_lr", "reason"), [(1e30, "non_finite_loss"), (30.0, "loss_above_start")])
def test_divergence_is_a_result_with_a_reason(
    text: Path, cache: Path, tmp_path: Path, peak_lr: float, reason: str
) -> None:
    run = tiny_run(text, cache, optimizer={"name": "adamw", "peak_lr": peak_lr})
    assert train(run, MACHINE, tmp_path, cache) == "diverged"
    row = read_json(RunFolder(tmp_path).run)
    assert (row["status"], row["stop_reason"]) == ("diverged", reason)
    assert row["tokens_seen"] < row["realized_tokens"]


def test_loss_above_its_start_ends_a_run_when_the_tokens_have_doubled(text: Path, cache: Path, tmp_path: Path) -> None:
    """Warmup ends with step 4; the marks after it are 6, 8, 12: above the start from 6 on, over at 12 and not at 8."""
    run = tiny_run(text, cache, optimizer={"name": "adamw", "peak_lr": 1.0})
    train(run, MACHINE, tmp_path, cache)
    losses = {row["step"]: row["val_loss_nats"] for row in read_rows(RunFolder(tmp_path).evaluations)}
    assert list(losses) == [0, 4, 6, 8, 12]
    assert all(losses[step] > losses[0] for step in (4, 6, 8, 12))


def test_interrupted_run_diverges_where_it_would_have(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is above its start at the marks 6 and 8 of one process, and at 12 of the next, which ends the run."""
    run = tiny_run(text, cache, optimizer={"name": "adamw", "peak_lr": 1.0})
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, 38, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="after step 10"):
            train(run, MACHINE, tmp_path, cache)
    assert train(run, MACHINE, tmp_path, cache) == "diverged"
    assert [row["step"] for row in science_rows(tmp_path)] == [0, 4, 6, 8, 12]
    assert (result_state(RunFolder(tmp_path)), is_missing(RunFolder(tmp_path))) == ("diverged", False)


def test_max_grad_norm_clips_and_the_record_keeps_the_norm_before(text: Path, cache: Path, tmp_path: Path) -> None:
    losses = []
    for limit in (None, 1e-6):
        run = tiny_run(text, cache, optimizer={"name": "adamw", "peak_lr": 0.01, "eps": 1e-3}, max_grad_norm=limit)
        train(run, MACHINE, tmp_path / str(limit), cache)
        rows = read_rows(RunFolder(tmp_path / str(limit)).evaluations)
        assert rows[1]["grad_norm"] > 1e-3
        losses.append(rows[-1]["val_loss_nats"])
    assert losses[1] > losses[0] + 0.5  # with ε = 1e-3 a gradient clipped to 1e-6 hardly moves the weights


def start(folder: Path, cache: Path, *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "harness.train", str(folder)]
    environment = os.environ | {"CRITBATCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def write_run(folder: Path, run: RunConfig, machine: MachineConfig) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(run.model_dump_json())
    (folder / "machine.json").write_text(machine.model_dump_json())


def wait_for_change(path: Path, before: int | None, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while modified(path) in (None, before):
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.01)


def modified(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.slow
def test_kill_terminate_and_finish_in_separate_processes_is_bit_exact(text: Path, cache: Path, tmp_path: Path) -> None:
    run = tiny_run(text, cache, global_batch_tokens=128, token_budget=61_440)
    train(run, EVERY_STEP, tmp_path / "undisturbed", cache)
    folder = tmp_path / "disturbed"
    write_run(folder, run, EVERY_STEP)
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, STOPPED), (signal.SIGKILL, -9)):
        before = modified(folder / "checkpoint.ckpt")
        process = start(folder, cache)
        wait_for_change(folder / "checkpoint.ckpt", before)
        time.sleep(0.2)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == status
    output, _ = (process := start(folder, cache)).communicate(timeout=120)
    assert process.returncode == 0, output
    assert read_json(RunFolder(folder).run)["resumes"] == 3
    assert science_rows(folder) == science_rows(tmp_path / "undisturbed")


@pytest.mark.slow
def test_two_devices_give_the_curve_of_one(run: RunConfig, finished: Path, cache: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", run, MACHINE.model_copy(update={"devices": 2}))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start(tmp_path / "run", cache, *launcher)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    row = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (row["num_devices"], row["accumulation"], row["tokens_seen"]) == (2, 2, 16_384)
    for ours, theirs in zip(science_rows(finished), science_rows(tmp_path / "run"), strict=True):
        for name in ("val_loss_nats", "val_loss_averaged_nats", "train_loss_nats"):
            if ours[name] is not None:
                assert theirs[name] == pytest.approx(ours[name], abs=5e-3), name
