"""What is read of one run's files to show where it stands: no more of them than needed, as there may be thousands."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from harness.config import Branch
from harness.record import RunFolder, read_json, read_rows

#: The names of a run's files: to join paths takes longer than to read what lies there.
_FILES = RunFolder(Path())
CONFIG, MACHINE, RECORD, EVALUATIONS = (
    path.name for path in (_FILES.config, _FILES.machine, _FILES.run, _FILES.evaluations)
)
PROGRESS, CHECKPOINT, CLAIM, FAILURE = (
    path.name for path in (_FILES.progress, _FILES.checkpoint, _FILES.claim, _FILES.failure)
)

#: Long enough for the last row of the evaluations.
_TAIL_BYTES = 4096

#: What is shown of a run's settings, by their names in its record.
_SETTINGS = ("optimizer", "global_batch_tokens", "peak_lr", "init_seed", "data_seed", "realized_tokens")


@dataclass(frozen=True)
class Settings:
    """What is shown of a run's settings, the version of the code that they are for, and where the run branches off, by
    its configuration.
    """

    science_version: int
    shown: dict[str, Any]
    branch: Branch | None = None


@dataclass(frozen=True)
class Record:
    """What is shown of a run.json; `settings` is none where it lacks one of them."""

    status: str
    stop_reason: str | None
    tokens_seen: int
    host: str | None
    job: str | None
    settings: Settings | None


def record_written_at_ns(run: RunFolder) -> int | None:
    """Return when run.json was written; none where there is none."""
    with suppress(FileNotFoundError):
        return os.stat(f"{run.path}/{RECORD}").st_mtime_ns  # noqa: PTH116 - a path takes longer
    return None


@cache
def record_of(run: RunFolder, written_at_ns: int) -> Record:
    """Return what run.json says; read once for each time that it was written.

    Raises: FileNotFoundError where there is none, ValueError for one that is not whole.
    """
    del written_at_ns
    row = _object(f"{run.path}/{RECORD}")
    return Record(
        status=str(row.get("status")),
        stop_reason=row.get("stop_reason"),
        tokens_seen=int(row.get("tokens_seen") or 0),
        host=row.get("host"),
        job=row.get("job_id"),
        settings=_settings(row),
    )


@cache
def settings_of(run: RunFolder) -> Settings:
    """Return the settings of a configuration: read once, that of a run_id never changes. It is not validated: one of
    another version can be shown too.

    Raises: FileNotFoundError where there is none, ValueError for one that is not whole.
    """
    config = _object(f"{run.path}/{CONFIG}")
    try:
        batch, optimizer = config["global_batch_tokens"], config["optimizer"]
        of_record = {"optimizer": optimizer["name"], "peak_lr": optimizer["peak_lr"]}
        stages = (config.get("batch_warmup") or {}).get("stages") or [{"until_tokens": 0}]
        begin = stages[-1]["until_tokens"]
        realized_tokens = begin + (config["token_budget"] - begin) // batch * batch
        found = _settings(config | of_record | {"realized_tokens": realized_tokens})
        if found and (branch := config.get("branch")):
            found = replace(found, branch=Branch.parse(branch, source=str(run.config)))
    except (KeyError, TypeError, ZeroDivisionError):
        found = None
    if found is None:
        raise ValueError(f"{run.config}: not the configuration of a run")
    return found


def last_loss(run: RunFolder) -> float | None:
    """Return the last validation loss; none where there is none yet.

    Raises: FileNotFoundError without evaluations; ValueError naming file and line where they are corrupt.
    """
    row = _last_row(_bytes(f"{run.path}/{EVALUATIONS}", _TAIL_BYTES))
    if row is None:
        rows = read_rows(run.evaluations)
        row = rows[-1] if rows else {}
    averaged = row.get("val_loss_averaged_nats")  # of the averaged weights where there are any, as the targets are read
    loss = row.get("val_loss_nats") if averaged is None else averaged
    return loss if isinstance(loss, float) else None


def content_of(run: RunFolder, name: str) -> dict[str, Any]:
    """Return a file that may be missing or damaged, then as an empty one: a display must not fall over it."""
    with suppress(OSError, ValueError):
        return _object(f"{run.path}/{name}")
    return {}


def _settings(row: dict[str, Any]) -> Settings | None:
    shown = {name: row.get(name) for name in _SETTINGS}
    version = row.get("science_version")
    return None if version is None or None in shown.values() else Settings(version, shown)


def _last_row(tail: bytes) -> dict[str, Any] | None:
    """Return the last whole row of the evaluations by how their file ends; none where that is not one."""
    with suppress(ValueError):
        if b"\n" in tail and isinstance(row := json.loads(tail[: tail.rindex(b"\n")].rpartition(b"\n")[2]), dict):
            return row
    return None


def _object(path: str) -> dict[str, Any]:
    """Read an object as `read_json` does, in half the time."""
    with suppress(ValueError):
        if isinstance(content := json.loads(_bytes(path)), dict):
            return content
    return read_json(Path(path))  # which says what is wrong


def _bytes(path: str, last: int | None = None) -> bytes:
    """Return the content of a file, or its `last` bytes: in half the time of `Path.read_bytes`, thousands of times."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        start = max(size - last, 0) if last else 0
        return os.pread(descriptor, size - start, start)
    finally:
        os.close(descriptor)
