"""Jobs on this machine: each has a folder `queue/local-*` in the sweep's, from its submission to its end.

A job that has begun holds the claim of its folder as a worker holds that of a run: its process can be told, and is
seen to have died. One whose folder is gone before it begins trains nothing.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from harness.frozen import Frozen
from harness.origin import host_name
from harness.record import RunFolder, read_json, write_json
from sweeps.clusters.queue import queue_folder, queue_lock
from sweeps.store import claim, holder, is_claimed

#: A job that has not begun by then never will.
_BEGINS_WITHIN_SECONDS = 600.0


class LocalJob(Frozen):
    """What a job on this machine is to train, with all the others there: the runs that were missing."""

    submitted_at: str
    run_ids: tuple[str, ...]


def announce(sweep: Path, run_ids: Sequence[str]) -> Path:
    """Write down a job that is about to be started; return its folder."""
    job = LocalJob(submitted_at=datetime.now(UTC).isoformat(timespec="seconds"), run_ids=tuple(run_ids))
    place = queue_folder(sweep) / f"local-{uuid4().hex[:8]}"
    place.mkdir(parents=True)
    write_json(place / "job.json", job.model_dump(mode="json"))
    return place


def note_process(place: Path, process: int) -> None:
    """Write down which process of this machine is to be the job, unless it is over already."""
    with suppress(FileNotFoundError):
        (place / "process").write_text(f"{host_name()} {process}")


@contextmanager
def begun(place: Path) -> Iterator[bool]:
    """Be the job of a folder, to its end; yields False when it was withdrawn meanwhile. SIGTERM interrupts, which
    submitit would have ignored.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        with queue_lock(place.parents[1]):
            if is_there := place.exists():
                stack.callback(shutil.rmtree, place, ignore_errors=True)
                stack.enter_context(claim(RunFolder(place)))
        yield is_there


def withdraw(sweep: Path) -> list[Path]:
    """Remove the jobs that have not begun, and what is left of those that died; return the former."""
    if not _places(sweep):
        return []
    with queue_lock(sweep):
        idle = [place for place in _places(sweep) if not is_claimed(RunFolder(place))]
        withdrawn = [place for place in idle if _is_live(place)]
        for place in idle:
            shutil.rmtree(place, ignore_errors=True)
    return withdrawn


def local_processes(sweep: Path) -> set[tuple[str, int]]:
    """Return host and process of the jobs that have begun."""
    return {found for place in _places(sweep) if (found := holder(RunFolder(place)))}


def local_jobs(sweep: Path) -> dict[str, LocalJob]:
    """Return the jobs that train, or are about to, by the names of their folders."""
    paths = [place / "job.json" for place in _places(sweep) if _is_live(place)]
    return {path.parent.name: LocalJob.parse(read_json(path), str(path)) for path in paths if path.exists()}


def died_before(sweep: Path) -> list[str]:
    """Return the processes that ended before their jobs began: the names of their logs begin with them."""
    dead = [place for place in _places(sweep) if not RunFolder(place).claim.exists() and _has_died(place)]
    return [(place / "process").read_text().rpartition(" ")[2] for place in dead]


def _places(sweep: Path) -> list[Path]:
    return sorted(queue_folder(sweep).glob("local-*"))


def _is_live(place: Path) -> bool:
    try:
        if RunFolder(place).claim.exists():
            return is_claimed(RunFolder(place))
        return time.time() - place.stat().st_mtime < _BEGINS_WITHIN_SECONDS and not _has_died(place)
    except FileNotFoundError:
        return False


def _has_died(place: Path) -> bool:
    """Say whether the process that is to be the job has ended, as far as this machine can tell."""
    if not (place / "process").exists():
        return False
    host, _, number = (place / "process").read_text().partition(" ")
    if host != host_name() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
        return "\nState:\tZ" in Path(f"/proc/{number}/status").read_text()  # ended, and its parent has not looked
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's, or a system without /proc
        return False
