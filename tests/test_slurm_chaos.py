"""Jobs of a real Slurm that train, under random signals, kills, requeues and cancellations: every run finishes once."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from harness.record import read_json
from sweeps.clusters.submission import submit
from sweeps.store import SweepFolder, is_claimed
from tests.chaos import Strikes, all_done, assert_each_equals_its_twin, resumes, runs_of, start, wait_for_progress
from tests.slurm_cluster import SlurmCluster, SlurmError, wait_until
from tests.slurm_sweeps import REAL, process_of, submission, wait_for_end

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

CHAOS_SECONDS = 200.0
TOKEN_BUDGET = 163_840  # about ten seconds of work for each run

#: Four jobs at a time, on two cores: while one comes back, others train.
PROFILE = {"cpus_per_device": 2, "sbatch": {"nodelist": "n1"}, "max_requeues": 99}

_JOB, _WORKER = b"submitit.core._submit", b"spawn_main"

Strike = Callable[[SlurmCluster, str], object]


def to_process(words: bytes, number: signal.Signals) -> Strike:
    """Signal the process of a task that has the words in its command line."""
    return lambda slurm, task: os.kill(process_of(slurm, job_id(slurm, task), words), number)


def to_task(*command: str) -> Strike:
    """Have Slurm do something to a task."""
    return lambda slurm, task: slurm.run(*command, task)


def preempt(slurm: SlurmCluster, task: str) -> None:
    """Do as Slurm does to a job that has no grace: SIGTERM alone, for which it saves and waits, then a requeue."""
    slurm.run("scancel", "--signal=TERM", "--batch", task)
    time.sleep(2.0)
    slurm.run("scontrol", "requeue", task)


STRIKES: dict[str, Strike] = {
    "SIGTERM to a job, then requeue": preempt,
    "SIGTERM to a training process": to_process(_WORKER, signal.SIGTERM),
    "SIGKILL to a job": to_process(_JOB, signal.SIGKILL),
    "SIGKILL to a training process": to_process(_WORKER, signal.SIGKILL),
    "SIGUSR2 to a job": to_task("scancel", "--signal=USR2", "--batch"),
    "SIGUSR2 to a training process": to_process(_WORKER, signal.SIGUSR2),
    "requeue": to_task("scontrol", "requeue"),
    "cancel": to_task("scancel"),
}


def test_twenty_runs_under_chaos_each_finish_once_with_the_curve_of_their_undisturbed_twin(
    slurm: SlurmCluster, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))
    folder, twin = (start(tmp_path / name, text, TOKEN_BUDGET) for name in ("chaos", "twin"))
    strikes = Strikes(list(STRIKES), seed=0)
    rage(slurm, folder, strikes)
    finish(slurm, folder)
    with capsys.disabled():
        print(f"\n{strikes.report(folder)}")
    assert strikes.hits.keys() == STRIKES.keys()
    assert resumes(folder) >= strikes.hits.total() / 4 >= 5
    assert_each_equals_its_twin(folder, twin)


def rage(slurm: SlurmCluster, folder: SweepFolder, strikes: Strikes) -> None:
    """Strike for so long, most often where a run has just come further; submit again what was killed or cancelled."""
    end = time.monotonic() + CHAOS_SECONDS
    while not all_done(folder) and (time.monotonic() < end or strikes.hits.keys() != STRIKES.keys()):
        submit(submission(folder, REAL, runs_per_job=2, **PROFILE))
        training = {read_json(run.run)["job_id"] for run in wait_for_progress(folder)}
        time.sleep(strikes.random.uniform(0.0, 3.0))
        running = running_tasks(slurm)
        if targets := (strikes.random.random() < 0.8 and sorted(training.intersection(running))) or running:
            task = strikes.random.choice(targets)
            strikes.strike(lambda kind: hits(slurm, task, kind))  # noqa: B023


def hits(slurm: SlurmCluster, task: str, kind: str) -> bool:
    """Strike a running task; return whether it was a hit: it may have just ended."""
    with suppress(SlurmError, LookupError, ProcessLookupError):
        STRIKES[kind](slurm, task)
        return True
    return False


def finish(slurm: SlurmCluster, folder: SweepFolder) -> None:
    """Submit what is left, undisturbed; then once more, which must start nothing."""
    for _ in range(5):
        wait_for_end(slurm, 400)
        wait_until(lambda: not any(map(is_claimed, runs_of(folder))), 60, "orphaned workers to leave")
        if not submit(submission(folder, REAL, runs_per_job=5, **PROFILE)):
            break
    assert all_done(folder)
    assert not slurm.run("squeue", "--noheader")


def running_tasks(slurm: SlurmCluster) -> list[str]:
    return sorted(name for name, job in slurm.jobs().items() if job.state == "RUNNING")


def job_id(slurm: SlurmCluster, task: str) -> str:
    return slurm.run("squeue", "--noheader", f"--jobs={task}", "--Format=JobID:").strip()
