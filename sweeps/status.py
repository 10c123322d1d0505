"""What every run of a sweep is doing, read from its files alone; imports no torch."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import RunConfig
from harness.record import PlannedRun, RunFolder, Value, read_json, read_rows
from sweeps.printing import narrow_table
from sweeps.store import RESULTS, State, SweepFolder, failure_reason, read_run, state

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES = {
    State.RUNNING: "cyan",
    State.FINISHED: "green",
    State.FAILED: "bold red",
    State.DIVERGED: "yellow",
    State.INTERRUPTED: "magenta",
}


@dataclass(frozen=True)
class RunStatus:
    """One run at a glance; what is not known is None.

    `loss_nats` is the last validation loss, of the averaged weights where there are any; `seconds_left` is to the end
    of the budget: at most.
    """

    run_id: str
    stage: str
    state: State
    optimizer: str
    global_batch_tokens: int
    peak_lr: float
    init_seed: int
    data_seed: int
    realized_tokens: int
    tokens_seen: int
    loss_nats: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    reason: str | None


@dataclass(frozen=True)
class SweepStatus:
    """A sweep and its runs, in the order of its manifest."""

    name: str
    folder: Path
    runs: tuple[RunStatus, ...]

    def counts(self) -> Counter[State]:
        return Counter(run.state for run in self.runs)

    def cells(self) -> dict[tuple[str, int], list[RunStatus]]:
        """Return the runs of each optimizer and batch."""
        cells: dict[tuple[str, int], list[RunStatus]] = {}
        for run in sorted(self.runs, key=lambda run: (run.optimizer, run.global_batch_tokens)):
            cells.setdefault((run.optimizer, run.global_batch_tokens), []).append(run)
        return cells


def read_status(folder: SweepFolder) -> SweepStatus:
    """Read a sweep's folder. Raises: ValueError when no sweep is there."""
    manifest = folder.read_manifest()
    return SweepStatus(
        manifest.name, folder.path, tuple(_run_status(folder.run(run.run_id), run) for run in manifest.runs)
    )


def sweep_folders(results: Path) -> list[SweepFolder]:
    """Return the sweeps in a results folder, by name."""
    return [SweepFolder(path.parent) for path in sorted(results.glob("*/sweep.json"))]


def as_json(status: SweepStatus) -> dict[str, Any]:
    return {
        "sweep": status.name,
        "folder": str(status.folder),
        "counts": {str(each): status.counts()[each] for each in State},
        "runs": [asdict(run) for run in status.runs],
    }


def counts_in_words(counts: Counter[State]) -> str:
    """Say `3 running, 12 of 64 done`, with what went wrong where something did."""
    done = counts[State.FINISHED] + counts[State.DIVERGED]
    others = (State.RUNNING, State.PLANNED, State.INTERRUPTED, State.DIVERGED, State.FAILED)
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
    """Return a row for each run, at most 80 columns wide."""
    table = narrow_table()
    table.add_column("optimizer", no_wrap=True)
    for heading in ("batch\ntokens", "rate", "seed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("tokens", justify="right")
    for heading in ("loss\n(nats)", "tokens/s", "time left\n(at most)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.optimizer,
            f"{run.global_batch_tokens:,}",
            f"{run.peak_lr:.4g}",
            f"{run.init_seed}" if run.init_seed == run.data_seed else f"{run.init_seed}.{run.data_seed}",
            _styled(run.state, str(run.state)),
            f"{run.tokens_seen:,} of {run.realized_tokens:,}",
            "–" if run.loss_nats is None else f"{run.loss_nats:.3f}",
            "–" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            "–" if run.seconds_left is None else duration(run.seconds_left),
        )
    return table


def failures(runs: Iterable[RunStatus], folder: Path) -> list[str]:
    """Return a line for each failed run: why, and where its log is."""
    failed = [run for run in runs if run.state == State.FAILED]
    return [f"{run.run_id} failed: {run.reason} (log: {folder / 'runs' / run.run_id / 'log.txt'})" for run in failed]


def duration(seconds: float) -> str:
    """Write seconds as 45 s, 3 min 05 s or 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _run_status(run: RunFolder, planned: PlannedRun) -> RunStatus:
    now = state(run)
    return _ended(run, planned, now) if now in RESULTS else _status(run, planned, now, _progress(run))


@cache
def _ended(run: RunFolder, planned: PlannedRun, now: State) -> RunStatus:
    """Read a run that has its result, which does not change any more: once."""
    return _status(run, planned, now, read_json(run.run))


def _status(run: RunFolder, planned: PlannedRun, now: State, latest: dict[str, Any]) -> RunStatus:
    """Put together what is known; `latest` is the record of a run that ended, else its last progress."""
    config, seen, speed = _config(run), int(latest.get("tokens_seen") or 0), latest.get("tokens_per_second")
    running = now == State.RUNNING
    reason = failure_reason(run) if now == State.FAILED else latest.get("stop_reason")
    loss: Value = None
    try:
        loss = _last_loss(run)
    except ValueError as error:
        now, reason = State.FAILED, str(error)
    return RunStatus(
        run_id=planned.run_id,
        stage=planned.stage,
        state=now,
        optimizer=config.optimizer.name,
        global_batch_tokens=config.global_batch_tokens,
        peak_lr=config.optimizer.peak_lr,
        init_seed=config.init_seed,
        data_seed=config.data_seed,
        realized_tokens=config.realized_tokens,
        tokens_seen=seen,
        loss_nats=loss if isinstance(loss, float) else None,
        tokens_per_second=speed if running else None,
        seconds_left=(config.realized_tokens - seen) / speed if running and speed else None,
        reason=reason,
    )


def _last_loss(run: RunFolder) -> Value:
    """Return the last validation loss: of the averaged weights where there are any, as the targets are read."""
    rows = read_rows(run.evaluations)
    if not rows:
        return None
    averaged = rows[-1]["val_loss_averaged_nats"]
    return rows[-1]["val_loss_nats"] if averaged is None else averaged


@cache
def _config(run: RunFolder) -> RunConfig:
    """Read a configuration once: that of a run_id never changes."""
    return read_run(run)


def _progress(run: RunFolder) -> dict[str, Any]:
    """Return the last progress; a display must not fall over a file that is missing or damaged."""
    try:
        return read_json(run.progress)
    except (OSError, ValueError):
        return {}


def _cell_in_words(runs: Sequence[RunStatus]) -> str:
    if not runs:
        return "–"
    counts = Counter(run.state for run in runs)
    return "\n".join(_styled(each, f"{counts[each]} {each}") for each in State if counts[each])


def _styled(state: State, text: str) -> str:
    style = _STYLES.get(state)
    return f"[{style}]{text}[/]" if style else text
