"""The processes of a run on several devices: one for each, below this process or wherever a cluster starts them."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time

from harness import STOPPED
from harness.failures import FailureKind
from harness.halving import micro_batch_halvings, start_smaller
from harness.record import RunFolder, read_json
from sweeps.crashes import CRASHES_ALLOWED, Crashes
from sweeps.oom_kills import oom_kills
from sweeps.store import State, record_failure, result_state

#: The variable with a command that starts the processes in a way of its own: `… DEVICES FOLDER`.
LAUNCHER = "CRITBATCH_LAUNCHER"

#: What such a command exits with when it knows that one of the processes was killed as memory ran out.
OUT_OF_MEMORY = 71

#: Once one process has ended, the others have as long to end too: they may wait for it without end.
ENDED_WITHIN_SECONDS = 30.0

#: Ends that say nothing is wrong: done, or stopped by a signal, before training could listen to it or after.
_IN_ORDER = (0, STOPPED, -signal.SIGTERM, -signal.SIGUSR2)

#: How Gloo, NCCL and PyTorch say that another process is gone, killed with its node, or out of reach.
_LOST_CONNECTION_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "NetworkError",
)


def train_distributed(run: RunFolder, devices: int, claim: int) -> State:
    """Train in one process for each device; return where the run stands. They keep the descriptor `claim` if this
    process is killed.

    When memory has run out on one of them, all start anew, with half the micro-batch. When one was killed or lost, all
    go on from the checkpoint, as often as a run on one device.

    Raises: TooLargeError when the kernel has killed one of them for want of memory, and no smaller one may be tried.
    """
    crashes = Crashes()
    while True:
        halvings, kills = micro_batch_halvings(run), oom_kills()
        status = _train_once(run, devices, claim)
        is_memory = status == OUT_OF_MEMORY or (status == -signal.SIGKILL and oom_kills() > kills)
        if is_memory and run.run.exists():
            print(start_smaller(run, read_json(run.run)), flush=True)
        if micro_batch_halvings(run) == halvings:
            if not _has_crashed(run, status) or crashes.add(run) > CRASHES_ALLOWED:
                break
            print(f"one of {devices} processes was killed or lost; all are started once more", flush=True)
        run.failure.unlink(missing_ok=True)  # of one that lost its connection to the one without memory
    return _outcome(run, devices, status)


def _outcome(run: RunFolder, devices: int, status: int) -> State:
    """Return where the run stands when a process has ended with `status`, the first to end; record a failure."""
    if status in _IN_ORDER and not run.failure.exists():
        return result_state(run) or State.INTERRUPTED
    if status == OUT_OF_MEMORY:
        record_failure(run, f"memory ran out on one of {devices} processes", FailureKind.OUT_OF_MEMORY)
    elif (killed_by := _killed_by(status)) > 0:  # what the others say is that they lost their connection to it
        doubt = " (out of memory? nobody says so)" if killed_by == signal.SIGKILL else ""
        record_failure(run, f"one of {devices} processes was killed by {signal.Signals(killed_by).name}{doubt}")
    elif run.failure.exists():  # written again, now that the log is complete
        said = read_json(run.failure)
        record_failure(run, said["reason"], FailureKind(said["kind"]))
    else:
        record_failure(run, f"one of {devices} processes ended with status {status}; {run.log} says why")
    return State.FAILED


def _has_crashed(run: RunFolder, status: int) -> bool:
    """Say whether a process was killed, or lost the others, rather than failed."""
    if not run.failure.exists():
        return status not in _IN_ORDER and _killed_by(status) > 0
    return _killed_by(status) > 0 or is_of_a_lost_connection(read_json(run.failure)["reason"])


def is_of_a_lost_connection(reason: str) -> bool:
    """Say whether a process failed as it lost the others, through no fault of its own."""
    return any(words in reason for words in _LOST_CONNECTION_WORDS)


def _killed_by(status: int) -> int:
    """Return the signal that killed a process below this one, or one that a shell or srun saw; else 0 or less."""
    return -status if status < 0 else status - 128


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as trial:
        trial.bind(("", 0))
        return int(trial.getsockname()[1])


def _train_once(run: RunFolder, devices: int, claim: int) -> int:
    """Return the exit status of the process that ended first, which is the one to blame. Left by SystemExit, it stops
    the processes first.
    """
    processes = _start(run, devices, claim)
    try:
        return _wait(processes)
    except SystemExit:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        run.failure.unlink(missing_ok=True)  # of one that lost its connection to another that had left already
        raise


def _start(run: RunFolder, devices: int, claim: int) -> list["subprocess.Popen[bytes]"]:
    if LAUNCHER in os.environ:
        command = [*shlex.split(os.environ[LAUNCHER]), str(devices), str(run.path)]
        return [subprocess.Popen(command, pass_fds=(claim,))]
    command = [sys.executable, "-m", "harness.train", str(run.path)]
    environments = _rank_variables(devices)
    return [subprocess.Popen(command, pass_fds=(claim,), env=os.environ | each) for each in environments]


def _rank_variables(devices: int) -> list[dict[str, str]]:
    """Say to each process which one it is, in torchrun's words."""
    of_all = {
        "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "local",
    }
    return [of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(devices)]


def _wait(processes: list["subprocess.Popen[bytes]"]) -> int:
    """Return the status of the process that ended first; those that do not follow in time are killed."""
    while not (ended := [process for process in processes if process.poll() is not None]):
        time.sleep(0.05)
    end = time.monotonic() + ENDED_WITHIN_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return ended[0].returncode
