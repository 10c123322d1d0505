"""One run at a glance, put together from its files and from the job queue; fast enough for thousands of them."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

from harness.failures import FailureKind
from harness.identity import SCIENCE_VERSION
from harness.record import PlannedRun, RunFolder
from sweeps.clusters.stops import read_stop
from sweeps.run_files import (
    CHECKPOINT,
    CLAIM,
    CONFIG,
    EVALUATIONS,
    FAILURE,
    MACHINE,
    PROGRESS,
    RECORD,
    Record,
    Settings,
    content_of,
    last_loss,
    record_of,
    record_written_at_ns,
    settings_of,
)
from sweeps.states import Queue, QueuedRun, queued_reason, queued_state
from sweeps.store import RESULTS, State, failure_reason, is_claimed, result_record

#: The files of a run before anybody claims it.
_OF_A_PLAN = frozenset((CONFIG, MACHINE))

#: `RunConfig.run_id`: model, optimizer, batch, rate, seeds, hash.
_RUN_ID = re.compile(r".+-(\w+)-b(\d+)-lr(.+)-s(\d+)(?:\.(\d+))?-[0-9a-f]{8}")


@dataclass(frozen=True)
class RunStatus:
    """One run at a glance; what is not known is None.

    `loss_nats` is the last validation loss, of the averaged weights where there are any; `seconds_left` is to the end
    of the budget: at most. `node` is where it is trained, or was last; `job` the Slurm task that it was given to last.
    """

    run_id: str
    stage: str
    state: State
    optimizer: str
    global_batch_tokens: int
    peak_lr: float
    init_seed: int
    data_seed: int
    realized_tokens: int | None
    tokens_seen: int = 0
    loss_nats: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    reason: str | None = None
    failure_kind: str | None = None
    node: str | None = None
    job: str | None = None


class _NoResultError(Exception):
    """The run has no result, or none that is whole."""


def read_run_status(run: RunFolder, planned: PlannedRun, queue: Queue) -> RunStatus:
    """Read where a run stands; `queue` is what its sweep has there. A run without its folder is lost."""
    written_at_ns = record_written_at_ns(run)
    with suppress(_NoResultError, FileNotFoundError, ValueError):
        return _ended(run, planned, written_at_ns)
    try:
        names = frozenset(entry.name for entry in os.scandir(run.path))
        status = _planned(run, planned) if names <= _OF_A_PLAN else _begun(run, planned, names, written_at_ns)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return _gone(run, planned, error)
    queued = queue.runs.get(planned.run_id)
    if queued is None:
        return status
    failed_at = content_of(run, FAILURE).get("failed_at") if FAILURE in names else None
    return _as_queued(status, queued, failed_at, run)


@cache
def _ended(run: RunFolder, planned: PlannedRun, written_at_ns: int | None) -> RunStatus:
    """Read a run that has its result from two files: once for each record. That it has none is not remembered."""
    if written_at_ns is None or (record := record_of(run, written_at_ns)).status not in RESULTS:
        raise _NoResultError
    loss_nats = last_loss(run)
    settings = record.settings or settings_of(run)
    now, reason = _unless_stale(settings, State(record.status), record.stop_reason)
    return RunStatus(
        run_id=planned.run_id,
        stage=planned.stage,
        state=now,
        **settings.shown,
        tokens_seen=record.tokens_seen,
        loss_nats=loss_nats,
        reason=reason,
        node=record.host,
        job=record.job,
    )


def _planned(run: RunFolder, planned: PlannedRun) -> RunStatus:
    """Read a run that nobody has ever had in hand, of which there is nothing else to read."""
    settings = settings_of(run)
    now, reason = _unless_stale(settings, State.PLANNED, None)
    return RunStatus(run_id=planned.run_id, stage=planned.stage, state=now, **settings.shown, reason=reason)


def _begun(run: RunFolder, planned: PlannedRun, names: frozenset[str], before_ns: int | None) -> RunStatus:
    """Put together what the files of a run say; `names` are those that it has, `before_ns` when its record was written
    that was no result.
    """
    is_running = CLAIM in names and is_claimed(run)
    written_at_ns = record_written_at_ns(run)
    if not is_running and written_at_ns != before_ns:  # it may have ended between the two looks
        with suppress(_NoResultError, FileNotFoundError, ValueError):
            return _ended(run, planned, written_at_ns)
    record, loss, damage = _results(run, names, written_at_ns)
    settings = (record and record.settings) or settings_of(run)
    now, reason = _state(run, names, is_running, damage)
    if not is_running:
        now, reason = _unless_stale(settings, now, reason)
    progress = content_of(run, PROGRESS) if PROGRESS in names else {}
    failure = content_of(run, FAILURE) if now == State.FAILED else {}
    seen, speed = int(progress.get("tokens_seen") or 0), progress.get("tokens_per_second") if is_running else None
    return RunStatus(
        run_id=planned.run_id,
        stage=planned.stage,
        state=now,
        **settings.shown,
        tokens_seen=seen,
        loss_nats=loss,
        tokens_per_second=speed,
        seconds_left=(settings.shown["realized_tokens"] - seen) / speed if speed else None,
        reason=reason,
        failure_kind=failure.get("kind"),
        node=failure.get("host") or (record.host if record else None),
        job=failure.get("job_id") or (record.job if record else None),
    )


def _results(
    run: RunFolder, names: frozenset[str], written_at_ns: int | None
) -> tuple[Record | None, float | None, str | None]:
    """Return the record and the last loss, none where there is none yet, and what is wrong with them."""
    record = loss = None
    try:
        with suppress(FileNotFoundError):
            record = None if written_at_ns is None else record_of(run, written_at_ns)
        with suppress(FileNotFoundError):
            loss = last_loss(run) if EVALUATIONS in names else None
        if record and record.status in RESULTS:
            result_record(run)  # refuses one without its evaluations
    except ValueError as error:
        return record, loss, str(error)
    return record, loss, None


def _state(run: RunFolder, names: frozenset[str], is_running: bool, damage: str | None) -> tuple[State, str | None]:
    if damage:
        return State.FAILED, damage
    if is_running:
        return State.RUNNING, None
    if FAILURE in names:
        return State.FAILED, failure_reason(run)
    has_started = not names.isdisjoint((RECORD, EVALUATIONS, CHECKPOINT))
    return State.INTERRUPTED if has_started else State.PLANNED, None


def _gone(run: RunFolder, planned: PlannedRun, error: Exception) -> RunStatus:
    """Show a run whose configuration cannot be read, by what its name says.

    Raises: ValueError for a name that says nothing.
    """
    named = _RUN_ID.fullmatch(planned.run_id)
    if named is None:
        raise ValueError(f"{run.path}: {error}") from None
    optimizer, batch, rate, init_seed, data_seed = named.groups()
    what = str(error) if isinstance(error, ValueError) else f"{run.config} is gone"
    return RunStatus(
        run_id=planned.run_id,
        stage=planned.stage,
        state=State.LOST,
        optimizer=optimizer,
        global_batch_tokens=int(batch),
        peak_lr=float(rate),
        init_seed=int(init_seed),
        data_seed=int(data_seed or init_seed),
        realized_tokens=None,
        reason=f"{what}; to plan it again: critbatch run {run.path.parents[1]}",
    )


def _as_queued(status: RunStatus, queued: QueuedRun, failed_at: str | None, run: RunFolder) -> RunStatus:
    """Add what Slurm says of a run without a result, unless its files know better."""
    now = queued_state(status.state, queued, failed_at, status.job)
    if status.state == State.RUNNING:
        return replace(status, node=status.node or queued.node, job=status.job or queued.task_id)
    if status.state in RESULTS | {State.STALE} or (now == status.state == State.FAILED):
        return status
    reason = queued_reason(queued)
    if now == State.LOST and (stop := read_stop(run.path.parents[1], queued.task_id)):
        now, reason = (State.TIMED_OUT if stop.is_time_limit else status.state), stop.reason
    kind = FailureKind.OUT_OF_MEMORY if now == State.FAILED else None
    return replace(status, state=now, reason=reason, failure_kind=kind, node=queued.node, job=queued.task_id)


def _unless_stale(settings: Settings, now: State, reason: str | None) -> tuple[State, str | None]:
    if settings.science_version == SCIENCE_VERSION:
        return now, reason
    return State.STALE, (
        f"{now} by science_version {settings.science_version}, this code is {SCIENCE_VERSION} and gives other numbers; "
        f"critbatch run plans it again"
    )
