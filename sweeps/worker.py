"""A worker: a process that trains one run after another, so that torch is imported once.

It holds the claim of the run that it trains, keeps that run's output in its log, and turns a failure into a file.
Ctrl-C is the parent's business; SIGTERM and SIGUSR2 end it once the run has saved its checkpoint.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import NoReturn

from harness import STOPPED
from harness.config import MachineConfig, RunConfig
from harness.failures import is_unwritable, kind_of, reason_of
from harness.record import RunFolder
from sweeps.distributed import train_distributed
from sweeps.store import State, claim, read_machine, read_run, record_failure, remove_broken_record, result_state

Train = Callable[[RunConfig, MachineConfig, Path], str]

#: What asks a worker to save and leave: the machine that goes down, and a time limit that comes near.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def serve(runs: Connection, train: str, environment: dict[str, str]) -> None:
    """Train the run folders that arrive, until None or the end of the parent; answer each with the state it is left in,
    or with the ValueError that says why nothing can be written.

    `train` is `module:function`, imported here and not by the parent. `environment` is set before anything heavy is
    imported.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _stop_on_signals()
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    os.environ.update(environment)
    with contextlib.suppress(EOFError, BrokenPipeError), _quiet_stop():
        while (folder := runs.recv()) is not None:
            try:
                outcome: State | ValueError = attempt(RunFolder(Path(folder)), train)
            except ValueError as error:
                outcome = error
            _stop_on_signals()  # training has its own handlers
            runs.send(outcome)


def attempt(run: RunFolder, train: str) -> State:
    """Train one run unless another process does or did; return where it stands. A failure is recorded, not raised.

    Raises: ValueError, one line, when the run's folder cannot be written: then nothing can be recorded either.
    """
    with writing(run), claim(run) as descriptor:
        if descriptor is None:
            return State.RUNNING
        with _output_to(run.log):
            try:
                run.failure.unlink(missing_ok=True)
                remove_broken_record(run)
                return result_state(run) or State(_train(run, train, descriptor))
            except Exception as error:
                if is_unwritable(error):
                    raise
                traceback.print_exc()
                sys.stderr.flush()
                record_failure(run, reason_of(error), kind_of(error))
                return State.FAILED


@contextlib.contextmanager
def writing(run: RunFolder) -> Iterator[None]:
    """Turn the system's refusal to write into a ValueError."""
    try:
        yield
    except OSError as error:
        if not is_unwritable(error):
            raise
        raise ValueError(
            f"{run.path} cannot be written ({error.strerror}); make room or get the right to write, then start again: "
            f"what is complete is kept, and the run goes on from its last checkpoint"
        ) from None


def _train(run: RunFolder, train: str, descriptor: int) -> str:
    config, machine = read_run(run), read_machine(run)
    if machine.devices > 1:
        return train_distributed(run, machine.devices, descriptor)
    module, _, function = train.partition(":")
    chosen: Train = getattr(importlib.import_module(module), function)
    return chosen(config, machine, run.path)


@contextlib.contextmanager
def _quiet_stop() -> Iterator[None]:
    """Leave without a traceback when asked to: training raises `Interrupted`, no Exception, after its checkpoint."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        raise SystemExit(STOPPED) from None


def _leave_with_the_parent() -> None:
    """Stop this process, once its run is saved, when the parent has been killed: nobody else would."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _stop_on_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # it is leaving; a second one must not keep it from waiting for others
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
