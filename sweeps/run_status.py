"""One run at a glance, read from its files and from the job queue; fast enough for thousands of them.

Files are read no further than needed: the record of a run that ended, which has its settings too, and the end of its
evaluations; the configuration of others, as it is.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from harness.failures import FailureKind
from harness.identity import SCIENCE_VERSION
from harness.record import PlannedRun, RunFolder, read_json, read_rows
from sweeps.states import Queue, QueuedRun, queued_reason, queued_state
from sweeps.store import RESULTS, State, failure_reason, state

#: Long enough for the last row of the evaluations.
_TAIL_BYTES = 4096

#: The files of a run before anybody claims it.
_OF_A_PLAN = frozenset(path.name for path in (RunFolder(Path()).config, RunFolder(Path()).machine))

#: What is shown of a run's settings, by their names in its record.
_SETTINGS = ("optimizer", "global_batch_tokens", "peak_lr", "init_seed", "data_seed", "realized_tokens")


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
    realized_tokens: int
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
    """Read where a run stands; `queue` is what its sweep has there."""
    with suppress(_NoResultError, FileNotFoundError):
        return _ended(run, planned, run.run.stat().st_mtime_ns)
    status = _untouched(run, planned) or _status(run, planned)
    queued = queue.runs.get(planned.run_id)
    return status if queued is None else _as_queued(status, queued, run)


@cache
def _ended(run: RunFolder, planned: PlannedRun, written_at_ns: int) -> RunStatus:
    """Read a run that has its result from two files: once for each record. That it has none is not remembered."""
    del written_at_ns
    try:
        record, row = json.loads(_bytes(run.run)), _last_row(_bytes(run.evaluations, _TAIL_BYTES))
    except ValueError:
        raise _NoResultError from None
    if not isinstance(record, dict) or record.get("status") not in RESULTS or row is None:
        raise _NoResultError
    version, config = _settings(record) or _config(run)
    now, reason = _unless_stale(version, State(record["status"]), record.get("stop_reason"))
    return RunStatus(
        run_id=planned.run_id,
        stage=planned.stage,
        state=now,
        **config,
        tokens_seen=int(record.get("tokens_seen") or 0),
        loss_nats=_loss(row),
        reason=reason,
        node=record.get("host"),
        job=record.get("job_id"),
    )


def _untouched(run: RunFolder, planned: PlannedRun) -> RunStatus | None:
    """Read a run that nobody has ever had in hand, of which there is nothing else to read; none of another one."""
    if not _OF_A_PLAN.issuperset(path.name for path in run.path.iterdir()):
        return None
    version, config = _config(run)
    now, reason = _unless_stale(version, State.PLANNED, None)
    return RunStatus(run_id=planned.run_id, stage=planned.stage, state=now, **config, reason=reason)


def _status(run: RunFolder, planned: PlannedRun) -> RunStatus:
    """Put together what the files of a run say."""
    now = state(run)
    latest = _read(run.run if now in RESULTS else run.progress)
    version, config = _config(run)
    seen, speed = int(latest.get("tokens_seen") or 0), latest.get("tokens_per_second")
    running = now == State.RUNNING
    reason = failure_reason(run) if now == State.FAILED else latest.get("stop_reason")
    loss = None
    try:
        loss = _last_loss(run)
    except ValueError as error:
        now, reason = State.FAILED, str(error)
    if not running:
        now, reason = _unless_stale(version, now, reason)
    failure = _read(run.failure) if now == State.FAILED else {}
    started = latest if now in RESULTS else _read(run.run)
    return RunStatus(
        run_id=planned.run_id,
        stage=planned.stage,
        state=now,
        **config,
        tokens_seen=seen,
        loss_nats=loss,
        tokens_per_second=speed if running else None,
        seconds_left=(config["realized_tokens"] - seen) / speed if running and speed else None,
        reason=reason,
        failure_kind=failure.get("kind"),
        node=failure.get("host") or started.get("host"),
        job=failure.get("job_id") or started.get("job_id"),
    )


def _as_queued(status: RunStatus, queued: QueuedRun, run: RunFolder) -> RunStatus:
    """Add what Slurm says of a run without a result, unless its files know better."""
    now = queued_state(status.state, queued, _read(run.failure).get("failed_at"), status.job)
    if status.state == State.RUNNING:
        return replace(status, node=status.node or queued.node, job=status.job or queued.task_id)
    if status.state in RESULTS | {State.STALE} or (now == status.state == State.FAILED):
        return status
    kind = FailureKind.OUT_OF_MEMORY if now == State.FAILED else None
    return replace(
        status, state=now, reason=queued_reason(queued), failure_kind=kind, node=queued.node, job=queued.task_id
    )


def _last_loss(run: RunFolder) -> float | None:
    """Return the last validation loss. Raises: ValueError naming file and line where the evaluations are corrupt."""
    if not run.evaluations.exists():
        return None
    row = _last_row(_bytes(run.evaluations, _TAIL_BYTES))
    if row is None:
        rows = read_rows(run.evaluations)
        row = rows[-1] if rows else {}
    return _loss(row)


def _last_row(tail: bytes) -> dict[str, Any] | None:
    """Return the last whole row of the evaluations by how their file ends; none where that is not one."""
    with suppress(ValueError):
        if b"\n" in tail and isinstance(row := json.loads(tail[: tail.rindex(b"\n")].rpartition(b"\n")[2]), dict):
            return row
    return None


def _loss(row: dict[str, Any]) -> float | None:
    """Return the validation loss of a row: of the averaged weights where there are any, as the targets are read."""
    averaged = row.get("val_loss_averaged_nats")
    loss = row.get("val_loss_nats") if averaged is None else averaged
    return loss if isinstance(loss, float) else None


@cache
def _config(run: RunFolder) -> tuple[int, dict[str, Any]]:
    """Return the science_version of a configuration, and what of it is shown: once, that of a run_id never changes.

    It is not validated: one of another version can be shown too.
    """
    config = read_json(run.config)
    batch, optimizer = config["global_batch_tokens"], config["optimizer"]
    of_record = {"optimizer": optimizer["name"], "peak_lr": optimizer["peak_lr"]}
    found = _settings(config | of_record | {"realized_tokens": config["token_budget"] // batch * batch})
    assert found is not None
    return found


def _settings(record: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """Return the same of a record, which has it too; none where it lacks something."""
    shown = {name: record.get(name) for name in _SETTINGS}
    version = record.get("science_version")
    return None if version is None or None in shown.values() else (version, shown)


def _bytes(path: Path, last: int | None = None) -> bytes:
    """Return the content of a file, or its `last` bytes: in half the time of `Path.read_bytes`, thousands of times."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        start = max(size - last, 0) if last else 0
        return os.pread(descriptor, size - start, start)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    """Read a file that may be missing or damaged: a display must not fall over it."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _unless_stale(version: int, now: State, reason: str | None) -> tuple[State, str | None]:
    if version == SCIENCE_VERSION:
        return now, reason
    return State.STALE, (
        f"{now} by science_version {version}, this code is {SCIENCE_VERSION} and gives other numbers; "
        f"critbatch run plans it again"
    )
