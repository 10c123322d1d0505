"""One task of a job array, as a process of its own; scontrol is a stand-in."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from harness import STOPPED
from harness.record import RunFolder, read_json, read_rows
from sweeps.clusters.job import Job, Signals, notice_seconds, requeue
from sweeps.clusters.stops import read_stop
from sweeps.store import SweepFolder, is_missing, read_run, record_failure
from tests.slurm_stand_in import StandIn
from tests.stepping import curve
from tests.sweep_examples import started

ROOT = Path(__file__).parents[1]
CODE = (
    "import pickle, sys; from sweeps.clusters import job\n"
    "if __name__ == '__main__':\n"
    "    job.ENDED_WITHIN_SECONDS = float(sys.argv[2])\n"
    "    print(pickle.load(open(sys.argv[1], 'rb'))())"
)

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path / "bin", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return started(tmp_path / "small", machine={"accelerator": "cpu"})


@pytest.fixture
def start(tmp_path: Path, folder: SweepFolder) -> Iterator[Start]:
    """Start a job of all runs; it waits `patience` seconds to be ended after a bare SIGTERM."""
    processes: list[subprocess.Popen[str]] = []

    def started_job(
        patience: float = 60.0,
        max_requeues: int = 5,
        train: str = "tests.stepping:train",
        threads: int = 1,
        notice_seconds: float = 3600.0,
        **environment: str,
    ) -> subprocess.Popen[str]:
        run_ids = tuple(run.run_id for run in folder.read_manifest().runs)
        job = Job(
            str(folder.path), run_ids, threads=threads, max_requeues=max_requeues, notice_seconds=notice_seconds,
            train=train,
        )  # fmt: skip
        (tmp_path / "job.pkl").write_bytes(pickle.dumps(job))
        (tmp_path / "start.py").write_text(CODE)
        slurm = {"SLURM_JOB_ID": "77", "PYTHONPATH": str(ROOT), "STEP_SECONDS": "0.05"}
        command = [sys.executable, str(tmp_path / "start.py"), str(tmp_path / "job.pkl"), str(patience)]
        processes.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env=os.environ | slurm | environment,
            )
        )  # fmt: skip
        return processes[-1]

    yield started_job
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def runs(folder: SweepFolder) -> list[RunFolder]:
    return [folder.run(run.run_id) for run in folder.read_manifest().runs]


def wait_for_steps(folder: SweepFolder) -> None:
    end = time.monotonic() + 60
    while sum(len(read_rows(run.evaluations)) for run in runs(folder)) < 5:
        assert time.monotonic() < end, "no step was taken"
        time.sleep(0.05)


def assert_all_undisturbed(folder: SweepFolder) -> None:
    for run in runs(folder):
        assert [row["val_loss_nats"] for row in read_rows(run.evaluations)] == curve(read_run(run))


def test_job_trains_its_runs_and_again_does_nothing(folder: SweepFolder, start: Start) -> None:
    output, _ = (process := start(STEP_SECONDS="0")).communicate(timeout=60)
    assert (process.returncode, output) == (0, "4 runs trained\n")
    before = [run.run.stat().st_mtime_ns for run in runs(folder)]
    output, _ = (process := start()).communicate(timeout=60)
    assert process.returncode == 0, output
    assert [run.run.stat().st_mtime_ns for run in runs(folder)] == before


@pytest.mark.parametrize("also_sigterm", [False, True])
def test_signalled_job_saves_requeues_itself_once_and_goes_on(
    folder: SweepFolder, start: Start, stand_in: StandIn, also_sigterm: bool
) -> None:
    process = start()
    wait_for_steps(folder)
    process.send_signal(signal.SIGUSR2)
    if also_sigterm:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, output
    assert stand_in.calls("scontrol") == ["requeue 77"]
    assert sum(run.checkpoint.exists() for run in runs(folder)) == 1
    output, _ = (process := start(SLURM_RESTART_COUNT="1", STEP_SECONDS="0")).communicate(timeout=60)
    assert process.returncode == 0, output
    assert sum(read_json(run.run)["resumes"] for run in runs(folder)) == 1
    assert_all_undisturbed(folder)


def test_job_that_gets_sigterm_alone_saves_and_waits_for_its_end(
    folder: SweepFolder, start: Start, stand_in: StandIn
) -> None:
    process = start()
    wait_for_steps(folder)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=5)
    assert sum(run.checkpoint.exists() for run in runs(folder)) == 1
    assert stand_in.calls("scontrol") == []


def test_job_that_nobody_ends_after_sigterm_requeues_itself(
    folder: SweepFolder, start: Start, stand_in: StandIn
) -> None:
    process = start(patience=0.5)
    wait_for_steps(folder)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == STOPPED
    assert stand_in.calls("scontrol") == ["requeue 77"]


def test_job_that_was_restarted_too_often_ends_with_advice(
    folder: SweepFolder, start: Start, stand_in: StandIn
) -> None:
    process = start(max_requeues=3, SLURM_RESTART_COUNT="3")
    wait_for_steps(folder)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "job 77 was stopped by Slurm after 3 restarts and is not requeued (max_requeues 3" in output
    assert stand_in.calls("scontrol") == []
    stop = read_stop(folder.path, "77")
    assert stop is not None
    assert (stop.is_time_limit, stop.reason in output) == (False, True)
    output, _ = (process := start(SLURM_RESTART_COUNT="4", STEP_SECONDS="0")).communicate(timeout=60)
    assert process.returncode == 0, output  # somebody has requeued it by hand
    assert read_stop(folder.path, "77") is None


def test_job_that_is_not_requeued_at_its_time_limit_says_so(folder: SweepFolder, start: Start) -> None:
    process = start(max_requeues=0, notice_seconds=0.5)
    wait_for_steps(folder)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    stop = read_stop(folder.path, "77")
    assert stop is not None
    assert stop.is_time_limit
    assert stop.reason.startswith("job 77 reached its time limit and is not requeued (max_requeues 0")


@pytest.mark.parametrize(("minutes", "signal_seconds", "notice"), [(60, 120, 3390.0), (2, 60, 0.0)])
def test_notice_of_the_time_limit_may_come_early(minutes: int, signal_seconds: int, notice: float) -> None:
    assert notice_seconds(minutes, signal_seconds) == notice


@pytest.mark.usefixtures("restored_sigterm")
def test_handlers_of_signals_only_take_note(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    try:
        signals = Signals()
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.raise_signal(number)
        assert capfd.readouterr() == ("", "")
        assert signals.in_words == "SIGTERM and SIGUSR2"
        with pytest.raises(KeyboardInterrupt):
            signals.raise_if_any()
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_threads_are_those_of_the_job_whatever_has_become_of_the_sweep(folder: SweepFolder, start: Start) -> None:
    started(folder.path, machine={"accelerator": "cpu", "threads": 5})
    process = start(train="tests.fake_training:train", threads=3)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    told = {line.split()[-1] for run in runs(folder) for line in (run.path / "attempts.txt").read_text().splitlines()}
    assert told == {"3"}


def test_requeued_job_does_not_repeat_a_run_that_failed_in_it(folder: SweepFolder, start: Start) -> None:
    (folder.path / "behaviour.txt").write_text("fail")
    output, _ = (process := start(STEP_SECONDS="0")).communicate(timeout=60)
    assert process.returncode == 1
    assert "2 of 4 runs failed" in output
    failed = [run for run in runs(folder) if is_missing(run)]
    before = [read_json(run.failure)["failed_at"] for run in failed]
    assert {read_json(run.failure)["job_id"] for run in failed} == {"77"}
    (folder.path / "behaviour.txt").write_text("")
    output, _ = (process := start()).communicate(timeout=60)
    assert process.returncode == 0, output
    assert [read_json(run.failure)["failed_at"] for run in failed] == before
    output, _ = (process := start(SLURM_JOB_ID="78", STEP_SECONDS="0")).communicate(timeout=60)
    assert process.returncode == 0, output
    assert not any(map(is_missing, runs(folder)))


def test_requeued_job_takes_up_a_run_whose_processes_had_lost_each_other(
    folder: SweepFolder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node died with the job's own process: a process on another node said so, then Slurm requeued the job."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for run in runs(folder):
        record_failure(run, "RuntimeError: Read error [127.0.0.1]:1967: Connection reset by peer")
    output, _ = (process := start(STEP_SECONDS="0", SLURM_RESTART_COUNT="1")).communicate(timeout=60)
    assert (process.returncode, output) == (0, "4 runs trained\n")
    assert not any(map(is_missing, runs(folder)))


def test_stopped_job_is_requeued_for_runs_that_failed_in_an_earlier_one(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in runs(folder):
        record_failure(run, "the corpus has been moved")
    again = Mock()
    monkeypatch.setattr(Job, "_train", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(Job, "_start_again", again)
    with pytest.raises(RuntimeError, match="4 of 4 runs failed"):
        Job(sweep=str(folder.path), run_ids=tuple(run.path.name for run in runs(folder)))()
    again.assert_called_once()


@pytest.mark.usefixtures("restored_sigterm")
@pytest.mark.parametrize("words", ["Job is pending execution", "Job/step already completing or completed"])
def test_requeue_takes_already_requeued_as_done(stand_in: StandIn, words: str) -> None:
    stand_in.says("scontrol", words)
    requeue("77")
    assert stand_in.calls("scontrol") == ["requeue 77"]


@pytest.mark.usefixtures("restored_sigterm")
def test_requeue_that_is_refused_is_an_error(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    stand_in.says("scontrol", "Access/permission denied")
    with pytest.raises(RuntimeError, match="did not requeue job 77: Access/permission denied"):
        requeue("77")
    assert len(stand_in.calls("scontrol")) == 5


@pytest.fixture
def restored_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
