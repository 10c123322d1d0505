"""Training that takes no time: stands in for `harness.train:train` in the tests of pools and launchers.

Reads what to do from `behaviour.txt` in the sweep's folder, one word: so that it can change between attempts.
"""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

from harness.config import MachineConfig, RunConfig
from harness.failures import DataError, TooLargeError
from harness.record import EVALUATION_COLUMNS, RUN_COLUMNS, RunFolder, append_row, read_json, write_json

_ERRORS = {
    "raise": ValueError("the corpus has been moved"),
    "out-of-memory": TooLargeError("a micro-batch of one sequence is too large"),
    "bad-corpus": DataError("the corpus is not what it was"),
    "full-disk": OSError(errno.ENOSPC, "No space left on device"),
}


class Stopped(BaseException):
    """As `harness.callbacks.interruption.Interrupted`: raised when the checkpoint is complete."""


def train(run: RunConfig, machine: MachineConfig, folder: Path) -> str:
    """Do as `behaviour.txt` says, by default finish; count attempts in `attempts.txt`."""
    with (folder / "attempts.txt").open("a") as file:
        file.write(f"{os.getpid()} {machine.threads} {os.environ.get('OMP_NUM_THREADS')}\n")
    print(f"training {run.run_id}")
    if RunFolder(folder).run.exists() and read_json(RunFolder(folder).run)["status"] == "finished":
        return "finished"  # as harness.train: what is over is not trained again
    behaviour = folder.parent.parent / "behaviour.txt"
    action = behaviour.read_text().strip() if behaviour.exists() else "finish"
    _fail(action, run, folder)
    if action == "wait":
        _wait_for_a_signal(RunFolder(folder))
    if action == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / "deaf").touch()
        time.sleep(60)
    if action == "slow":
        time.sleep(0.5)
    if action == "diverge-after-the-first-branch" and run.keep_at_tokens:
        return _diverge(run, RunFolder(folder))
    for tokens in () if action == "keep-nothing" else run.keep_at_tokens:
        RunFolder(folder).kept(tokens).write_text("whole")
        if action == "wait-for-a-branch":
            _wait_for_a_branch(folder)
    finish(run, RunFolder(folder))
    return "finished"


def _diverge(run: RunConfig, files: RunFolder) -> str:
    """Keep the first of a trunk's states, and diverge a step later."""
    first = run.keep_at_tokens[0]
    files.kept(first).write_text("whole")
    finish(run, files)
    how = {"status": "diverged", "stop_reason": "non_finite_loss", "tokens_seen": first + run.global_batch_tokens}
    write_json(files.run, read_json(files.run) | how)
    return "diverged"


def _wait_for_a_branch(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while not any("branched_" in path.read_text() for path in folder.parent.glob("*/run.json")):
        if time.monotonic() > deadline:
            raise TimeoutError("no branch ran while its trunk was trained")
        time.sleep(0.05)


def _fail(action: str, run: RunConfig, folder: Path) -> None:
    attempt = len((folder / "attempts.txt").read_text().splitlines())
    if action in _ERRORS and run.optimizer.name == "muon":
        raise _ERRORS[action]
    if action == "exit":
        os._exit(3)
    if action == "kill" or (action == "exit-once" and attempt == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "kill-at-each-checkpoint" and attempt < 4:
        RunFolder(folder).checkpoint.write_text(f"{attempt}")
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "stop-often" and attempt < 4:
        os.kill(os.getpid(), [signal.SIGTERM, signal.SIGUSR2][attempt % 2])


def finish(run: RunConfig, files: RunFolder, loss: float = 2.0) -> None:
    """Write the record of a finished run: its last evaluation and the completed row."""
    row = dict.fromkeys(EVALUATION_COLUMNS)
    append_row(files.evaluations, row | {"run_id": run.run_id, "step": run.steps, "val_loss_nats": loss})
    known = {"status": "finished", "stop_reason": "budget", "tokens_seen": run.realized_tokens}
    speed = {"step": run.steps, "train_seconds": 2.0, "flops_per_token": 1e6, "optimizer_flops_per_step": 0.0}
    write_json(files.run, dict.fromkeys(RUN_COLUMNS) | science(run) | known | speed)
    files.checkpoint.unlink(missing_ok=True)


def science(run: RunConfig) -> dict[str, Any]:
    """Return what an analysis asks of a record."""
    of_run = ("run_id", "global_batch_tokens", "token_budget", "realized_tokens", "protocol", "init_seed", "data_seed")
    return {name: getattr(run, name) for name in of_run} | {
        "model": run.model_name,
        "optimizer": run.optimizer.name,
        "peak_lr": run.optimizer.peak_lr,
        "schedule": run.schedule.kind,
        "averaging": run.averaging.kind,
        "precision": run.precision,
        "science_version": run.science_version,
        "config_json": run.model_dump_json(),
    }


def _wait_for_a_signal(files: RunFolder) -> None:
    signalled: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signalled.append(number))
    files.progress.write_text('{"step": 1, "tokens_seen": 256, "tokens_per_second": 64.0}')
    while not signalled:
        time.sleep(0.02)
    files.checkpoint.write_text("whole")
    raise Stopped
