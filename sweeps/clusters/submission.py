"""Submit what a sweep lacks to Slurm, through submitit: a handful of job arrays, longest runs first.

What has a result is not submitted, nor what is in flight: in a live task of an earlier submission, or being trained.
The confirmations, chosen once the grid is done, are an array of their own that waits for the grid's.
"""

import heapq
import math
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from harness.config import RunConfig
from harness.record import RunFolder, read_json
from sweeps.clusters import slurm
from sweeps.clusters.job import Job
from sweeps.clusters.profile import ClusterProfile
from sweeps.clusters.queue import QueuedJob, queue_lock, queued_jobs, remember
from sweeps.clusters.sbatch import Request, sbatch, script
from sweeps.clusters.snapshot import snapshot_folder, take_snapshot
from sweeps.launch import best_on_fresh_seeds, choose_confirmations, longest_first
from sweeps.pool import TRAIN
from sweeps.spec import SweepSpec
from sweeps.speed import Speed
from sweeps.states import is_tried_again
from sweeps.store import Stage, SweepFolder, is_claimed, is_missing
from sweeps.work import work_of

#: Jobs shorter than this cost more to queue and to start than to run: their runs are packed.
SHORTEST_JOB_SECONDS = 600.0

#: Of a run, by its run_id; none where the speed is not known.
Seconds = Mapping[str, float] | None


@dataclass(frozen=True)
class Submission:
    """A sweep on a cluster, and how its runs are put into jobs: `runs` are the grid, `confirm_runs` is how many come
    after it.
    """

    folder: SweepFolder
    spec: SweepSpec
    profile: ClusterProfile
    runs: Sequence[RunConfig]
    speed: Speed
    runs_per_job: int | None = None
    confirm_runs: int = 0
    train: str = TRAIN


@dataclass(frozen=True)
class Array:
    """One sbatch call: jobs that have their stage and their time limit in common, and the job ids they wait for."""

    stage: Stage
    jobs: tuple[Job, ...]
    minutes: int
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flight:
    """What Slurm has of a sweep: the runs that live tasks will train or are training, and the jobs of these tasks."""

    runs: frozenset[str]
    jobs: tuple[QueuedJob, ...]

    @property
    def grid(self) -> tuple[str, ...]:
        return tuple(job.job_id for job in self.jobs if job.stage == "grid")

    @property
    def unchosen(self) -> tuple[str, ...]:
        """The jobs that will choose the confirmations once they start."""
        return tuple(job.job_id for job in self.jobs if job.stage == "confirm" and not any(job.tasks))


def submit(submission: Submission) -> list[QueuedJob]:
    """Submit what is neither done nor in flight; return the jobs that are new. The sweep's folder is written before.

    Raises: ValueError when Slurm refuses, or does not say what it has in flight; the arrays before that are queued.
    """
    sweep = submission.folder.path
    with queue_lock(sweep):
        flight = in_flight(submission.folder)
        arrays = arrays_of(submission, flight)
        _withdraw_confirmations(arrays, flight)
        if any(job.run_ids for array in arrays if array.stage == "confirm" for job in array.jobs):
            choose_confirmations(submission.spec, submission.folder)
        code = take_snapshot(sweep) if arrays else sweep
        queued: list[QueuedJob] = []
        for array in arrays:
            grid = tuple(job.job_id for job in queued if job.stage == "grid")
            try:
                queued.append(_queue(submission, _after(array, grid), code))
            except ValueError as error:
                raise ValueError(f"{error}{_queued_before(queued, len(arrays))}") from None
    return queued


def scripts(submission: Submission) -> list[str]:
    """Return the sbatch scripts that `submit` would hand over; nothing is written."""
    code, arrays = snapshot_folder(submission.folder.path), arrays_of(submission, in_flight(submission.folder))
    grid = ("GRID",) if any(array.stage == "grid" for array in arrays) else ()  # its number is not known yet
    return [
        script(_request(submission, _after(array, grid), code), _job_folder(submission), len(array.jobs))
        for array in arrays
    ]


