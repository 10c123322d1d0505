"""Time the steps of a sweep's runs, one after the other and alone: the constants of the cost model."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from harness.batch_plan import plan_run
from harness.config import MachineConfig, RunConfig
from harness.record import TIMINGS_JSON, Value, write_json
from sweeps.store import SweepFolder, is_running

if TYPE_CHECKING:
    from pathlib import Path


def time_sweep(
    runs: Iterable[RunConfig],
    machine: MachineConfig,
    folder: SweepFolder,
    repeats: int,
    say: Callable[[Mapping[str, Value]], None],
) -> "Path":
    """Time one run of each kind, tell each row to `say`, and write them all to `timings.json`; return its place.

    A run has the threads that it has in a slot of `critbatch run`.

    Raises: ValueError when runs of the sweep are being trained: what is timed beside them says nothing.
    """
    from harness.corpus import prepare
    from harness.timing import time_step

    if folder.manifest.exists() and is_running(folder):
        raise ValueError(f"{folder.path}: its runs are being trained; time them when nothing else runs")
    folder.path.mkdir(parents=True, exist_ok=True)
    in_a_slot = machine.model_copy(update={"threads": machine.threads or 1})
    rows = []
    for run, micro_batch_tokens in kinds(runs, machine):
        rows.append(time_step(run, in_a_slot, prepare(run.corpus), micro_batch_tokens, repeats))
        say(rows[-1])
    path = folder.path / TIMINGS_JSON
    write_json(path, {"rows": rows})
    return path


def as_line(row: Mapping[str, Value]) -> str:
    """Write a row for a person who waits."""
    micro_batch, optimizer = (
        f"{float(row[name] or 0) * 1e3:.3g} ms" for name in ("micro_batch_seconds", "optimizer_seconds")
    )
    return (
        f"{row['model']} {row['optimizer']}: {row['micro_batch_tokens']} tokens in {micro_batch}, optimizer {optimizer}"
    )


def kinds(runs: Iterable[RunConfig], machine: MachineConfig) -> list[tuple[RunConfig, int]]:
    """Return a run and a micro-batch for each model, optimizer and micro-batch size of the sweep."""
    found: dict[object, tuple[RunConfig, int]] = {}
    for run in runs:
        plan = plan_run(run.clock, run.model.sequence_length, machine.devices, machine.max_micro_batch_tokens)
        found.setdefault((_work(run), plan.micro_batch_tokens), (run, plan.micro_batch_tokens))
    return list(found.values())


def _work(run: RunConfig) -> tuple[object, ...]:
    """Return the settings of a run that decide how long a step takes, beside its micro-batch.

    Of an optimizer these are its kinds of work: a number takes no longer for being another.
    """
    kinds_of_work = tuple((name, value) for name, value in run.optimizer if isinstance(value, str | bool))
    clipped, averaged = run.max_grad_norm is not None, run.averaging.kind != "none"
    return run.model, kinds_of_work, run.precision, clipped, averaged
