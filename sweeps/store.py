"""The results folder of a sweep, and what its files say of every run.

States are read off files; there is no server. A run is claimed with a lock that the kernel drops with the process that
holds it: a dead worker never keeps one. Nothing whole is ever deleted: a run that left the sweep keeps its folder,
and `sweep.json` lists the current ones only; finished runs are found again by their `run_id`.
"""

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Literal

from harness.config import MachineConfig, RunConfig
from harness.failures import FailureKind, write_failure
from harness.origin import host_name
from harness.record import PlannedRun, RunFolder, SweepManifest, read_json, write_atomically, write_json
from sweeps.added import Proposal, added_runs, read_rounds, write_round
from sweeps.clusters.queue import queued_jobs
from sweeps.clusters.slurm import ask
from sweeps.spec import SweepSpec
from sweeps.sweep_file import dump_spec, read_spec

Stage = Literal["grid", "confirm"]

_CLAIM_TRIES = 5
_LOOK_SECONDS = 0.01


class State(StrEnum):
    """Where a run stands. `finished` and `diverged` are results; what is neither is missing and can be run.

    `state` reads planned, running, interrupted, finished, diverged and failed off a run's files. The others are told
    with the job queue (`sweeps.states`): queued, and requeued to go on from a checkpoint; timed_out and cancelled as
    Slurm ended the job; lost when its job is gone without a result. `stale` is of another `science_version`. A branch
    is waiting until its trunk has come to where it starts, blocked when it never will (`sweeps.branches`).
    """

    PLANNED = "planned"
    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    REQUEUED = "requeued"
    FINISHED = "finished"
    DIVERGED = "diverged"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    CANCELLED = "cancelled"
    BLOCKED = "blocked"
    STALE = "stale"


RESULTS = frozenset({State.FINISHED, State.DIVERGED})


@dataclass(frozen=True)
class SweepFolder:
    """The places of one sweep's files."""

    path: Path

    @property
    def spec(self) -> Path:
        """The resolved sweep, as YAML."""
        return self.path / "sweep.yaml"

    @property
    def manifest(self) -> Path:
        """The SweepManifest, as JSON."""
        return self.path / "sweep.json"

    def run(self, run_id: str) -> RunFolder:
        return RunFolder(self.path / "runs" / run_id)

    def read_manifest(self) -> SweepManifest:
        if not self.manifest.exists():
            if self.spec.exists():
                raise ValueError(f"{self.path}: sweep.json is gone; to write it again: critbatch run {self.path}")
            raise ValueError(f"{self.path}: no sweep.json there; no sweep has been started in this folder")
        return SweepManifest.parse(read_json(self.manifest), source=str(self.manifest))

    def read_spec(self) -> SweepSpec:
        return read_spec(str(self.path))


def read_run(run: RunFolder) -> RunConfig:
    return RunConfig.parse(read_json(run.config), source=str(run.config))


def read_machine(run: RunFolder) -> MachineConfig:
    return MachineConfig.parse(read_json(run.machine), source=str(run.machine))


def records(folder: SweepFolder) -> list[dict[str, Any]]:
    """Return the run.json of every run of the sweep that has a whole one; none when the sweep was never started."""
    if not folder.manifest.exists():
        return []
    runs = [folder.run(run.run_id) for run in folder.read_manifest().runs]
    found = []
    for run in runs:
        with suppress(OSError, ValueError):
            found.append(read_json(run.run))
    return found


def write_sweep(
    spec: SweepSpec, runs: Iterable[RunConfig], folder: SweepFolder, like: Sequence[RunConfig] | None = None
) -> None:
    """Write sweep.yaml, sweep.json and the configuration of every run; confirmations of the same grid stay listed, and
    so do the runs that rounds added to it (`sweeps.added`): those that are `like` its runs, by default the ones given.

    Raises: ValueError when the folder cannot be written.
    """
    runs = list(runs)
    with _writable(folder.path), locked(folder):
        added = added_runs(folder.path, runs if like is None else like)
        planned = tuple(dict.fromkeys(PlannedRun(run_id=run.run_id) for run in [*runs, *added]))
        confirmed = _confirmations(folder, planned)
        _write_runs(runs, spec.machine, folder)
        write_atomically(folder.spec, dump_spec(spec).encode())
        _write_manifest(spec, planned + confirmed, folder)