def arrays_of(submission: Submission, flight: Flight) -> list[Array]:
    """Return what has to be submitted: the missing runs of the grid, then the confirmations."""
    missing = _missing(submission, submission.runs)
    arrays = _arrays(submission, "grid", _free(submission, missing, flight))
    if submission.spec.confirm is None:
        return arrays
    if missing:
        return arrays + _confirmations_to_come(submission, arrays, flight)
    if flight.unchosen:
        return []
    confirmed = _missing(submission, best_on_fresh_seeds(submission.spec, submission.folder))
    return _arrays(submission, "confirm", _free(submission, confirmed, flight))


def in_flight(folder: SweepFolder) -> Flight:
    """Return what live tasks have, as Slurm says now.

    Raises: ValueError when Slurm does not answer.
    """
    answer = slurm.ask(folder.path, max_age_seconds=0.0)
    if answer.problem:
        raise ValueError(f"it is not known what is in flight, so nothing is submitted: {answer.problem}")
    runs: set[str] = set()
    live = []
    for job in queued_jobs(folder.path):
        tasks = [run_ids for task, run_ids in zip(job.task_ids, job.tasks, strict=True) if answer.is_live(task)]
        runs.update(run_id for run_ids in tasks for run_id in run_ids if not _is_past(job, folder.run(run_id)))
        live += [job] if tasks else []
    return Flight(frozenset(runs), tuple(live))


def _is_past(job: QueuedJob, run: RunFolder) -> bool:
    """Say whether a live job has had a run that failed, so that it does not try it again."""
    try:
        return not is_tried_again(read_json(run.failure).get("failed_at"), job.submitted_at)
    except (FileNotFoundError, ValueError):
        return False


def packed(run_ids: Sequence[str], seconds: Seconds, runs_per_job: int | None) -> list[tuple[str, ...]]:
    """Deal the runs, longest first, to jobs: each to the job with the least to do so far.

    `runs_per_job` bounds how many one gets; without it, jobs are as many as last `SHORTEST_JOB_SECONDS` on average, or
    one for each run where `seconds` are not known.
    """
    if not run_ids:
        return []
    if runs_per_job is None and seconds is not None:
        total = sum(seconds[run_id] for run_id in run_ids)
        jobs = min(max(int(total / SHORTEST_JOB_SECONDS), 1), len(run_ids))
    else:
        jobs = math.ceil(len(run_ids) / (runs_per_job or 1))
    packs: list[list[str]] = [[] for _ in range(jobs)]
    loads = [(0.0, number) for number in range(jobs)]
    for run_id in run_ids:
        load, number = heapq.heappop(loads)
        packs[number].append(run_id)
        if runs_per_job is None or len(packs[number]) < runs_per_job:
            heapq.heappush(loads, (load + (seconds[run_id] if seconds else 1.0), number))
    return [tuple(pack) for pack in packs]


def time_limit_minutes(profile: ClusterProfile, seconds: float | None) -> int:
    """Return the minutes to ask for, for a job whose runs should take `seconds`; the cluster's most if not known."""
    if seconds is None:
        return profile.max_minutes
    minutes = profile.safety * seconds / 60 + profile.startup_minutes + profile.signal_seconds / 60
    return min(math.ceil(minutes), profile.max_minutes)


def _arrays(submission: Submission, stage: Stage, runs: Sequence[RunConfig]) -> list[Array]:
    seconds = _seconds(submission, runs)
    packs = packed([run.run_id for run in runs], seconds, submission.runs_per_job)
    jobs = [_job(submission, run_ids=pack) for pack in packs]
    longest = max((sum(seconds[run_id] for run_id in pack) for pack in packs), default=0.0) if seconds else None
    return _split(submission, stage, jobs, longest)


