"""Confirmations that are submitted before they can be chosen: jobs get shares of a choice that is made when the first
of them starts, once for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from harness.config import MachineConfig
from sweeps.clusters.queue import QueuedJob, queue_lock, queued_jobs, remember
from sweeps.confirmations import choose_confirmations
from sweeps.launch import longest_first
from sweeps.store import SweepFolder


@dataclass(frozen=True)
class Share:
    """One of `of` shares of the choice with this name. Its runs are trained as `machine` says, whatever becomes of the
    sweep's file while the job waits.
    """

    choice: str
    number: int
    of: int
    machine: MachineConfig


def runs_of(share: Share, folder: SweepFolder) -> tuple[str, ...]:
    """Return the runs of a share, as they are written in the queue: there by whichever share comes first."""
    with queue_lock(folder.path):  # whoever submits has written all arrays of the choice down by then
        arrays = [job for job in queued_jobs(folder.path) if job.choice == share.choice]
        if not any(any(job.tasks) for job in arrays):
            arrays = _deal(share, arrays, folder)
    return [task for job in arrays for task in job.tasks][share.number]


def dealt(items: Sequence[str], number: int, of: int) -> tuple[str, ...]:
    """Return one share of what is sorted by length, so that shares take about as long."""
    return tuple(items[number::of])


def _deal(share: Share, arrays: Sequence[QueuedJob], folder: SweepFolder) -> list[QueuedJob]:
    """Choose, and write down which task of the arrays, in the order of their submission, has which runs."""
    spec = folder.read_spec().model_copy(update={"machine": share.machine})
    chosen = [run.run_id for run in longest_first(choose_confirmations(spec, folder), share.machine)]
    shares = iter([dealt(chosen, number, share.of) for number in range(share.of)])
    filled = [job.model_copy(update={"tasks": tuple(next(shares) for _ in job.tasks)}) for job in arrays]
    for job in filled:
        remember(job, folder.path)
    return filled
