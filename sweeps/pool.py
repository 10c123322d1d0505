"""Worker processes that share the missing runs of a sweep, also with other pools on the same folder."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

from harness import STOPPED
from harness.config import Branch
from harness.failures import FailureKind, TooLargeError
from harness.halving import start_smaller
from harness.record import RunFolder, read_json
from sweeps.branches import diverge_with_trunk, hold_of, lacking_trunks, trunk_of, waiting
from sweeps.crashes import CRASHES_ALLOWED, Crashes
from sweeps.oom_kills import oom_kills
from sweeps.store import State, claim, is_missing, record_failure, state
from sweeps.worker import STOP_SIGNALS, serve, writing

TRAIN = "harness.train:train"

_TICK_SECONDS = 0.5
_RECHECK_SECONDS = 2.0

#: Ends that were asked for from outside, and are nobody's fault.
_ASKED_TO_END = frozenset({STOPPED, *(-number for number in STOP_SIGNALS)})


class Worker:
    """One worker process, the variables of its slot, and the run that it has in hand."""

    def __init__(self, train: str, environment: dict[str, str]) -> None:
        context = get_context("spawn")
        self.environment = environment
        self.run: RunFolder | None = None
        self.oom_kills_before = oom_kills()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, train, environment))
        with _sigint_ignored():  # inherited: a Ctrl-C must not hit a worker that is still starting
            self.process.start()
        theirs.close()

    def give(self, run: RunFolder) -> None:
        self.run = run
        with suppress(BrokenPipeError):  # it died while idle: `take` will say so
            self.pipe.send(str(run.path.absolute()))

    def take(self) -> tuple[RunFolder, State | None]:
        """Return the run that was in hand and what became of it: None when the worker died on it.

        Raises: ValueError when its folder cannot be written.
        """
        run, self.run = self.run, None
        assert run is not None
        try:
            outcome: State | ValueError = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return run, None
        if isinstance(outcome, ValueError):
            raise outcome
        return run, outcome

    def cause_of_death(self) -> tuple[FailureKind, str]:
        """Return what a dead worker died of, as far as its exit status and the kernel's count of OOM kills tell."""
        exitcode = self.process.exitcode
        if exitcode == STOPPED:
            return FailureKind.OTHER, "as a signal asked it to"
        if exitcode is None or exitcode >= 0:
            return FailureKind.OTHER, f"with exit status {exitcode}"
        name = signal.Signals(-exitcode).name
        if exitcode != -signal.SIGKILL:
            return FailureKind.OTHER, f"by {name}"
        if oom_kills() > self.oom_kills_before:
            return FailureKind.OUT_OF_MEMORY, f"by {name}, as memory ran out (fewer slots take less)"
        return FailureKind.OTHER, f"by {name} (out of memory?)"

    def dismiss(self) -> None:
        with suppress(BrokenPipeError):
            self.pipe.send(None)


