"""A worker: a process that trains one run after another, so that torch is imported once.

It holds the claim of the run that it trains, keeps that run's output in its log, and turns a failure into a file.
Ctrl-C is the parent's business; SIGTERM ends it once the run has saved its checkpoint.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import NoReturn

from harness import STOPPED
from harness.config import MachineConfig, RunConfig
from harness.record import RunFolder
from sweeps.store import State, claim, read_machine, read_run, record_failure, remove_broken_record, result_state

Train = Callable[[RunConfig, MachineConfig, Path], str]

_LONGEST_REASON = 300


def serve(runs: Connection, train: str, environment: dict[str, str]) -> None:
    """Train the run folders that arrive, until None or the end of the parent; answer each with the state it is left in.

    `train` is `module:function`, imported here and not by the parent. `environment` is set before anything heavy is
    imported.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, _stop)
    with contextlib.suppress(EOFError, BrokenPipeError), _quiet_stop():
        while (folder := runs.recv()) is not None:
            outcome = attempt(RunFolder(Path(folder)), train)
            signal.signal(signal.SIGTERM, _stop)  # training has its own handler
            runs.send(outcome)


def attempt(run: RunFolder, train: str) -> State:
    """Train one run unless another process does or did; return where it stands. A failure is recorded, not raised."""
    with claim(run) as descriptor:
        if descriptor is None:
            return State.RUNNING
        with _output_to(run.log):
            try:
                run.failure.unlink(missing_ok=True)
                remove_broken_record(run)
                return result_state(run) or State(_train(run, train, descriptor))
            except Exception as error:
                traceback.print_exc()
                sys.stderr.flush()
                record_failure(run, _one_line(error))
                return State.FAILED


def _train(run: RunFolder, train: str, descriptor: int) -> str:
    config, machine = read_run(run), read_machine(run)
    if machine.devices > 1:
        return _train_distributed(run, machine.devices, descriptor)
    module, _, function = train.partition(":")
    chosen: Train = getattr(importlib.import_module(module), function)
    return chosen(config, machine, run.path)


def _train_distributed(run: RunFolder, devices: int, descriptor: int) -> str:
    """Train in one process for each device, below this one. They keep the claim if this process is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    child = subprocess.Popen([*command, "-m", "harness.train", str(run.path)], pass_fds=(descriptor,))
    try:
        status = child.wait()
    except SystemExit:
        child.terminate()
        child.wait()
        raise
    if status != 0:
        raise RuntimeError(f"{devices} processes ended with status {status}; {run.log} says why")
    return result_state(run) or State.INTERRUPTED


@contextlib.contextmanager
def _quiet_stop() -> Iterator[None]:
    """Leave without a traceback when asked to: training raises `Interrupted`, no Exception, after its checkpoint."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        raise SystemExit(STOPPED) from None


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise SystemExit(STOPPED)


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send everything that this process and its children write to `log`."""
    kept = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        _redirect(file.fileno(), file.fileno())
    try:
        yield
    finally:
        _redirect(*kept)
        for descriptor in kept:
            os.close(descriptor)


def _redirect(stdout: int, stderr: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    named = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
    return named if len(named) <= _LONGEST_REASON else named[:_LONGEST_REASON] + " …"
