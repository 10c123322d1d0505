"""Why a job gave up: it writes that down itself, as Slurm knows no more than that it has failed.

The file lies with the job's logs, and is removed with them.
"""

from pathlib import Path

from harness.frozen import Frozen
from harness.record import read_json, write_json


class Stop(Frozen):
    """Slurm has stopped the job, and it is not requeued: at its time limit, or for something else."""

    reason: str
    is_time_limit: bool


def write_stop(stop: Stop, sweep: Path, task_id: str) -> None:
    """Write down why a task of the sweep gave up."""
    _path(sweep, task_id).parent.mkdir(exist_ok=True)
    write_json(_path(sweep, task_id), stop.model_dump(mode="json"))


def read_stop(sweep: Path, task_id: str) -> Stop | None:
    """Return why a task gave up; none where it did not, or could not write."""
    path = _path(sweep, task_id)
    try:
        return Stop.parse(read_json(path), source=str(path))
    except (OSError, ValueError):
        return None


def forget_stop(sweep: Path, task_id: str) -> None:
    """Remove what an earlier start of a task has written: somebody has requeued it."""
    _path(sweep, task_id).unlink(missing_ok=True)


def _path(sweep: Path, task_id: str) -> Path:
    return sweep / "jobs" / f"{task_id}_stop.json"
