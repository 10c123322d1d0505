"""Why runs fail, in kinds; and disks that cannot be written, where nothing may be lost."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.config import RunConfig
from harness.failures import DataError, FailureKind, TooLargeError, kind_of, reason_of
from harness.record import RunFolder, read_json
from harness.train import main, train
from sweeps.launch import run_folder
from sweeps.store import SweepFolder
from sweeps.worker import attempt
from tests.disk import Disk
from tests.runs import tiny_run, write_text
from tests.sweep_examples import started
from tests.test_train import EVERY_STEP, MACHINE, CrashError, act_in_micro_batch, crash, science_rows, write_run

FAKE = "tests.fake_training:train"
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return started(tmp_path / "small", machine={"accelerator": "cpu"})


def first(folder: SweepFolder) -> RunFolder:
    return folder.run(folder.read_manifest().runs[0].run_id)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (DataError("train.bin: missing"), "data", "train.bin: missing"),
        (TooLargeError("out of memory"), "out_of_memory", "out of memory"),
        (MemoryError(), "out_of_memory", "MemoryError: MemoryError"),
        (ValueError("use\nfewer"), "code", "use fewer"),
        (KeyError("step"), "code", "KeyError: 'step'"),
    ],
)
def test_failures_are_told_apart_by_their_exception(error: Exception, kind: str, reason: str) -> None:
    assert (kind_of(error), reason_of(error)) == (kind, reason)


@pytest.mark.parametrize("damage", ["truncated", "gone", "changed"])
def test_damaged_corpus_is_a_failure_of_the_data(tmp_path: Path, damage: str) -> None:
    text, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    run = tiny_run(text, cache)
    (shard,) = cache.glob("*/train.bin")
    if damage == "truncated":
        os.truncate(shard, 1000)
    if damage == "gone":
        for file in text.iterdir():
            file.unlink()
    if damage == "changed":
        (text / "0.txt").write_text("something else\n" * 2000)
    with pytest.raises(DataError) as caught:
        train(run, MACHINE, tmp_path / "run", cache)
    assert kind_of(caught.value) == FailureKind.DATA


def test_corpus_that_is_cut_while_the_run_starts_is_a_failure_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    run = tiny_run(write_text(tmp_path / "text"), cache)
    (shard,) = cache.glob("*/train.bin")

    def describe_and_cut(*arguments: Any) -> Any:
        os.truncate(shard, 1000)
        return describe_run(*arguments)

    from harness.train import describe_run

    monkeypatch.setattr("harness.train.describe_run", describe_and_cut)
    with pytest.raises(DataError, match="bytes where"):
        train(run, MACHINE, tmp_path / "run", cache)


@pytest.mark.parametrize(
    ("behaviour", "kind"), [("raise", "code"), ("out-of-memory", "out_of_memory"), ("bad-corpus", "data")]
)
def test_failure_file_says_what_where_and_of_which_kind(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, behaviour: str, kind: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (folder.path / "behaviour.txt").write_text(behaviour)
    run = folder.run(next(run.run_id for run in folder.read_manifest().runs if "muon" in run.run_id))
    assert attempt(run, FAKE) == "failed"
    content = read_json(run.failure)
    assert set(content) == {"reason", "kind", "failed_at", "host", "job_id", "last_lines"}
    assert (content["kind"], content["job_id"]) == (kind, "17")


def test_process_of_a_run_says_why_it_failed_unless_another_has(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "run")])
    write_run(tmp_path / "run", run, MACHINE)
    for error in (MemoryError("first"), KeyError("second")):
        monkeypatch.setattr("harness.train.prepare", raising(error))
        assert main() == 1
    failure = read_json(RunFolder(tmp_path / "run").failure)
    assert (failure["reason"], failure["kind"]) == ("MemoryError: first", "out_of_memory")
    assert "KeyError: 'second'" in capsys.readouterr().err


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: Any) -> Any:
        raise error

    return raise_it


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_run_that_cannot_be_written_is_refused_in_one_line(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A stand-in for a disk that is full or read-only: the first file of the run is refused."""
    monkeypatch.setattr("sweeps.worker.claim", raising(OSError(number, os.strerror(number))))
    with pytest.raises(ValueError, match=rf"cannot be written \({os.strerror(number)}\); make room") as caught:
        attempt(first(folder), FAKE)
    assert len(str(caught.value).splitlines()) == 1
    assert not first(folder).failure.exists()


def test_full_disk_ends_the_pool_in_one_line_and_leaves_the_runs_to_go_on(folder: SweepFolder) -> None:
    (folder.path / "behaviour.txt").write_text("full-disk")
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\); make room"):
        run_folder(folder, slots=2, train=FAKE)
    assert not any(folder.path.glob("runs/*/failure.json"))
    (folder.path / "behaviour.txt").write_text("finish")
    run_folder(folder, slots=2, train=FAKE)
    assert len(list(folder.path.glob("runs/*/evaluations.jsonl"))) == 4


def test_checkpoint_that_does_not_fit_leaves_the_one_before(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a full disk: the tenth synchronisation of a checkpoint is refused."""
    train(run, MACHINE, tmp_path / "undisturbed", cache)
    with monkeypatch.context() as patch:
        saved = 0
        fsync = os.fsync

        def full(descriptor: int) -> None:
            nonlocal saved
            saved += ".ckpt." in Path(f"/proc/self/fd/{descriptor}").readlink().name
            if saved == 10:
                raise FULL
            fsync(descriptor)

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            train(run, EVERY_STEP, tmp_path / "run", cache)
    assert [path.name for path in (tmp_path / "run").glob("*.ckpt*")] == ["checkpoint.ckpt"]
    assert train(run, EVERY_STEP, tmp_path / "run", cache) == "finished"
    assert science_rows(tmp_path / "run") == science_rows(tmp_path / "undisturbed")


def test_run_on_a_disk_that_fills_up_goes_on_when_there_is_room(
    run: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    train(run, MACHINE, tmp_path / "undisturbed", cache)
    files = RunFolder(disk.path / "run")
    with monkeypatch.context() as patch:
        act_in_micro_batch(patch, 30, crash)
        with pytest.raises(CrashError):
            train(run, EVERY_STEP, files.path, cache)
    disk.change(f"size={files.checkpoint.stat().st_size * 3 // 2}")  # too small for the next one beside it
    before = files.checkpoint.read_bytes()
    with pytest.raises(OSError, match="No space left on device"):
        train(run, EVERY_STEP, files.path, cache)
    assert files.checkpoint.read_bytes() == before
    assert [path.name for path in files.path.glob("*.ckpt*")] == ["checkpoint.ckpt"]
    disk.change("size=64m")
    assert train(run, EVERY_STEP, files.path, cache) == "finished"
    assert science_rows(files.path) == science_rows(tmp_path / "undisturbed")


def test_worker_on_a_read_only_disk_says_so_in_one_line(disk: Disk) -> None:
    folder = started(disk.path / "small", machine={"accelerator": "cpu"})
    run = first(folder)
    disk.change("ro")
    with pytest.raises(ValueError, match=r"cannot be written \(Read-only file system\); make room or get the right"):
        attempt(run, FAKE)
    with pytest.raises(ValueError, match=r"cannot be written \(Read-only file system\)"):
        run_folder(folder, slots=1, train=FAKE)
    disk.change("rw")
    assert attempt(run, FAKE) == "finished"
