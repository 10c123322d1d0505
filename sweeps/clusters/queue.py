"""What was submitted of a sweep: one file for each job array, `queue/<job_id>.json` in the sweep's folder.

Takes the sweep's folder as a path and knows nothing else of sweeps, so that `sweeps.store` can read it.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from harness.frozen import Frozen
from harness.record import read_json, write_json


class QueuedJob(Frozen):
    """A job array as it was submitted: task i trains the runs `tasks[i]`, in that order.

    The runs of the stage `confirm` are chosen only when its first task starts: till then its tasks are empty. Arrays
    that share one `choice` are filled together.
    `slurm_cluster` is the ClusterName of the Slurm that has the job, where it is known.
    """

    cluster: str
    kind: Literal["slurm", "local"]
    job_id: str
    submitted_at: str
    minutes: int
    stage: Literal["grid", "confirm"]
    tasks: tuple[tuple[str, ...], ...]
    slurm_cluster: str | None = None
    choice: str | None = None

    @property
    def task_ids(self) -> list[str]:
        """What Slurm calls the tasks; a job of one task is no array."""
        return [self.job_id] if len(self.tasks) == 1 else [f"{self.job_id}_{task}" for task in range(len(self.tasks))]


def queue_folder(sweep: Path) -> Path:
    return sweep / "queue"


def queued_jobs(sweep: Path) -> list[QueuedJob]:
    """Return everything that was submitted and not forgotten since, oldest first."""
    paths = sorted(queue_folder(sweep).glob("[0-9]*.json"), key=lambda path: int(path.stem))
    jobs = []
    for path in paths:
        with suppress(FileNotFoundError):  # forgotten meanwhile
            jobs.append(QueuedJob.parse(read_json(path), source=str(path)))
    return jobs


def remember(job: QueuedJob, sweep: Path) -> None:
    """Write down that a job was submitted."""
    queue_folder(sweep).mkdir(exist_ok=True)
    write_json(_path(job, sweep), job.model_dump(mode="json"))


def forget(job: QueuedJob, sweep: Path) -> None:
    """Remove a job of which nothing is left to tell."""
    _path(job, sweep).unlink(missing_ok=True)


@contextmanager
def queue_lock(sweep: Path, name: str = ".lock") -> Iterator[None]:
    """Hold the queue: whoever submits has read what is in flight, and nobody adds to it meanwhile."""
    queue_folder(sweep).mkdir(parents=True, exist_ok=True)
    with (queue_folder(sweep) / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _path(job: QueuedJob, sweep: Path) -> Path:
    return queue_folder(sweep) / f"{job.job_id}.json"
