"""What one task of a job array does: train its runs, and be taken up again when Slurm stops it.

The runs are trained by a worker process, one after the other: what kills the worker kills neither the other runs nor
the job. SIGUSR2 comes before the time limit and before a preemption: the run in hand saves its checkpoint, then the job
is requeued, once. A bare SIGTERM is the end of a cancelled job, or the notice of a preemption, after which Slurm itself
requeues: the run saves its checkpoint, and the job waits for whichever it is. A job that starts again, whoever requeued
it, skips what has results and goes on from the checkpoints.
"""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from harness import STOPPED
from harness.origin import job_id
from harness.record import RunFolder, read_json
from sweeps.branches import branch_of, hold_of
from sweeps.clusters.shares import Share, runs_of
from sweeps.clusters.stops import Stop, forget_stop, write_stop
from sweeps.confirmations import partly_chosen
from sweeps.distributed import LAUNCHER, is_of_a_lost_connection
from sweeps.pool import TRAIN, Pool
from sweeps.printing import counted
from sweeps.store import SweepFolder, is_missing

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

#: How long a job that got SIGTERM alone waits to be ended, before it concludes that nobody means to.
ENDED_WITHIN_SECONDS = 300.0

_TRIES = 5
#: What scontrol says of a job that something else has requeued already.
_ALREADY_REQUEUED = ("pending", "already completing", "being requeued")


@dataclass(frozen=True)
class Job:
    """A task of a job array, as it is pickled: plain values only.

    It trains `run_ids`, or a share of the sweep's confirmations. A signal that comes `notice_seconds` after its start
    or later is that of the time limit.
    """

    sweep: str
    run_ids: tuple[str, ...] = ()
    share: Share | None = None
    threads: int = 1
    max_requeues: int = 0
    notice_seconds: float = math.inf
    train: str = TRAIN

    def __call__(self) -> str:
        """Train what is missing. Raises: RuntimeError when a run has failed; SystemExit when the job is requeued."""
        started, signals = time.monotonic(), Signals()
        forget_stop(Path(self.sweep), job_id() or "")
        runs = [run for run in self._runs() if not _failed_in_this_job(run)]
        try:
            self._train(runs, signals)
        except KeyboardInterrupt:
            _say(f"{signals.in_words} received")
            if any(is_missing(run) and not _failed_in_this_job(run) for run in runs):
                self._start_again(signals, time.monotonic() - started)
        failed = [run for run in runs if is_missing(run)]
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {counted(len(runs), 'run')} failed: {', '.join(map(_failed_in_words, failed))}"
            )
        return f"{counted(len(runs), 'run')} trained"

    def checkpoint(self) -> "DelayedSubmission":
        """Return the job as it is: submitit asks for this method; all state is in the folders of the runs."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _runs(self) -> list[RunFolder]:
        folder = SweepFolder(Path(self.sweep))
        if self.share is None:
            return [folder.run(run_id) for run_id in self.run_ids]
        chosen = runs_of(self.share, folder)
        for line in partly_chosen(folder):
            _say(line)
        return [folder.run(run_id) for run_id in chosen]

    def _train(self, runs: Iterable[RunFolder], signals: "Signals") -> None:
        launcher = f"{shlex.quote(sys.executable)} -m sweeps.clusters.ranks"
        # Threads of runs whose machine.json names none; which GPUs, Slurm has said already.
        environment = {"OMP_NUM_THREADS": str(self.threads), LAUNCHER: launcher}
        with Pool([environment], self.train, died=_say_died) as pool:
            signals.listen()  # the pool has its own, for a person at a keyboard
            pool.train(runs, tick=signals.raise_if_any)

    def _start_again(self, signals: "Signals", after_seconds: float) -> None:
        """Requeue this job and leave; or wait for its end, when that is what was announced."""
        if signal.SIGUSR2 not in signals.caught:
            _say("every run in hand is saved; waiting for Slurm to end or requeue this job")
            signals.wait(signal.SIGUSR2, ENDED_WITHIN_SECONDS)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if restarts >= self.max_requeues:
            self._give_up(restarts, signal.SIGUSR2 in signals.caught and after_seconds >= self.notice_seconds)
        requeue(os.environ["SLURM_JOB_ID"])
        _say("requeued")
        sys.exit(STOPPED)

    def _give_up(self, restarts: int, is_time_limit: bool) -> NoReturn:
        """Write down why the job's runs have no result, and fail."""
        cause = "reached its time limit" if is_time_limit else "was stopped by Slurm"
        after = f" after {counted(restarts, 'restart')}" if restarts else ""
        reason = (
            f"job {job_id()} {cause}{after} and is not requeued (max_requeues {self.max_requeues} of the cluster's "
            f"profile, or requeue: false); critbatch submit goes on from the checkpoints"
        )
        write_stop(Stop(reason=reason, is_time_limit=is_time_limit), Path(self.sweep), job_id() or "")
        raise RuntimeError(reason)


class Signals:
    """The signals that stop a job, remembered and acted on by `raise_if_any`: handlers themselves only take note."""

    def __init__(self) -> None:
        self.caught: set[int] = set()
        self.listen()

    @property
    def in_words(self) -> str:
        return " and ".join(sorted(signal.Signals(number).name for number in self.caught))

    def listen(self) -> None:
        """Take the signals over, from submitit or from the pool."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._remember)

    def raise_if_any(self) -> None:
        if self.caught:
            raise KeyboardInterrupt

    def wait(self, number: int, seconds: float) -> None:
        """Return when a signal has come, or after `seconds`."""
        end = time.monotonic() + seconds
        while number not in self.caught and time.monotonic() < end:
            time.sleep(0.5)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.caught.add(number)


def notice_seconds(minutes: int, signal_seconds: int) -> float:
    """Return how long after its start a job gets the signal of its time limit, at the earliest: Slurm may send it a
    minute early, and the job starts to count up to half a minute late.
    """
    return max(60.0 * minutes - signal_seconds - 90.0, 0.0)


def requeue(slurm_job_id: str) -> None:
    """Have Slurm run this job again. Raises: RuntimeError when it refuses.

    Slurm ends the job while it is being asked to, so that scontrol must outlive SIGTERM.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for attempt in range(1, _TRIES + 1):
        asked = subprocess.run(
            ["scontrol", "requeue", slurm_job_id], capture_output=True, text=True, check=False, start_new_session=True
        )
        said = f"{asked.stdout} {asked.stderr}".strip()
        if asked.returncode == 0 or any(words in said for words in _ALREADY_REQUEUED):
            return
        time.sleep(attempt)
    raise RuntimeError(f"scontrol did not requeue job {slurm_job_id}: {said}")


def _failed_in_this_job(run: RunFolder) -> bool:
    """Say whether the run failed before a requeue of this very job: it would again, unless it merely lost a process, as
    when a node dies: then the job is requeued before anybody settles that.
    """
    if not run.failure.exists():
        return False
    try:
        failure = read_json(run.failure)
    except ValueError:
        return False
    in_this_job = job_id() is not None and failure.get("job_id") == job_id()
    return in_this_job and not is_of_a_lost_connection(str(failure.get("reason")))


def _failed_in_words(run: RunFolder) -> str:
    """Return the run's name, with what keeps it from starting if it is a branch."""
    hold = hold_of(run, branch_of(run))
    return f"{run.path.name} ({hold.words})" if hold else run.path.name


def _say_died(run: RunFolder, cause: str) -> None:
    _say(f"the worker of {run.path.name} died {cause}; another one takes the run up")


def _say(words: str) -> None:
    print(f"critbatch {time.strftime('%H:%M:%S')}: {words}", flush=True)
