"""Which job arrays a submission makes of what a sweep lacks.

The jobs of an array have one stage, one time limit, and as many devices. Those of branches and of confirmations wait
for others.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from uuid import uuid4

from harness.config import MachineConfig, RunConfig
from sweeps.branches import hold_of
from sweeps.clusters.flight import Flight
from sweeps.clusters.job import Job, notice_seconds
from sweeps.clusters.packing import SHORTEST_JOB_SECONDS, Seconds, of_similar_length, packed, time_limit_minutes
from sweeps.clusters.profile import ClusterProfile
from sweeps.clusters.shares import Share, dealt
from sweeps.launch import longest_first
from sweeps.pool import TRAIN
from sweeps.printing import counted
from sweeps.spec import SweepSpec
from sweeps.speed import Speed
from sweeps.store import Stage, SweepFolder, is_claimed, is_missing, read_machine
from sweeps.work import Work, work_of

Choose = Callable[[SweepSpec, SweepFolder], list[RunConfig]]


@dataclass(frozen=True)
class Submission:
    """A sweep on a cluster, and how its runs are put into jobs: `runs` are the grid, `confirmations` what the runs that
    come after it do.
    """

    folder: SweepFolder
    spec: SweepSpec
    profile: ClusterProfile
    runs: Sequence[RunConfig]
    speed: Speed
    runs_per_job: int | None = None
    confirmations: Sequence[Work] = ()
    train: str = TRAIN


@dataclass(frozen=True)
class Array:
    """One sbatch call: jobs that have their stage, their time limit and their devices in common. It waits for the jobs
    that have `trunks`, or for all of the grid.
    """

    stage: Stage
    jobs: tuple[Job, ...]
    minutes: int
    devices: int
    trunks: frozenset[str] = field(default_factory=frozenset)
    waits_for_the_grid: bool = False

    @property
    def in_words(self) -> str:
        runs = sum(len(job.run_ids) for job in self.jobs)
        what = counted(runs, "run") if runs else "confirmations"
        return f"{what} in {counted(len(self.jobs), 'job')} of {self.minutes} minutes at most"


def arrays_of(submission: Submission, flight: Flight, choose: Choose) -> list[Array]:
    """Return what has to be submitted: the missing runs of the grid, then the confirmations, which `choose` returns.

    Raises: ValueError for runs that do not fill whole nodes.
    """
    missing = _missing(submission, submission.runs)
    arrays = list(_grid(submission, missing, flight))
    if submission.spec.confirm is None:
        return arrays
    if missing:
        return arrays + _confirmations_to_come(submission, arrays, flight)
    if flight.unchosen:
        return []
    confirmed = _missing(submission, choose(submission.spec, submission.folder))
    return list(_arrays(submission, "confirm", _free(submission, confirmed, flight)))


def _grid(submission: Submission, missing: Sequence[RunConfig], flight: Flight) -> Iterator[Array]:
    """Yield the arrays of the runs that can start, then those of branches that wait for runs of the sweep."""
    to_come = {run.run_id for run in missing}
    ready, waiting = [], []
    for run in _free(submission, missing, flight):
        hold = hold_of(submission.folder.run(run.run_id), run.branch)
        if hold is None or hold.has_diverged:
            ready.append(run)
        elif run.branch and run.branch.parent in to_come:
            waiting.append(run)
    yield from _arrays(submission, "grid", ready)
    yield from _arrays(submission, "grid", waiting)


def _arrays(submission: Submission, stage: Stage, runs: Sequence[RunConfig]) -> Iterator[Array]:
    machines = {run.run_id: _machine(submission, run) for run in runs}
    for machine in dict.fromkeys(machines.values()):
        submission.profile.devices_on_a_node(machine.devices)
        of_machine = {run.run_id: run for run in runs if machines[run.run_id] == machine}
        seconds = _seconds(submission, [work_of(run, machine) for run in of_machine.values()], of_machine)
        packs = packed(list(of_machine), seconds, submission.runs_per_job)
        lengths = [sum(seconds[run_id] for run_id in pack) if seconds else None for pack in packs]
        for positions, minutes in _limits(submission, lengths):
            jobs = [_job(submission, minutes, machine, run_ids=packs[position]) for position in positions]
            trunks = {run.branch.parent for job in jobs for run_id in job.run_ids if (run := of_machine[run_id]).branch}
            yield from _split(submission, Array(stage, tuple(jobs), minutes, machine.devices, frozenset(trunks)))


def _confirmations_to_come(submission: Submission, grid: Sequence[Array], flight: Flight) -> list[Array]:
    """Return the confirmations of a grid that is not done: they wait for what is in flight of it, and for `grid`."""
    wait_for_something_new = grid or (flight.grid and not flight.unchosen)
    names = [f"{number}" for number in range(len(submission.confirmations))]
    if not (wait_for_something_new and names):
        return []
    seconds = _seconds(submission, submission.confirmations, names)
    names = sorted(names, key=lambda name: -seconds[name]) if seconds else names
    longest = seconds[names[0]] if seconds else None
    per_job = submission.runs_per_job or (max(int(SHORTEST_JOB_SECONDS / longest), 1) if longest else 1)
    of, choice, machine = math.ceil(len(names) / per_job), uuid4().hex[:8], submission.spec.machine
    lengths = [sum(seconds[name] for name in dealt(names, number, of)) if seconds else None for number in range(of)]
    arrays = []
    for numbers, minutes in _limits(submission, lengths):
        jobs = [_job(submission, minutes, machine, share=Share(choice, number, of, machine)) for number in numbers]
        array = Array("confirm", tuple(jobs), minutes, machine.devices, waits_for_the_grid=True)
        arrays += _split(submission, array)
    return arrays


def _limits(submission: Submission, lengths: Sequence[float | None]) -> Iterator[tuple[list[int], int]]:
    """Yield the positions of jobs that may share an array, and the time limit in minutes of the longest of them."""
    minutes = [time_limit_minutes(submission.profile, seconds) for seconds in lengths]
    for positions in of_similar_length(minutes):
        yield positions, minutes[positions[0]]


def _split(submission: Submission, array: Array) -> list[Array]:
    size = submission.profile.max_array_size
    return [replace(array, jobs=array.jobs[first : first + size]) for first in range(0, len(array.jobs), size)]


def _job(
    submission: Submission,
    minutes: int,
    machine: MachineConfig,
    run_ids: tuple[str, ...] = (),
    share: Share | None = None,
) -> Job:
    profile = submission.profile
    return Job(
        str(submission.folder.path.absolute()),
        run_ids,
        share,
        threads=machine.threads or profile.cpus_per_device,
        max_requeues=profile.max_requeues if profile.requeue else 0,
        notice_seconds=notice_seconds(minutes, profile.signal_seconds),
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


def _machine(submission: Submission, run: RunConfig) -> MachineConfig:
    """Return how a run is trained: one that has a checkpoint goes on as it began (see `write_sweep`)."""
    files = submission.folder.run(run.run_id)
    return read_machine(files) if files.checkpoint.exists() else submission.spec.machine


def _seconds(submission: Submission, work: Iterable[Work], names: Iterable[str]) -> Seconds:
    """Return how long each piece of work should take at most; none where that is not known of all."""
    seconds = {name: submission.speed.seconds(each) for name, each in zip(names, work, strict=True)}
    known = {name: each for name, each in seconds.items() if each is not None}
    return known if len(known) == len(seconds) else None
