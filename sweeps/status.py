"""What every run of a sweep is doing, read from its files and from the job queue; imports no torch."""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.failures import FailureKind
from sweeps.branches import branch_of, hold_of
from sweeps.confirmations import partly_chosen
from sweeps.printing import counted, narrow_table
from sweeps.run_status import RunStatus, read_run_status
from sweeps.states import QueuedRun, queued_reason, read_queue
from sweeps.store import RESULTS, State, SweepFolder

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES = {
    State.RUNNING: "cyan",
    State.FINISHED: "green",
    State.FAILED: "bold red",
    State.DIVERGED: "yellow",
    State.INTERRUPTED: "magenta",
    State.REQUEUED: "magenta",
    State.QUEUED: "blue",
    State.TIMED_OUT: "red",
    State.LOST: "bold red",
    State.CANCELLED: "red",
    State.WAITING: "blue",
    State.BLOCKED: "bold red",
    State.STALE: "yellow",
}


@dataclass(frozen=True)
class SweepStatus:
    """A sweep and its runs, in the order of its manifest; `problem` is why Slurm did not answer, `chooser` the task
    that is to choose the confirmations, where they are not listed yet; `partly_chosen` says that they were chosen from
    part of the grid.
    """

    name: str
    folder: Path
    runs: tuple[RunStatus, ...]
    problem: str | None = None
    chooser: QueuedRun | None = None
    partly_chosen: tuple[str, ...] = ()

    @property
    def confirmations(self) -> list[str]:
        """What is to be said of the confirmations: that they are not chosen yet, or were before the grid was done."""
        return [confirmations_in_words(self.chooser)] if self.chooser else list(self.partly_chosen)

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more: all runs have their results, and none is to come."""
        return all(run.state in RESULTS for run in self.runs) and not (self.chooser and self.chooser.is_live)

    def counts(self) -> Counter[State]:
        return Counter(run.state for run in self.runs)

    def cells(self) -> dict[tuple[str, int], list[RunStatus]]:
        """Return the runs of each optimizer and batch."""
        cells: dict[tuple[str, int], list[RunStatus]] = {}
        for run in sorted(self.runs, key=lambda run: (run.optimizer, run.global_batch_tokens)):
            cells.setdefault((run.optimizer, run.global_batch_tokens), []).append(run)
        return cells

    def of(self, optimizers: Container[str]) -> "SweepStatus":
        """Return the part with these optimizers."""
        return replace(self, runs=tuple(run for run in self.runs if run.optimizer in optimizers))


def read_status(folder: SweepFolder) -> SweepStatus:
    """Ask Slurm where it has something of the sweep, then read its folder: what has ended by then has left its files.

    Raises: ValueError when no sweep is there.
    """
    manifest, queue = folder.read_manifest(), read_queue(folder.path)
    runs = tuple(_held(read_run_status(folder.run(run.run_id), run, queue), folder) for run in manifest.runs)
    chooser = None if any(run.stage == "confirm" for run in manifest.runs) else queue.chooser
    return SweepStatus(manifest.name, folder.path, runs, queue.problem, chooser, tuple(partly_chosen(folder)))


def _held(status: RunStatus, folder: SweepFolder) -> RunStatus:
    """Say of a branch that nobody has had in hand that it waits for its trunk, or why it never can start."""
    if status.state not in (State.PLANNED, State.QUEUED):
        return status
    run = folder.run(status.run_id)
    hold = hold_of(run, branch_of(run))
    if hold is None or (status.state == State.QUEUED and not hold.is_final):
        return status
    return replace(status, state=State.BLOCKED if hold.is_final else State.WAITING, reason=hold.words)


def sweep_folders(results: Path) -> list[SweepFolder]:
    """Return the sweeps in a results folder, by name."""
    return [SweepFolder(path.parent) for path in sorted(results.glob("*/sweep.json"))]


def as_json(status: SweepStatus, listed: Iterable[RunStatus]) -> dict[str, Any]:
    """Return the counts of all runs, and each of those `listed`."""
    counts = status.counts()
    return {
        "sweep": status.name,
        "folder": str(status.folder),
        "counts": {str(each): counts[each] for each in State},
        "problem": status.problem,
        "confirmations": " ".join(status.confirmations) or None,
        "runs": [vars(run) for run in listed],
    }


def counts_in_words(counts: Counter[State]) -> str:
    """Say `12 of 64 done, 3 running`, with what went wrong where something did."""
    done = counts[State.FINISHED] + counts[State.DIVERGED]
    others = [State.RUNNING, *(each for each in State if each not in (State.RUNNING, State.FINISHED))]
    return ", ".join(
        [f"{done} of {counts.total()} done", *(f"{counts[each]} {each}" for each in others if counts[each])]
    )


def cells_table(status: SweepStatus) -> "RenderableType":
    """Return counts by state for every optimizer (rows) and batch (columns)."""
    from rich.console import Group
    from rich.text import Text

    cells = status.cells()
    batches = sorted({batch for _, batch in cells})
    table = narrow_table()
    table.add_column("optimizer\n\\ batch tokens")
    for batch in batches:
        table.add_column(f"{batch:,}", justify="right")
    for optimizer in sorted({optimizer for optimizer, _ in cells}):
        table.add_row(optimizer, *(_cell_in_words(cells.get((optimizer, batch), [])) for batch in batches))
    return Group(Text(f"{status.name}: {counts_in_words(status.counts())}"), table)


def runs_table(runs: Iterable[RunStatus]) -> "RenderableType":
    """Return a row for each run, at most 80 columns wide; with its node where it has a job."""
    table = narrow_table()
    table.add_column("optimizer", no_wrap=True)
    for heading in ("batch\ntokens", "rate", "seed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", min_width=len(State.INTERRUPTED), overflow="fold")
    table.add_column("tokens", justify="right")
    for heading in ("loss\n(nats)", "tokens/s", "time left\n(at most)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.optimizer,
            f"{run.global_batch_tokens:,}",
            f"{run.peak_lr:.4g}",
            f"{run.init_seed}" if run.init_seed == run.data_seed else f"{run.init_seed}.{run.data_seed}",
            _styled(run.state, str(run.state)) + (f"\non {run.node}" if run.job and run.node else ""),
            f"{run.tokens_seen:,} of {'–' if run.realized_tokens is None else f'{run.realized_tokens:,}'}",
            "–" if run.loss_nats is None else f"{run.loss_nats:.3f}",
            "–" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            "–" if run.seconds_left is None else duration(run.seconds_left),
        )
    return table


def jobs_in_words(runs: Iterable[RunStatus]) -> list[str]:
    """Return a line for each node that has jobs of the sweep, and for each reason why some wait."""
    live = [run for run in runs if run.job and run.state in (State.RUNNING, State.QUEUED, State.REQUEUED)]
    groups = Counter((run.state, run.node, run.reason) for run in live)
    return [
        f"{counted(number, 'run')} {each}{f' on {node}' if node else ''}{f': {reason}' if reason else ''}"
        for (each, node, reason), number in groups.items()
    ]


def confirmations_in_words(chooser: QueuedRun) -> str:
    """Say what becomes of confirmations that are not chosen yet."""
    if chooser.is_live:
        return f"Confirmations are chosen by job {chooser.task_id} when the grid is done."
    return f"Confirmations are not chosen: {queued_reason(chooser)}; critbatch submit queues them again"


def failures(runs: Iterable[RunStatus], folder: Path) -> list[str]:
    """Return a line for each failed run: why, and where its log is."""
    failed = [run for run in runs if run.state == State.FAILED]
    return [
        f"{_failed_in_words(run)}: {run.reason} (log: {folder / 'runs' / run.run_id / 'log.txt'})" for run in failed
    ]


def blocked(runs: Iterable[RunStatus]) -> list[str]:
    """Return a line for each reason why branches cannot start, as one for each trunk."""
    reasons = Counter(run.reason for run in runs if run.state == State.BLOCKED)
    return [f"{number:,} branch{'' if number == 1 else 'es'} blocked: {reason}" for reason, number in reasons.items()]


def stopped(runs: Sequence[RunStatus]) -> list[str]:
    """Return a line for each state in which runs wait for somebody to start them again, with one of the reasons."""
    states = (State.PLANNED, State.INTERRUPTED, State.TIMED_OUT, State.LOST, State.CANCELLED, State.STALE)
    found = [chosen for each in states if (chosen := [run for run in runs if run.state == each and run.reason])]
    return [f"{counted(len(each), 'run')} {each[0].state}, as {each[0].run_id}: {each[0].reason}" for each in found]


def duration(seconds: float) -> str:
    """Write seconds as 45 s, 3 min 05 s or 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _failed_in_words(run: RunStatus) -> str:
    known = run.failure_kind not in (None, FailureKind.OTHER)
    return f"{run.run_id} failed ({run.failure_kind})" if known else f"{run.run_id} failed"


def _cell_in_words(runs: Sequence[RunStatus]) -> str:
    if not runs:
        return "–"
    counts = Counter(run.state for run in runs)
    return "\n".join(_styled(each, f"{counts[each]} {each}") for each in State if counts[each])


def _styled(state: State, text: str) -> str:
    style = _STYLES.get(state)
    return f"[{style}]{text}[/]" if style else text