def _confirmations_to_come(submission: Submission, grid: list[Array], flight: Flight) -> list[Array]:
    """Return the confirmations of a grid that is not done: they wait for what is in flight of it, and for `grid`."""
    wait_for_something_new = grid or (flight.grid and not flight.unchosen)
    if not wait_for_something_new:
        return []
    seconds = _seconds(submission, submission.runs)
    longest = max(seconds.values()) if seconds else None
    per_job = submission.runs_per_job or (max(int(SHORTEST_JOB_SECONDS / longest), 1) if longest else 1)
    jobs = math.ceil(submission.confirm_runs / per_job)
    shares = [_job(submission, share=(number, jobs)) for number in range(jobs)]
    arrays = _split(submission, "confirm", shares, longest * per_job if longest else None)
    return [replace(array, after=flight.grid) for array in arrays]


def _withdraw_confirmations(arrays: Iterable[Array], flight: Flight) -> None:
    """Cancel confirmations that have not been chosen yet, where those of `arrays` wait for more than they do."""
    if flight.unchosen and any(array.stage == "confirm" for array in arrays):
        slurm.command("scancel", *flight.unchosen)


def _after(array: Array, grid: tuple[str, ...]) -> Array:
    """Let confirmations wait for the grid's jobs too."""
    return replace(array, after=array.after + grid) if array.stage == "confirm" else array


def _split(submission: Submission, stage: Stage, jobs: Sequence[Job], seconds: float | None) -> list[Array]:
    size, minutes = submission.profile.max_array_size, time_limit_minutes(submission.profile, seconds)
    return [Array(stage, tuple(jobs[first : first + size]), minutes) for first in range(0, len(jobs), size)]


def _job(submission: Submission, run_ids: tuple[str, ...] = (), share: tuple[int, int] | None = None) -> Job:
    profile = submission.profile
    return Job(
        str(submission.folder.path.absolute()),
        run_ids,
        share,
        threads=profile.cpus_per_device,
        max_requeues=profile.max_requeues if profile.requeue else 0,
        train=submission.train,
    )


def _missing(submission: Submission, runs: Iterable[RunConfig]) -> list[RunConfig]:
    """Return the runs without a result, longest first."""
    missing = [run for run in runs if is_missing(submission.folder.run(run.run_id))]
    return longest_first(missing, submission.spec.machine)


def _free(submission: Submission, runs: Iterable[RunConfig], flight: Flight) -> list[RunConfig]:
    """Return the runs that no task has, and that nobody else trains now."""
    folder = submission.folder
    return [run for run in runs if run.run_id not in flight.runs and not is_claimed(folder.run(run.run_id))]


def _seconds(submission: Submission, runs: Iterable[RunConfig]) -> dict[str, float] | None:
    """Return how long each run should take at most; none where that is not known of all."""
    seconds = {run.run_id: submission.speed.seconds(work_of(run, submission.spec.machine)) for run in runs}
    known = {run_id: each for run_id, each in seconds.items() if each is not None}
    return known if len(known) == len(seconds) else None


def _request(submission: Submission, array: Array, code: Path) -> Request:
    spec = submission.spec
    return Request(submission.profile, f"critbatch-{spec.name}", array.minutes, code, spec.machine.devices, array.after)


def _queue(submission: Submission, array: Array, code: Path) -> QueuedJob:
    """Submit one array and remember it, whatever signal comes; what cannot be remembered is cancelled."""
    cluster = slurm.cluster_name()
    with _held_signals():
        job_id = sbatch(_request(submission, array, code), _job_folder(submission), array.jobs)
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


def _queued(submission: Submission, array: Array, job_id: str, cluster: str | None) -> QueuedJob:
    return QueuedJob(
        cluster=submission.profile.name,
        kind="slurm",
        job_id=job_id,
        submitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        minutes=array.minutes,
        stage=array.stage,
        tasks=tuple(job.run_ids for job in array.jobs),
        slurm_cluster=cluster,
    )


def _job_folder(submission: Submission) -> Path:
    return submission.folder.path.absolute() / "jobs"
