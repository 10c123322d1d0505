"""Submit what a sweep lacks to Slurm, through submitit: a handful of job arrays, longest runs first.

What has a result is not submitted, nor what is in flight: in a live task of an earlier submission, or being trained.
Branches wait for the arrays of their trunks; the confirmations, chosen once the grid is done, for all arrays of the
grid.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sweeps.clusters import slurm
from sweeps.clusters.arrays import Array, Submission, arrays_of
from sweeps.clusters.flight import Flight, in_flight
from sweeps.clusters.queue import QueuedJob, queue_lock, remember
from sweeps.clusters.sbatch import Request, sbatch, script
from sweeps.clusters.snapshot import snapshot_folder, take_snapshot
from sweeps.confirmations import best_on_fresh_seeds, choose_confirmations


def submit(submission: Submission) -> list[QueuedJob]:
    """Submit what is neither done nor in flight; return the jobs that are new. The sweep's folder is written before.

    Raises: ValueError when Slurm refuses, or does not say what it has in flight; the arrays before that are queued.
    """
    sweep = submission.folder.path
    with queue_lock(sweep):
        flight = in_flight(submission.folder)
        arrays = arrays_of(submission, flight, choose_confirmations)
        _withdraw_confirmations(arrays, flight)
        code = take_snapshot(sweep) if arrays else sweep
        queued: list[QueuedJob] = []
        for array in arrays:
            after = _after(array, (*flight.jobs, *queued))
            try:
                queued.append(_queue(submission, array, after, code))
            except ValueError as error:
                raise ValueError(f"{error}{_queued_before(queued, len(arrays))}") from None
    return queued


def scripts(submission: Submission) -> list[str]:
    """Return the sbatch scripts that `submit` would hand over, each behind a line about its array; nothing is written.

    What is not known yet is named: an array that others wait for is `ARRAY1`, `ARRAY2`.
    """
    code, flight = snapshot_folder(submission.folder.path), in_flight(submission.folder)
    queued: list[QueuedJob] = []
    printed = []
    for number, array in enumerate(arrays_of(submission, flight, best_on_fresh_seeds), start=1):
        request = _request(submission, array, _after(array, (*flight.jobs, *queued)), code)
        heading = f"# ARRAY{number}: {array.in_words}\n"
        printed.append(heading + script(request, _job_folder(submission), len(array.jobs)))
        queued.append(_queued(submission, array, f"ARRAY{number}", None))
    return printed


def _after(array: Array, jobs: Iterable[QueuedJob]) -> tuple[str, ...]:
    """Return the jobs that an array waits for: all of the grid, or those that have the trunks of its branches."""
    if array.stage == "confirm":
        return tuple(job.job_id for job in jobs if job.stage == "grid") if array.waits_for_the_grid else ()
    return tuple(job.job_id for job in jobs if any(not array.trunks.isdisjoint(task) for task in job.tasks))


def _withdraw_confirmations(arrays: Iterable[Array], flight: Flight) -> None:
    """Cancel confirmations that have not been chosen yet, where those of `arrays` wait for more than they do."""
    if flight.unchosen and any(array.stage == "confirm" for array in arrays):
        slurm.command("scancel", *flight.unchosen)


def _queue(submission: Submission, array: Array, after: tuple[str, ...], code: Path) -> QueuedJob:
    """Submit one array and remember it, whatever signal comes; what cannot be remembered is cancelled."""
    cluster = slurm.cluster_name()
    with _held_signals():
        job_id = sbatch(_request(submission, array, after, code), _job_folder(submission), array.jobs)
        try:
            job = _queued(submission, array, job_id, cluster)
            remember(job, submission.folder.path)
        except BaseException:
            slurm.command("scancel", job_id)
            raise
    return job


@contextmanager
def _held_signals() -> Iterator[None]:
    """Hold SIGINT and SIGTERM, from the commands that are started meanwhile too; what came is delivered at the end."""
    numbers, came = (signal.SIGINT, signal.SIGTERM), list[int]()
    before = {number: signal.signal(number, lambda received, _: came.append(received)) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # a handler is not inherited by a command, this is
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for received in came:
            signal.raise_signal(received)


def _queued_before(queued: Sequence[QueuedJob], arrays: int) -> str:
    """Say which of a submission's arrays Slurm has already; nothing where it has none."""
    if not queued:
        return ""
    return f"; {len(queued)} of {arrays} arrays are queued already: {', '.join(job.job_id for job in queued)}"


def _request(submission: Submission, array: Array, after: tuple[str, ...], code: Path) -> Request:
    name = f"critbatch-{submission.spec.name}"
    return Request(submission.profile, name, array.minutes, code, array.devices, after)


def _queued(submission: Submission, array: Array, job_id: str, cluster: str | None) -> QueuedJob:
    share = array.jobs[0].share
    return QueuedJob(
        cluster=submission.profile.name,
        kind="slurm",
        job_id=job_id,
        submitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        minutes=array.minutes,
        stage=array.stage,
        tasks=tuple(job.run_ids for job in array.jobs),
        slurm_cluster=cluster,
        choice=share.choice if share else None,
    )


def _job_folder(submission: Submission) -> Path:
    return submission.folder.path.absolute() / "jobs"
