"""`critbatch tune`: the learning rate of every optimizer and batch until its optimum is interior, then further axes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from harness.config import RunConfig
from sweeps.added import Proposal
from sweeps.launch import pool_of, stage_runs, train_stage
from sweeps.pool import TRAIN
from sweeps.printing import counted
from sweeps.spec import SweepSpec
from sweeps.store import SweepFolder, is_missing
from sweeps.tuning.cells import TunedCell, by_cell, tuned_cells
from sweeps.tuning.cost import Outcome, outcomes
from sweeps.tuning.proposals import Bench, Limits, propose
from sweeps.tuning.rounds import run_rounds

#: Intervals are of this level, to cover 90 %: that runs are added until an interval is interior makes those of 90 %
#: cover 85 to 88 % (simulated: 3 rates and 2 seeds at 4 batches, noise of 3 to 20 %).
ADAPTIVE_LEVEL = 0.93

#: Without --trials, a cell may have this many times the runs that the sweep's grid has in it.
_TRIALS_OVER_GRID = 4

Axes = Mapping[str, Sequence[Any]]


def limits_of(
    spec: SweepSpec, runs: Sequence[RunConfig], folder: SweepFolder, trials: int | None, budget_tokens: int | None
) -> Limits:
    """Return the limits. Raises: ValueError when they do not even allow the sweep's own grid."""
    cells = tuned_cells(runs)
    check_protocols(runs)
    most = max(len(own) for own in by_cell(cells, runs))
    if trials is not None and trials < most:
        raise ValueError(
            f"--trials {trials}: the grid of {spec.name} already has {counted(most, 'run')} for an optimizer at a "
            f"batch; allow more, or give the sweep fewer rates or seeds"
        )
    of_grid = sum(run.realized_tokens for run in runs if is_missing(folder.run(run.run_id)))
    spent = sum(spent_tokens(folder, runs).values())
    if budget_tokens is not None and spent + of_grid > budget_tokens:
        raise ValueError(
            f"--budget-tokens {budget_tokens:,}: the grid of {spec.name} takes up to {of_grid:,} tokens beside the "
            f"{spent:,} that its finished runs took; raise it, or give the sweep fewer rates or seeds"
        )
    reserved = spec.confirm.seeds if spec.confirm else ()
    return Limits(trials or _TRIALS_OVER_GRID * most, budget_tokens, tuple(reserved), ADAPTIVE_LEVEL)


def tune(
    folder: SweepFolder, runs: Sequence[RunConfig], axes: Axes, limits: Limits, slots: int, train: str = TRAIN
) -> list[Outcome]:
    """Train, propose and train again until every cell is settled or a limit is reached; return what came out.

    `runs` is the grid of the sweep, which is listed in its folder. Raises: ValueError when a run fails.
    """
    cells = tuned_cells(runs, tuple(axes))
    with pool_of(folder, slots, train=train) as pool:
        run_rounds(
            folder,
            "tune",
            tuple(axes),
            propose=lambda: next_runs(folder, cells, axes, limits),
            train=lambda: train_stage(folder, "grid", pool),
        )
    return outcomes(read_bench(folder, cells, axes, limits), limits)


def next_runs(folder: SweepFolder, cells: Sequence[TunedCell], axes: Axes, limits: Limits) -> list[Proposal]:
    """Return what the next round adds to what the folder lists, all of which has a result."""
    bench = read_bench(folder, cells, axes, limits)
    return propose(bench, limits, sum(spent_tokens(folder, [run for own in bench.runs for run in own]).values()))


def read_bench(folder: SweepFolder, cells: Sequence[TunedCell], axes: Axes, limits: Limits) -> Bench:
    """Read the cells' runs and what they gave, at the hardest target of the sweep."""
    listed = by_cell(cells, stage_runs(folder, "grid"), tuple(axes))
    return Bench(cells, listed, targets_in(folder.path, min(folder.read_spec().targets_nats)), axes, limits.level)


def targets_in(folder: Path, target_loss_nats: float) -> pl.DataFrame:
    """Return the table `targets` of a sweep's grid stage at one loss; an empty one where nothing has been run."""
    from analysis.inputs.records import load
    from analysis.quantities.targets import targets

    if not any((folder / "runs").glob("*/run.json")):
        return targets_of_none()
    found = targets(load(folder))
    return found.filter((pl.col("target_loss_nats") == target_loss_nats) & (pl.col("stage") == "grid"))


def targets_of_none() -> pl.DataFrame:
    """Return the table `targets` without rows."""
    from analysis.schemas import TARGETS, table

    return table([], TARGETS)


def spent_tokens(folder: SweepFolder, runs: Sequence[RunConfig]) -> dict[str, int]:
    """Return the tokens that each run with a result took."""
    from sweeps.store import result_record

    records = {run.run_id: result_record(folder.run(run.run_id)) for run in runs}
    return {run_id: int(record["tokens_seen"] or 0) for run_id, record in records.items() if record}


def check_protocols(runs: Sequence[RunConfig]) -> None:
    """Raise ValueError for runs whose curves do not say how many tokens a loss takes."""
    from analysis.inputs.protocols import WITHOUT_CROSSINGS

    for run in runs:
        if run.protocol in WITHOUT_CROSSINGS:
            raise ValueError(
                f"{run.run_id}: of the protocol {run.protocol}, whose curves say nothing of the tokens to a loss; tune "
                "the rates of a sweep with schedule.kind: constant, then use them"
            )
