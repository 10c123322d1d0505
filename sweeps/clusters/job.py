"""What one task of a job array does: train its runs, and be taken up again when Slurm stops it.

The runs are trained by a worker process, one after the other: what kills the worker kills neither the other runs nor
the job. SIGUSR2 comes before the time limit and before a preemption: the run in hand saves its checkpoint, then the job
is requeued, once. A bare SIGTERM is the end of a cancelled job, or the notice of a preemption, after which Slurm itself
requeues: the run saves its checkpoint, and the job waits for whichever it is. A job that starts again, whoever requeued
it, skips what has results and goes on from the checkpoints.
"""

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
from typing import TYPE_CHECKING

from harness import STOPPED
from harness.origin import job_id
from harness.record import RunFolder, read_json
from sweeps.clusters.queue import queue_lock, queued_jobs, remember
from sweeps.distributed import LAUNCHER
from sweeps.launch import choose_confirmations, longest_first
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

    It trains `run_ids`; or, where `share` is (number, of), that share of the sweep's confirmations, which it chooses if
    they are not chosen yet.
    """

    sweep: str
    run_ids: tuple[str, ...] = ()
    share: tuple[int, int] | None = None
    threads: int = 1
    max_requeues: int = 0
    train: str = TRAIN

    def __call__(self) -> str:
        """Train what is missing. Raises: RuntimeError when a run has failed; SystemExit when the job is requeued."""
        signals = Signals()
        runs = [run for run in self._runs() if not _failed_in_this_job(run)]
        try:
            self._train(runs, signals)
        except KeyboardInterrupt:
            if any(is_missing(run) and not _failed_in_this_job(run) for run in runs):
                self._start_again(signals)
        failed = [run.path.name for run in runs if is_missing(run)]
        if failed:
            raise RuntimeError(f"{len(failed)} of {counted(len(runs), 'run')} failed: {', '.join(failed)}")
        return f"{counted(len(runs), 'run')} trained"

    def checkpoint(self) -> "DelayedSubmission":
        """Return the job as it is: submitit asks for this method; all state is in the folders of the runs."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _runs(self) -> list[RunFolder]:
        folder = SweepFolder(Path(self.sweep))
        if self.share is None:
            return [folder.run(run_id) for run_id in self.run_ids]
        number, of = self.share
        spec = folder.read_spec()
        chosen = [run.run_id for run in longest_first(choose_confirmations(spec, folder), spec.machine)]
        shares = tuple(tuple(chosen[each::of]) for each in range(of))
        _remember_shares(shares, number, folder.path)
        return [folder.run(run_id) for run_id in shares[number]]

    def _train(self, runs: Iterable[RunFolder], signals: "Signals") -> None:
        threads = SweepFolder(Path(self.sweep)).read_spec().machine.threads or self.threads
        launcher = f"{shlex.quote(sys.executable)} -m sweeps.clusters.ranks"
        environment = {"OMP_NUM_THREADS": str(threads), LAUNCHER: launcher}  # which GPUs, Slurm has said already
        with Pool([environment], self.train, died=_say_died) as pool:
            signals.listen()  # the pool has its own, for a person at a keyboard
            pool.train(runs, tick=signals.raise_if_any)

    def _start_again(self, signals: "Signals") -> None:
        """Requeue this job and leave; or wait for its end, when that is what was announced."""
        if signal.SIGUSR2 not in signals.caught:
            _say("stopped by SIGTERM; every run in hand is saved; waiting for Slurm to end or requeue this job")
            signals.wait(signal.SIGUSR2, ENDED_WITHIN_SECONDS)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if restarts >= self.max_requeues:
            raise RuntimeError(
                f"stopped by Slurm after {counted(restarts, 'restart')}, no more are allowed (max_requeues "
                f"{self.max_requeues} of the cluster's profile); critbatch submit goes on from the checkpoints"
            )
        requeue(os.environ["SLURM_JOB_ID"])
        _say("requeued")
        sys.exit(STOPPED)


class Signals:
    """The signals that stop a job, remembered and acted on by `raise_if_any`: handlers themselves only take note."""

    def __init__(self) -> None:
        self.caught: set[int] = set()
        self.listen()

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
        _say(f"{signal.Signals(number).name} received")


def _remember_shares(shares: tuple[tuple[str, ...], ...], own: int, sweep: Path) -> None:
    """Write down which task of this array has which runs, for their states; all its tasks write the same."""
    array, _, task = (job_id() or "").partition("_")
    first = own - int(task or 0)
    with queue_lock(sweep):
        for job in queued_jobs(sweep):
            if job.job_id == array:
                remember(job.model_copy(update={"tasks": shares[first : first + len(job.tasks)]}), sweep)


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
    """Say whether the run failed before a requeue of this very job: it would again."""
    if not run.failure.exists():
        return False
    try:
        return job_id() is not None and read_json(run.failure).get("job_id") == job_id()
    except ValueError:
        return False


def _say_died(run: RunFolder, cause: str) -> None:
    _say(f"the worker of {run.path.name} died {cause}; another one takes the run up")


def _say(words: str) -> None:
    print(f"critbatch {time.strftime('%H:%M:%S')}: {words}", flush=True)
