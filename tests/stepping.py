"""Training without torch that can be interrupted: each step's value follows from the one before, so that a step that
is lost, repeated or resumed from the wrong place shows in the curve.

`STEP_SECONDS` in the environment is how long a step takes. With `behaviour.txt` in the sweep's folder saying `fail`,
runs of Muon raise; with `die`, they kill their process; with `refuse at step N: WORDS`, the system refuses to write
then, in these words of its own.
"""

import errno
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from harness.config import MachineConfig, RunConfig
from harness.record import EVALUATION_COLUMNS, RUN_COLUMNS, RunFolder, append_row, read_json, trim_rows, write_json
from tests.fake_training import science


class Stopped(BaseException):
    """As `harness.callbacks.interruption.Interrupted`: raised when the checkpoint is complete."""


def train(run: RunConfig, machine: MachineConfig, folder: Path) -> str:
    """Take the steps that are left; save once a second, and when SIGTERM or SIGUSR2 asks to stop."""
    del machine
    files, signalled = RunFolder(folder), []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: signalled.append(number))
    _misbehave(run, folder.parent.parent / "behaviour.txt")
    state = _start(run, files)
    saved_at = time.monotonic()
    while state["step"] < run.steps:
        _refuse(state["step"], folder.parent.parent / "behaviour.txt")
        state = _step(run, files, state)
        if signalled or time.monotonic() - saved_at > 1.0:
            write_json(files.checkpoint, state)
            saved_at = time.monotonic()
        if signalled:
            raise Stopped
    write_json(files.run, read_json(files.run) | {"status": "finished", "stop_reason": "budget", **_end(run)})
    files.checkpoint.unlink(missing_ok=True)
    return "finished"


def curve(run: RunConfig) -> list[float]:
    """Return the losses of a run that nothing disturbs."""
    value, losses = "", []
    for step in range(1, run.steps + 1):
        value = _next(value, step)
        losses.append(_loss(value))
    return losses


def _start(run: RunConfig, files: RunFolder) -> dict[str, Any]:
    state = read_json(files.checkpoint) if files.checkpoint.exists() else {"step": 0, "value": ""}
    before = read_json(files.run) if files.run.exists() else {}
    resumes = before["resumes"] + 1 if before and state["step"] else 0
    record = {"status": "running", "resumes": resumes, "code_commit": _code()}
    write_json(files.run, dict.fromkeys(RUN_COLUMNS) | science(run) | record)
    trim_rows(files.evaluations, state["step"])
    return state


def _step(run: RunConfig, files: RunFolder, state: dict[str, Any]) -> dict[str, Any]:
    time.sleep(float(os.environ.get("STEP_SECONDS", "0.05")))
    step, value = state["step"] + 1, _next(state["value"], state["step"] + 1)
    seen = step * run.global_batch_tokens
    row = {"run_id": run.run_id, "step": step, "tokens_seen": seen, "val_loss_nats": _loss(value)}
    append_row(files.evaluations, dict.fromkeys(EVALUATION_COLUMNS) | row)
    files.progress.write_text(json.dumps({"step": step, "tokens_seen": seen, "tokens_per_second": 1000.0}))
    return {"step": step, "value": value}


def _end(run: RunConfig) -> dict[str, Any]:
    return {"step": run.steps, "tokens_seen": run.realized_tokens, "train_seconds": 1.0}


def _misbehave(run: RunConfig, behaviour: Path) -> None:
    action = behaviour.read_text().strip() if behaviour.exists() and run.optimizer.name == "muon" else ""
    if action == "fail":
        raise ValueError("the corpus has been moved")
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def _refuse(step: int, behaviour: Path) -> None:
    action = behaviour.read_text() if behaviour.exists() else ""
    if action.startswith(f"refuse at step {step}: "):
        words = action.partition(": ")[2]
        raise OSError(next(each for each in (errno.ENOSPC, errno.EROFS) if os.strerror(each) == words), words)


def _next(value: str, step: int) -> str:
    return hashlib.sha256(f"{value}{step}".encode()).hexdigest()


def _loss(value: str) -> float:
    return int(value[:8], 16) / 2**32


def _code() -> str:
    import sweeps

    return str(Path(sweeps.__file__ or "").parents[1].name)
