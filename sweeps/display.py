"""What `critbatch run` shows while runs are trained: a live table on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sweeps.run_status import RunStatus
from sweeps.status import SweepStatus, cells_table, counts_in_words, duration, read_status, runs_table
from sweeps.store import RESULTS, State, SweepFolder

if TYPE_CHECKING:
    from rich.console import RenderableType

_LIVE_SECONDS = 1.0
_PLAIN_SECONDS = 30.0
_WATCH_SECONDS = 2.0

Tick = Callable[[], None]


@contextmanager
def shown(folder: SweepFolder) -> Iterator[Tick]:
    """Show the sweep while the block lasts; the block calls the tick that it gets as often as it likes."""
    if sys.stdout.isatty():
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            yield _every(_LIVE_SECONDS, lambda: live.update(_picture(read_status(folder)), refresh=True))
            live.update(_picture(read_status(folder)), refresh=True)
    else:
        lines = PlainLines(folder)
        yield _every(_LIVE_SECONDS, lines.tick)
        lines.tick()


def watch(picture: "Callable[[], tuple[RenderableType, bool]]") -> None:
    """Show what `picture` returns, anew every two seconds, until it says that nothing will change any more."""
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            drawn, is_over = picture()
            live.update(drawn, refresh=True)
            if is_over:
                return
            time.sleep(_WATCH_SECONDS)


class PlainLines:
    """Prints a line for every run that ended, and one about the sweep now and then."""

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        self._ended = {run.run_id for run in read_status(folder).runs if run.state in RESULTS}
        self._started_at = self._said_at = time.monotonic()

    def tick(self) -> None:
        status = read_status(self._folder)
        for run in status.runs:
            if run.state in RESULTS | {State.FAILED} and run.run_id not in self._ended:
                self._ended.add(run.run_id)
                print(_ended_in_words(run), flush=True)
        if time.monotonic() - self._said_at > _PLAIN_SECONDS:
            self._said_at = time.monotonic()
            print(f"[{duration(self._said_at - self._started_at)}] {counts_in_words(status.counts())}", flush=True)


def _picture(status: SweepStatus) -> "RenderableType":
    from rich.console import Group

    running = [run for run in status.runs if run.state == State.RUNNING]
    return Group(cells_table(status), runs_table(running)) if running else cells_table(status)


def _ended_in_words(run: RunStatus) -> str:
    loss = "" if run.loss_nats is None else f", loss {run.loss_nats:.3f} nats"
    reason = f" ({run.reason})" if run.reason else ""
    return f"{run.state} {run.run_id} at {run.tokens_seen:,} tokens{loss}{reason}"


def _every(seconds: float, action: Tick) -> Tick:
    last = float("-inf")

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            action()
            last = time.monotonic()

    return tick
