"""How a run begins, goes on and ends: the checks before anything is computed, and the files that say where it
stands.
"""

import errno
import json
import os
import zipfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from harness.branches import kept_state
from harness.config import MachineConfig, RunConfig
from harness.corpus import Corpus
from harness.halving import micro_batch_halvings
from harness.identity import SCIENCE_VERSION
from harness.origin import provenance
from harness.processes import is_first
from harness.provenance import routing_table
from harness.record import RunFolder, Value, append_line, read_json, write_json

#: What must not change between a checkpoint and the resumption, for the sums to come out the same bit for bit.
SAME_ON_RESUME = (
    "run_id",
    "num_devices",
    "micro_batch_tokens",
    "accumulation",
    "threads",
    "compiled",
    "torch_version",
)

#: Columns of a record that may differ from one start of a run to the next.
OF_A_START = ("host", "job_id", "device", "driver", "cuda_version", "num_devices", "micro_batch_tokens")


def finished_status(files: RunFolder) -> str | None:
    """Return `finished` or `diverged` for a run that is over, else null."""
    status = read_json(files.run)["status"] if files.run.exists() else "running"
    return None if status == "running" else str(status)


def check_identity(run: RunConfig, corpus: Corpus) -> None:
    """Raise ValueError when the run would not be the one that its run_id names."""
    if run.science_version != SCIENCE_VERSION:
        raise ValueError(
            f"the run is of science_version {run.science_version}, this code is {SCIENCE_VERSION} and gives other "
            f"numbers; use the code of then, or plan the sweep again"
        )
    if run.corpus.fingerprint != corpus.fingerprint:
        raise ValueError(
            f"corpus.fingerprint is not in the configuration, so that its run_id does not name the text; "
            f"it is {corpus.fingerprint}"
        )
    if run.model.known_vocab_size < corpus.vocab_size:
        raise ValueError(
            f"model.vocab_size {run.model.known_vocab_size} is less than the {corpus.vocab_size} of the corpus; "
            f"raise it to that"
        )


def start(files: RunFolder, run: RunConfig, machine: MachineConfig, row: dict[str, Value]) -> dict[str, Value]:
    """Write what is known at the start (first process), or check that a resumption computes the same sums; return the
    row.
    """
    before = _record_of_checkpoint(files, row) if files.checkpoint.exists() else None
    drop_damaged_checkpoint(files.checkpoint)
    if before and files.checkpoint.exists():
        row |= {"started_at": before["started_at"], "resumes": before["resumes"] + 1}
    row["micro_batch_halvings"] = micro_batch_halvings(files)
    if is_first():
        files.path.mkdir(parents=True, exist_ok=True)
        resumed = files.run.exists()
        _remove_partial_files(files)
        append_line(files.starts, _start_of(row))
        write_json(files.config, json.loads(run.model_dump_json()))
        write_json(files.machine, json.loads(machine.model_dump_json()))
        write_json(files.routing, {"tensors": (table := routing_table(run))})
        write_json(files.run, row)
        if not resumed:
            for tensor in table:
                print(*(f"{name} {value}" for name, value in tensor.items()), sep="  ", flush=True)
    return row


def state_to_start_from(files: RunFolder, run: RunConfig) -> Path | None:
    """Return the run's own checkpoint, else the state that it branches off; null for a run that starts from nothing.

    Raises: ValueError when the parent of a branch does not have that state, or it is damaged.
    """
    if files.checkpoint.exists():
        return files.checkpoint
    if run.branch is None:
        return None
    kept = kept_state(run, files)
    if not is_whole(kept):
        raise ValueError(
            f"{run.run_id}: the state of its parent, {kept}, is damaged; move {kept.parent} away to train the parent "
            f"again"
        )
    return kept


def drop_damaged_checkpoint(path: Path) -> None:
    """Set a checkpoint aside that is not whole, and say so: the run starts from the beginning.

    It was whole when it got its name; a disk or a copy has damaged it since. Every process finds the same, without
    asking the others: one that comes when it is gone starts from the beginning too.

    Raises: what the machine could not do, such as to give memory: that says nothing of the file.
    """
    if is_whole(path) is False:
        aside = path.with_name(f"damaged-{path.name}")
        with suppress(FileNotFoundError):
            os.replace(path, aside)
            print(f"{path} was damaged: set aside as {aside.name}; the run starts from the beginning", flush=True)


def is_whole(path: Path) -> bool | None:
    """Tell whether a checkpoint is as it was written; null when it is not there.

    Raises: what the machine could not do, such as to give memory: that says nothing of the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None  # compares the checksum of every tensor
        if whole:
            torch.load(path, mmap=True, weights_only=True)  # reads all but the tensors
    except FileNotFoundError:
        return None
    except Exception as error:
        if _is_of_the_machine(error):
            raise
        return False
    return whole


def _is_of_the_machine(error: Exception) -> bool:
    """Say whether an error in reading a file comes of the machine, not of what is in the file."""
    if isinstance(error, OSError):
        return error.errno != errno.EINVAL  # to seek what is not there
    return isinstance(error, MemoryError) or "mmap" in str(error) or "allocate" in str(error)


def finish(files: RunFolder, row: dict[str, Value]) -> None:
    """Write how the run ended; what served to go on with it is removed."""
    write_json(files.run, row)
    files.checkpoint.unlink(missing_ok=True)
    files.progress.unlink(missing_ok=True)


def _record_of_checkpoint(files: RunFolder, row: dict[str, Value]) -> dict[str, Any]:
    """Return the record of the start before this one. Raises: ValueError when its checkpoint is of other sums."""
    if not files.run.exists():
        raise ValueError(
            f"{files.path}: {files.checkpoint.name} is there without the {files.run.name} that says how it was "
            f"made; remove it to train from the start"
        )
    before = read_json(files.run)
    for name in SAME_ON_RESUME:
        if before[name] != row[name]:
            raise ValueError(
                f"{files.path}: the checkpoint was made with {name} {before[name]}, now it is {row[name]}; "
                f"go on with the same, or remove {files.checkpoint.name} to train from the start"
            )
    if before["device"] != row["device"]:
        if (before["driver"] is None) != (row["driver"] is None):
            raise ValueError(
                f"{files.path}: the checkpoint was made on {before['device']}, and this is {row['device']}: "
                f"one of them is no GPU; go on with the same kind, or remove {files.checkpoint.name} to train from "
                f"the start"
            )
        print(f"Goes on on {row['device']}, before on {before['device']}: sums may round differently", flush=True)
    return before


def _remove_partial_files(files: RunFolder) -> None:
    """Remove what processes left that were killed while they wrote: the names of `write_atomically` and of the
    checkpoints' writer.
    """
    for pattern in ("*.ckpt.*", ".*.*.*"):
        for partial in files.path.glob(pattern):
            partial.unlink()


def _start_of(row: dict[str, Value]) -> dict[str, Any]:
    """Return where and with what code this start is made."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"started_at": now, **{name: row[name] for name in OF_A_START}, **provenance()}
