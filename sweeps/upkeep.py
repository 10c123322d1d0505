"""What is done to a sweep that was started, other than training: stop it, let failures be tried again, make room."""

import os
import shutil
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.origin import host_name
from harness.record import RunFolder
from sweeps.branches import needed_states
from sweeps.clusters import slurm
from sweeps.clusters.local import local_processes
from sweeps.clusters.queue import QueuedJob, queue_lock, queued_jobs
from sweeps.run_status import read_run_status
from sweeps.states import Queue, read_queue
from sweeps.store import (
    State,
    SweepFolder,
    claim,
    holder,
    is_claimed,
    is_missing,
    remove_broken_record,
    result_state,
)


def forget_failures(folder: SweepFolder, queue: Queue) -> list[str]:
    """Make the failed runs planned or interrupted again; return them, with those that Slurm killed for memory.

    Those of a job that is still live are left: it is past them, and `critbatch submit` queues them anew as they are.
    """
    forgotten = []
    for planned in folder.read_manifest().runs:
        run, queued = folder.run(planned.run_id), queue.runs.get(planned.run_id)
        has_failed = is_missing(run) and read_run_status(run, planned, queue).state == State.FAILED
        if not has_failed or (queued and queued.is_live):
            continue
        with claim(run) as held:
            if held is not None:
                run.failure.unlink(missing_ok=True)
                remove_broken_record(run)
                forgotten.append(run.path.name)
    return forgotten


def cancel_jobs(folder: SweepFolder) -> list[QueuedJob]:
    """Cancel the sweep's jobs that Slurm has not ended; return them. Nothing is submitted meanwhile.

    Raises: ValueError when Slurm does not answer, or refuses.
    """
    if not queued_jobs(folder.path):
        return []
    with queue_lock(folder.path):
        answer = slurm.ask(folder.path, max_age_seconds=0.0)
        if answer.problem:
            raise ValueError(f"it is not known what is in flight, so nothing is cancelled: {answer.problem}")
        live = [job for job in queued_jobs(folder.path) if any(map(answer.is_live, job.task_ids))]
        if live:
            slurm.command("scancel", *(job.job_id for job in live))
    return live


def stop_processes(folder: SweepFolder, jobs: Iterable[QueuedJob]) -> tuple[set[int], set[str]]:
    """Send SIGTERM to the processes of this machine that train the sweep; `jobs` are ended by Slurm.

    Returns: the processes, and the other hosts on which runs are being trained.

    Raises: ValueError when a process belongs to somebody else.
    """
    of_jobs = {run_id for job in jobs for run_ids in job.tasks for run_id in run_ids}
    holders = {found for run in _runs(folder) if run.path.name not in of_jobs and (found := holder(run))}
    holders |= local_processes(folder.path)
    here = {process for host, process in holders if host == host_name()}
    for process in here:
        try:
            os.kill(process, signal.SIGTERM)
        except ProcessLookupError:  # it has just ended
            continue
        except PermissionError:
            raise ValueError(f"process {process} trains runs of this sweep for somebody else; ask them") from None
    return here, {host for host, _ in holders if host != host_name()}


def leftovers(folder: SweepFolder) -> list[Path]:
    """Return what runs with a result have left of their training: logs, checkpoints, whole or not, and states that
    branches started from, unless one of these has no result yet.
    """
    missing = {run: is_missing(run) for run in _runs(folder)}
    needed = set(needed_states(run for run, is_to_come in missing.items() if is_to_come))
    done = [run for run, is_to_come in missing.items() if not is_to_come]
    found = [path for run in done for path in (run.log, *run.path.glob(f"*{run.checkpoint.name}*")) if path.exists()]
    return [*found, *(path for run in missing for path in sorted(run.path.glob("*kept-*.ckpt*")) if path not in needed)]


def orphans(folder: SweepFolder) -> list[Path]:
    """Return the folders of runs that left the sweep without a result, and that nobody has in hand or will."""
    listed, queued = {run.path for run in _runs(folder)}, read_queue(folder.path).runs
    kept = listed | {folder.run(run_id).path for run_id, task in queued.items() if task.is_live}
    places = [path for path in sorted((folder.path / "runs").glob("*/")) if path not in kept]
    return [path for path in places if not is_claimed(RunFolder(path)) and not _may_have_a_result(RunFolder(path))]


def remove(paths: Sequence[Path]) -> list[Path]:
    """Remove files and folders of runs, each unless somebody has just taken its run up; return those removed."""
    removed = []
    for path in paths:
        with claim(RunFolder(path if path.is_dir() else path.parent)) as held:
            if held is not None:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                removed.append(path)
    return removed


def size_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _may_have_a_result(run: RunFolder) -> bool:
    try:
        return result_state(run) is not None
    except ValueError:
        return True


def _runs(folder: SweepFolder) -> list[RunFolder]:
    return [folder.run(run.run_id) for run in folder.read_manifest().runs]
