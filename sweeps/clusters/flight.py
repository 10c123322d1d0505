"""What a cluster has of a sweep at this moment."""

from dataclasses import dataclass

from harness.record import RunFolder, read_json
from sweeps.clusters import slurm
from sweeps.clusters.queue import QueuedJob, queued_jobs
from sweeps.states import is_tried_again
from sweeps.store import SweepFolder


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
