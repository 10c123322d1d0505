"""Where to read why a run failed: in its own log, and in that of the job that it was given to."""

from pathlib import Path

from sweeps.store import State, SweepFolder

#: What somebody looks for a reason for. A run is lost when its job died before the run, or without a word.
FAILED = (State.FAILED, State.LOST)


def job_log(task_id: str, folder: SweepFolder) -> Path:
    """Return what a Slurm job prints into: the reason for whatever happens before, between and after its runs."""
    return folder.path / "jobs" / f"{task_id}_0_log.out"


def last_lines(log: Path, count: int) -> str:
    """Return how a log ends, or that there is none."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else ["there is no log"]
    return "\n".join(lines[-count:])
