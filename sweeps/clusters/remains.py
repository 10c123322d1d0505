"""What Slurm's jobs leave in a sweep's folder, and what of it nobody needs any more.

Of a job there are a file in `queue/`, and pickles, logs and a script in `jobs/`, whose names begin with its number.
"""

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sweeps.clusters import slurm
from sweeps.clusters.queue import QueuedJob, forget, queue_lock, queued_jobs
from sweeps.store import SweepFolder, is_missing

#: For so long, a file without a number may be of a submission that is being made.
_SUBMITTING_SECONDS = 60.0


@dataclass(frozen=True)
class Remains:
    """Jobs that are over and tell nothing any more, and the files in `jobs/` that no other job needs; `problem` is why
    Slurm did not say which these are.
    """

    jobs: tuple[QueuedJob, ...] = ()
    files: tuple[Path, ...] = ()
    problem: str | None = None


def find_remains(folder: SweepFolder) -> Remains:
    """Find what is left of jobs that have ended, but for those that say why a run of the sweep has no result, or why
    its confirmations are not chosen.

    A job that Slurm does not know has ended too when all its runs have results: it would have nothing to do.
    """
    queued, answer = queued_jobs(folder.path), slurm.ask(folder.path)
    if answer.problem:
        return Remains(problem=answer.problem)
    listed = folder.read_manifest().runs
    missing = [run.run_id for run in listed if is_missing(folder.run(run.run_id))]
    last = {run_id: job.job_id for job in queued for run_ids in job.tasks for run_id in run_ids}
    needed = {last[run_id] for run_id in missing if run_id in last}
    needed |= {job.job_id for job in queued if any(map(answer.is_live, job.task_ids))}
    if not any(run.stage == "confirm" for run in listed):
        needed |= {job.job_id for job in queued if job.stage == "confirm"}
    spent = tuple(job for job in queued if job.job_id not in needed)
    files = sorted((folder.path / "jobs").glob("*"))
    if missing:  # a number that was never queued may be of a job that trains on this machine
        needed |= {job_id for path in files if (job_id := _job_id(path))} - {job.job_id for job in spent}
    return Remains(spent, tuple(path for path in files if _job_id(path) not in needed and not _is_new(path)))


def remove_remains(folder: SweepFolder) -> Remains:
    """Remove what `find_remains` finds, while nobody submits; return it."""
    if not any((folder.path / place).exists() for place in ("queue", "jobs")):
        return Remains()
    with queue_lock(folder.path):
        remains = find_remains(folder)
        for path in remains.files:
            with suppress(FileNotFoundError):
                path.unlink()
        for job in remains.jobs:
            forget(job, folder.path)
    return remains


def _job_id(path: Path) -> str | None:
    """Return the number that the name of a file, or of what a link leads to, begins with; none of one that a refused
    submission left.
    """
    number = re.match(r"\d+(?=_)", path.resolve().name)
    return number[0] if number else None


def _is_new(path: Path) -> bool:
    """Say whether a file may still be given its number, or has just been."""
    try:
        return _job_id(path) is None and time.time() - path.stat().st_mtime < _SUBMITTING_SECONDS
    except FileNotFoundError:
        return True
