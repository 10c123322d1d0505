"""One run at a glance, read from its files and from the job queue; fast enough for thousands of them.

Files are read no further than needed: a configuration as it is, the evaluations from their end.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from harness.config import SCIENCE_VERSION
from harness.failures import FailureKind
from harness.record import PlannedRun, RunFolder, Value, read_json, read_rows
from sweeps.states import Queue, QueuedRun, queued_reason, queued_state
from sweeps.store import RESULTS, State, failure_reason, result_record, state

#: Long enough for the last row of the evaluations.
_TAIL_BYTES = 4096


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
    tokens_seen: int
    loss_nats: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    reason: str | None
    failure_kind: str | None = None
    node: str | None = None
    job: str | None = None


class _NoResultError(Exception):
    """The run has no result, or none that is whole."""


def read_run_status(run: RunFolder, planned: PlannedRun, queue: Queue) -> RunStatus:
    """Read where a run stands; `queue` is what its sweep has there."""
    with suppress(_NoResultError, FileNotFoundError):
        return _ended(run, planned, run.run.stat().st_mtime_ns)
    now = state(run)
    status = _status(run, planned, now, _read(run.run if now in RESULTS else run.progress))
    queued = queue.runs.get(planned.run_id)
    return status if queued is None else _as_queued(status, queued, run)


@cache
def _ended(run: RunFolder, planned: PlannedRun, written_at_ns: int) -> RunStatus:
    """Read a run that has its result: once for each record; that it has none is not remembered."""
    del written_at_ns
    try:
        record = result_record(run)
    except ValueError:
        record = None
    if record is None:
        raise _NoResultError
    return _status(run, planned, State(record["status"]), record)


def _status(run: RunFolder, planned: PlannedRun, now: State, latest: dict[str, Any]) -> RunStatus:
    """Put together what the files say; `latest` is the record of a run that ended, else its last progress."""
    version, config = _config(run)
    seen, speed = int(latest.get("tokens_seen") or 0), latest.get("tokens_per_second")
    running = now == State.RUNNING
    reason = failure_reason(run) if now == State.FAILED else latest.get("stop_reason")
    loss: Value = None
    try:
        loss = _last_loss(run)
    except ValueError as error:
        now, reason = State.FAILED, str(error)
    if version != SCIENCE_VERSION and not running:
        now, reason = State.STALE, _stale_in_words(now, version)
    failure = _read(run.failure) if now == State.FAILED else {}
    started = latest if now in RESULTS else _read(run.run)
    return RunStatus(
        run_id=planned.run_id,
        stage=planned.stage,
        state=now,
        **config,
        tokens_seen=seen,
        loss_nats=loss if isinstance(loss, float) else None,
        tokens_per_second=speed if running else None,
        seconds_left=(config["realized_tokens"] - seen) / speed if running and speed else None,
        reason=reason,
        failure_kind=failure.get("kind"),
        node=failure.get("host") or started.get("host"),
        job=failure.get("job_id") or started.get("job_id"),
    )


def _as_queued(status: RunStatus, queued: QueuedRun, run: RunFolder) -> RunStatus:
    """Add what Slurm says of a run without a result, unless its files know better."""
    now = queued_state(status.state, queued, _read(run.failure).get("failed_at"))
    if status.state == State.RUNNING:
        return replace(status, node=status.node or queued.node, job=status.job or queued.task_id)
    if status.state in RESULTS | {State.STALE} or (now == status.state == State.FAILED):
        return status
    kind = FailureKind.OUT_OF_MEMORY if now == State.FAILED else None
    return replace(
        status, state=now, reason=queued_reason(queued), failure_kind=kind, node=queued.node, job=queued.task_id
    )


def _last_loss(run: RunFolder) -> Value:
    """Return the last validation loss: of the averaged weights where there are any, as the targets are read."""
    row = _last_row(run.evaluations)
    if row is None:
        return None
    averaged = row.get("val_loss_averaged_nats")
    return row.get("val_loss_nats") if averaged is None else averaged


def _last_row(path: Path) -> dict[str, Value] | None:
    """Read the last whole row without those before it. Raises: ValueError naming file and line for a corrupt one."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    with suppress(ValueError):
        if len(lines) > 1 and isinstance(row := json.loads(lines[-2]), dict):
            return row
    rows = read_rows(path)
    return rows[-1] if rows else None


@cache
def _config(run: RunFolder) -> tuple[int, dict[str, Any]]:
    """Return the science_version of a configuration, and what of it is shown: once, that of a run_id never changes.

    It is not validated: one of another version can be shown too.
    """
    config = read_json(run.config)
    batch = config["global_batch_tokens"]
    shown = {name: config[name] for name in ("global_batch_tokens", "init_seed", "data_seed")}
    optimizer = {"optimizer": config["optimizer"]["name"], "peak_lr": config["optimizer"]["peak_lr"]}
    return config["science_version"], shown | optimizer | {"realized_tokens": config["token_budget"] // batch * batch}


def _read(path: Path) -> dict[str, Any]:
    """Read a file that may be missing or damaged: a display must not fall over it."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _stale_in_words(was: State, version: int) -> str:
    return (
        f"{was} by science_version {version}, this code is {SCIENCE_VERSION} and gives other numbers; "
        f"critbatch run plans it again"
    )
