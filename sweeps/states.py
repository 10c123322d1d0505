"""Where a run stands beyond what its files say: what was queued of it, and what Slurm says of that.

Files come first: a result, a claim and a failure need no asking. Slurm is asked only about a sweep that has something
in its queue folder, and then at most once in 30 s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sweeps.clusters.local import local_jobs
from sweeps.clusters.queue import QueuedJob, queued_jobs
from sweeps.clusters.slurm import Answer, Task, ask
from sweeps.store import RESULTS, State

_ENDED_AS = {
    "TIMEOUT": State.TIMED_OUT,
    "DEADLINE": State.TIMED_OUT,
    "CANCELLED": State.CANCELLED,
    "REVOKED": State.CANCELLED,
}


@dataclass(frozen=True)
class QueuedRun:
    """The task of a job array that a run was given to last; `task` is None while Slurm has not answered yet."""

    task_id: str
    submitted_at: str
    minutes: int
    task: Task | None

    @property
    def is_live(self) -> bool:
        return self.task is None or self.task.is_live

    @property
    def node(self) -> str | None:
        return (self.task and self.task.node) or None


@dataclass(frozen=True)
class Queue:
    """The queued runs of a sweep by their run_id, and why Slurm did not answer where it did not.

    `chooser` is the task that is to choose the confirmations, or should have: they have no run_id yet.
    """

    runs: Mapping[str, QueuedRun] = field(default_factory=dict)
    problem: str | None = None
    chooser: QueuedRun | None = None


def read_queue(sweep: Path) -> Queue:
    """Return what was queued of a sweep; of a run that was queued repeatedly, its live task, else its last one."""
    jobs = [job for job in queued_jobs(sweep) if job.kind == "slurm"]
    runs = _queued_here(sweep)
    if not jobs:
        return Queue(runs)
    answer = ask(sweep)
    for job in jobs:
        for queued, run_ids in zip(_tasks(job, answer), job.tasks, strict=True):
            runs.update((run_id, queued) for run_id in run_ids if _is_newer(queued, runs.get(run_id)))
    return Queue(runs, answer.problem, _chooser(jobs, answer))


def queued_state(files: State, queued: QueuedRun, failed_at: str | None = None, trained_by: str | None = None) -> State:
    """Return where a run stands that was queued; `files` is what its files say.

    `failed_at` is when it failed, if it did and that is known; `trained_by` the job that started it last, if any. Of
    the runs of a job that Slurm killed for memory, those fail that it had started.
    """
    if files in RESULTS or files == State.RUNNING:
        return files
    if files == State.FAILED and not (queued.is_live and is_tried_again(failed_at, queued.submitted_at)):
        return files
    if queued.is_live:
        return State.REQUEUED if files == State.INTERRUPTED else State.QUEUED
    assert queued.task is not None
    if queued.task.state == "OUT_OF_MEMORY" and trained_by == queued.task_id:
        return State.FAILED
    if queued.task.state == "PREEMPTED":  # by a cluster that does not requeue
        return files
    return _ENDED_AS.get(queued.task.state, State.LOST)


def is_tried_again(failed_at: str | None, submitted_at: str) -> bool:
    """Say whether a job is to try a run that has failed again: it was submitted since; a job goes past its own
    failures.
    """
    return failed_at is not None and failed_at <= submitted_at


def queued_reason(queued: QueuedRun) -> str | None:
    """Say in words why Slurm does not run a run: what it waits for, or how its job ended."""
    name, task = f"job {queued.task_id}", queued.task
    if task is None:
        return "Slurm has not answered yet"
    if task.is_live:
        return task.reason or None
    if task.state == "UNKNOWN":
        return f"Slurm no longer knows {name}, and there is no result"
    if _ENDED_AS.get(task.state) == State.TIMED_OUT:
        return f"{name} reached its limit of {queued.minutes} minutes"
    if task.state == "PREEMPTED":
        return f"{name} was preempted and is not requeued; critbatch submit goes on"
    words = task.state.lower().replace("_", " ")
    return f"{name} ended as {words}, without a result; it says why in jobs/{queued.task_id}_0_log.out"


def _queued_here(sweep: Path) -> dict[str, QueuedRun]:
    """Return the runs that jobs on this machine share."""
    waits = Task("PENDING", reason="a job on this machine trains it in its turn")
    return {
        run_id: QueuedRun(name, job.submitted_at, minutes=0, task=waits)
        for name, job in local_jobs(sweep).items()
        for run_id in job.run_ids
    }


def _tasks(job: QueuedJob, answer: Answer) -> list[QueuedRun]:
    return [QueuedRun(task, job.submitted_at, job.minutes, answer.tasks.get(task)) for task in job.task_ids]


def _chooser(jobs: Sequence[QueuedJob], answer: Answer) -> QueuedRun | None:
    """Return a task of the last job for confirmations, unless it has chosen them: one that is live, if there is any."""
    job = next((job for job in reversed(jobs) if job.stage == "confirm"), None)
    if job is None or any(job.tasks):
        return None
    tasks = _tasks(job, answer)
    return next((task for task in tasks if task.is_live), tasks[-1])


def _is_newer(queued: QueuedRun, before: QueuedRun | None) -> bool:
    return before is None or queued.is_live or not before.is_live