def add_confirmations(spec: SweepSpec, runs: Iterable[RunConfig], folder: SweepFolder) -> None:
    """List `runs` as the sweep's confirm stage, in place of an earlier choice."""
    runs = list(runs)
    with _writable(folder.path), locked(folder):
        grid = tuple(run for run in folder.read_manifest().runs if run.stage == "grid")
        _write_runs(runs, spec.machine, folder)
        _write_manifest(spec, grid + tuple(PlannedRun(run_id=run.run_id, stage="confirm") for run in runs), folder)


def add_round(
    spec: SweepSpec, command: str, axes: Iterable[str], proposals: Sequence[Proposal], folder: SweepFolder
) -> None:
    """Add the runs of a round to the sweep's grid stage, with the reasons."""
    runs = [proposal.run for proposal in proposals]
    with _writable(folder.path), locked(folder):
        _write_runs(runs, spec.machine, folder)
        write_round(folder.path, command, axes, proposals)
        listed = folder.read_manifest().runs
        new = {run.run_id for run in runs} - {run.run_id for run in listed}
        _write_manifest(spec, (*listed, *(PlannedRun(run_id=run.run_id) for run in runs if run.run_id in new)), folder)


@contextmanager
def locked(folder: SweepFolder, name: str = ".lock") -> Iterator[None]:
    """Hold a lock of the sweep, by default the one for its two files and for the report."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def claim(run: RunFolder) -> Iterator[int | None]:
    """Claim a run for as long as the block lasts; yields the lock's descriptor, or None when another process has it."""
    descriptor = os.open(run.claim, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        held = _lock_past_lookers(descriptor)
        if held:
            _sign(descriptor)
        yield descriptor if held else None
    finally:
        os.close(descriptor)


def holder(run: RunFolder) -> tuple[str, int] | None:
    """Return host and number of the process to ask to stop for whoever has the run in hand; None when nobody has."""
    if not is_claimed(run):
        return None
    host, _, number = run.claim.read_text().partition(" ")
    return (host, int(number)) if number.isdigit() else None


def state(run: RunFolder) -> State:
    """Read where a run stands; a corrupt record is a failure."""
    try:
        return _state(run)
    except ValueError:
        return State.FAILED


def is_running(folder: SweepFolder) -> bool:
    """Tell whether any run of the sweep is being trained."""
    return any(state(folder.run(run.run_id)) == State.RUNNING for run in folder.read_manifest().runs)


def failure_reason(run: RunFolder) -> str | None:
    """Return why a run failed, or None for one that did not."""
    try:
        result_state(run)
        return str(read_json(run.failure)["reason"]) if run.failure.exists() else None
    except ValueError as error:
        return str(error)


def result_state(run: RunFolder) -> State | None:
    """Return finished or diverged, or None while the run has no result.

    Raises: ValueError for a record that is not whole.
    """
    record = result_record(run)
    return State(record["status"]) if record else None


def result_record(run: RunFolder) -> dict[str, Any] | None:
    """Return the row of a run that has its result, else None. Raises: ValueError for a record that is not whole."""
    try:
        record = read_json(run.run)
    except FileNotFoundError:
        return None
    status = record.get("status")
    if status not in RESULTS:
        return None
    if not run.evaluations.exists():
        raise ValueError(f"{run.evaluations} is gone, though the run has {status}; the next critbatch run repeats it")
    return record


def is_missing(run: RunFolder) -> bool:
    """Tell whether the run has no result; a corrupt record is none."""
    try:
        return result_state(run) is None
    except ValueError:
        return True


def remove_broken_record(run: RunFolder) -> None:
    """Remove a record that `result_state` refuses, so that the run starts anew. The caller holds the claim."""
    try:
        result_state(run)
    except ValueError:
        run.checkpoint.unlink(missing_ok=True)
        run.run.unlink()


def record_failure(run: RunFolder, reason: str, kind: FailureKind = FailureKind.OTHER) -> None:
    """Write why a run failed, with the last lines of its log. The caller holds the claim."""
    write_failure(run, reason, kind)


def _state(run: RunFolder) -> State:
    if (result := result_state(run)) is not None:
        return result
    if is_claimed(run):
        return State.RUNNING
    # A run may have ended between the two looks.
    if (result := result_state(run)) is not None:
        return result
    if run.failure.exists():
        return State.FAILED
    started = run.run.exists() or run.evaluations.exists() or run.checkpoint.exists()
    return State.INTERRUPTED if started else State.PLANNED


def is_claimed(run: RunFolder) -> bool:
    """Tell whether a process has the run in hand."""
    try:
        descriptor = os.open(run.claim, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _sign(descriptor: int) -> None:
    """Write host and process into a claim: of a worker, the pool's, which would have another one take the run up."""
    pool = parent_process()
    os.ftruncate(descriptor, 0)
    with suppress(OSError):  # a full disk must not keep anybody from making room
        os.pwrite(descriptor, f"{host_name()} {pool.pid if pool else os.getpid()}".encode(), 0)


def _lock_past_lookers(descriptor: int) -> bool:
    """Take the lock for oneself; whoever merely looks whether it is held (`state`) has it for an instant."""
    for _ in range(_CLAIM_TRIES):
        if _lock(descriptor, fcntl.LOCK_EX):
            return True
        time.sleep(_LOOK_SECONDS)
    return False


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the results folder {folder} cannot be written ({error.strerror}); choose another with --results"
        ) from None


def _write_runs(runs: list[RunConfig], machine: MachineConfig, folder: SweepFolder) -> None:
    for run in runs:
        place = folder.run(run.run_id)
        place.path.mkdir(parents=True, exist_ok=True)
        config = run.model_dump(mode="json")
        if _whole(place.config) != config:
            write_json(place.config, config, durable=False)  # what a power cut tears is written again next time
    _write_machine([folder.run(run.run_id) for run in runs], machine, folder)


def _write_machine(runs: Iterable[RunFolder], machine: MachineConfig, folder: SweepFolder) -> None:
    """Write how the runs without a result are trained. What is in flight or has a checkpoint keeps what it has: its
    processes, its memory and its sums are planned for that.
    """
    content = machine.model_dump(mode="json")
    before = {run: _whole(run.machine) for run in runs}
    changed = [run for run, known in before.items() if known != content and is_missing(run)]
    in_flight = _in_flight(folder) if any(before[run] for run in changed) else frozenset()
    for run in changed:
        is_begun = run.path.name in in_flight or run.checkpoint.exists() or is_claimed(run)
        if before[run] is None or not is_begun:
            write_json(run.machine, content, durable=False)


def _in_flight(folder: SweepFolder) -> frozenset[str]:
    """Return the runs that Slurm has, or may have where it does not say."""
    jobs = [job for job in queued_jobs(folder.path) if job.kind == "slurm"]
    known = ask(folder.path).tasks if jobs else {}
    tasks = [task for job in jobs for task in zip(job.task_ids, job.tasks, strict=True)]
    return frozenset(run for task, runs in tasks if task not in known or known[task].is_live for run in runs)


def _whole(path: Path) -> dict[str, Any] | None:
    """Return the content of a file; none where it is missing or torn."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _write_manifest(spec: SweepSpec, runs: tuple[PlannedRun, ...], folder: SweepFolder) -> None:
    manifest = SweepManifest(
        name=spec.name,
        description=spec.description,
        baseline=spec.baseline_name,
        targets_nats=spec.targets_nats,
        runs=runs,
        tuned=tuple(dict.fromkeys(axis for each in read_rounds(folder.path) for axis in each.axes)),
    )
    write_json(folder.manifest, manifest.model_dump(mode="json"))


def _confirmations(folder: SweepFolder, grid: tuple[PlannedRun, ...]) -> tuple[PlannedRun, ...]:
    """Return the listed confirmations if they belong to this very grid."""
    try:
        listed = folder.read_manifest().runs
    except ValueError:
        return ()
    same = {run for run in listed if run.stage == "grid"} == set(grid)
    return tuple(run for run in listed if run.stage == "confirm") if same else ()