class Pool:
    """Trains runs with one worker for each of `environments` (variables set in that worker); a context manager.

    A branch is given to a worker once its trunk has kept the state that it starts from, and till then takes no slot;
    a trunk that nobody trains is trained along with its branches.

    Left by Ctrl-C or SIGTERM (a KeyboardInterrupt too), it calls `stopping` and waits until the runs in hand have saved
    their checkpoints; a second Ctrl-C kills. `died` is told the run and the cause when a worker dies and is replaced.

    Raises: ValueError when a run's folder cannot be written; the other runs save and stop.
    """

    def __init__(
        self,
        environments: Sequence[dict[str, str]],
        train: str = TRAIN,
        stopping: Callable[[], None] = lambda: None,
        died: Callable[[RunFolder, str], None] = lambda _run, _cause: None,
    ) -> None:
        self._train = train
        self._stopping = stopping
        self._died = died
        self._free = deque(environments)
        self._workers: list[Worker] = []
        self._queue: deque[RunFolder] = deque()
        self._elsewhere: list[RunFolder] = []
        self._waiting: dict[RunFolder, Branch] = {}
        self._crashes = Crashes()

    def __enter__(self) -> Self:
        self._sigterm_before = signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._dismiss()
            else:
                self._stop()
        finally:
            signal.signal(signal.SIGTERM, self._sigterm_before)

    def train(self, runs: Iterable[RunFolder], tick: Callable[[], None]) -> None:
        """Return when every run has a result or has failed, here or elsewhere, or is a branch that cannot start any
        more; call `tick` about twice a second.
        """
        missing = [run for run in runs if is_missing(run)]
        self._waiting = waiting(missing)
        self._queue.extend(lacking_trunks(self._waiting, missing))
        self._queue.extend(run for run in missing if run not in self._waiting)
        checked_at = time.monotonic()
        while self._queue or self._elsewhere or self._waiting or self._busy():
            if not self._queue:
                self._admit()
            self._give_out()
            self._collect()
            if time.monotonic() - checked_at > _RECHECK_SECONDS:
                self._look_elsewhere()
                checked_at = time.monotonic()
            tick()

    def _admit(self) -> None:
        """Queue the branches that can start now; give up those whose trunk nobody will bring to where they start."""
        in_hand = {*self._queue, *self._elsewhere, *(worker.run for worker in self._workers)}
        for run, branch in list(self._waiting.items()):
            hold = hold_of(run, branch)
            if hold and (not hold.is_final or trunk_of(run, branch) in in_hand):
                continue
            del self._waiting[run]
            if hold is None:
                self._queue.append(run)
            elif hold.has_diverged:
                with writing(run):
                    diverge_with_trunk(run, branch)

    def _busy(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.run is not None]

    def _give_out(self) -> None:
        idle = [worker for worker in self._workers if worker.run is None]
        while self._queue and (idle or self._free):
            worker = idle.pop() if idle else self._start()
            worker.give(self._queue.popleft())

    def _start(self) -> Worker:
        worker = Worker(self._train, self._free.popleft())
        self._workers.append(worker)
        return worker

    def _collect(self) -> None:
        busy = self._busy()
        if not busy:
            time.sleep(_TICK_SECONDS)
        ready = connection.wait([worker.pipe for worker in busy], timeout=_TICK_SECONDS)
        for worker in busy:
            if worker.pipe in ready:
                self._settle(worker)

    def _settle(self, worker: Worker) -> None:
        run, outcome = worker.take()
        if outcome is None:
            self._workers.remove(worker)
            self._free.append(worker.environment)
            self._died_on(run, worker)
        elif outcome in (State.RUNNING, State.INTERRUPTED):
            self._elsewhere.append(run)

    def _died_on(self, run: RunFolder, worker: Worker) -> None:
        """Queue the run again, or record its failure once it has killed its worker repeatedly at the same place."""
        kind, cause = worker.cause_of_death()
        if kind == FailureKind.OUT_OF_MEMORY and _started_smaller(run):
            cause += "; it starts anew with half the micro-batch"
        elif worker.process.exitcode not in _ASKED_TO_END:
            times = self._crashes.add(run)
            if times > CRASHES_ALLOWED:
                _record(run, f"the worker process died {times} times, the last time {cause}", kind)
                return
        self._died(run, cause)
        self._queue.append(run)

    def _look_elsewhere(self) -> None:
        """Take over the runs that another pool left unfinished."""
        states = [(run, state(run)) for run in self._elsewhere]
        self._elsewhere = [run for run, now in states if now == State.RUNNING]
        self._queue.extend(run for run, now in states if now in (State.PLANNED, State.INTERRUPTED))

    def _dismiss(self) -> None:
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.process.join()

    def _stop(self) -> None:
        self._stopping()
        try:
            for worker in self._workers:
                worker.process.terminate()
                worker.pipe.close()  # a worker that finished its run just now reads the end and leaves
            for worker in self._workers:
                worker.process.join()
        except KeyboardInterrupt:
            for worker in self._workers:
                worker.process.kill()


def slot_environments(
    slots: int, devices_per_run: int, gpus: Sequence[str], threads: int, first: int = 0
) -> list[dict[str, str]]:
    """Return the variables of each slot: its threads, and its GPUs where there are any (slots take turns over them)."""
    environments = []
    for slot in range(first, first + slots):
        environment = {"OMP_NUM_THREADS": str(threads)}
        if gpus:
            chosen = [gpus[(slot * devices_per_run + device) % len(gpus)] for device in range(devices_per_run)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        environments.append(environment)
    return environments


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu and gpu != "-1"]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _record(run: RunFolder, reason: str, kind: FailureKind) -> None:
    with writing(run), claim(run) as held:
        if held is not None and is_missing(run):
            record_failure(run, reason, kind)


def _started_smaller(run: RunFolder) -> bool:
    """Halve the micro-batch of a run that has no checkpoint yet; tell whether that was possible."""
    with writing(run), claim(run) as held:
        if held is None or run.checkpoint.exists() or not run.run.exists() or not is_missing(run):
            return False
        with suppress(TooLargeError):
            start_smaller(run, read_json(run.run))
            return True
    return False


@contextmanager
def _sigint_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt
