"""The second stage of a sweep: the best rates of every cell of its grid, again on fresh seeds.

Whoever chooses holds a lock, and writes down what of the grid had no result yet: a choice from part of a grid is told,
and made again by the next `critbatch run` or `submit`.
"""

from collections.abc import Iterable
from pathlib import Path

from harness.config import RunConfig
from harness.frozen import Frozen
from harness.record import read_json, write_json
from sweeps.added import read_rounds
from sweeps.grid import on_fresh_seeds
from sweeps.printing import counted
from sweeps.spec import SweepSpec
from sweeps.store import SweepFolder, add_confirmations, is_missing, locked, read_run


class Choice(Frozen):
    """The runs that were chosen, and those of the grid that had no result then: `lacking`, of the grid's `cells`."""

    run_ids: tuple[str, ...]
    lacking: dict[str, str]


def choose_confirmations(spec: SweepSpec, folder: SweepFolder) -> list[RunConfig]:
    """Add the best rates of every cell, on fresh seeds, to the sweep; return them."""
    with locked(folder, ".confirmations.lock"):
        grid = _grid(folder)
        lacking = {run.run_id: _cell(run) for run in grid if is_missing(folder.run(run.run_id))}
        runs = best_on_fresh_seeds(spec, folder)
        add_confirmations(spec, runs, folder)
        choice = Choice(run_ids=tuple(run.run_id for run in runs), lacking=lacking)
        write_json(_place(folder), choice.model_dump(mode="json"))
    return runs


def best_on_fresh_seeds(spec: SweepSpec, folder: SweepFolder) -> list[RunConfig]:
    """Return the confirmations: the best rates of every cell of the grid, on fresh seeds."""
    assert spec.confirm is not None
    best = _runs_at_best_rates(folder.path, spec.confirm.top)
    picked = [run for run in _grid(folder) if run.run_id in best]
    return on_fresh_seeds(_with_whole_budgets(picked, folder), spec.confirm.seeds)


def partly_chosen(folder: SweepFolder) -> list[str]:
    """Return a line, when the confirmations were chosen while runs of the grid had no result; else none."""
    try:
        choice = Choice.parse(read_json(_place(folder)), source=str(_place(folder)))
    except (OSError, ValueError):
        return []
    if not choice.lacking:
        return []
    cells = list(dict.fromkeys(choice.lacking.values()))
    more = f" and {counted(len(cells) - 3, 'more cell')}" if len(cells) > 3 else ""
    return [
        f"Confirmations were chosen while {counted(len(choice.lacking), 'run')} of the grid had no result "
        f"({'; '.join(cells[:3])}{more}); once they have: critbatch run or submit chooses again"
    ]


def _grid(folder: SweepFolder) -> list[RunConfig]:
    return [read_run(folder.run(run.run_id)) for run in folder.read_manifest().runs if run.stage == "grid"]


def _cell(run: RunConfig) -> str:
    return f"{run.model_name} {run.optimizer.name} at {run.global_batch_tokens:,} tokens"


def _place(folder: SweepFolder) -> Path:
    return folder.path / "confirmations.json"


def _runs_at_best_rates(folder: Path, top: int) -> set[str]:
    """Return the ids of the runs at the best rates of each cell: choose, put aside, choose again."""
    from analysis.inputs.records import Records, load
    from analysis.quantities.learning_rates import choose_rates

    records = load(folder)
    best: set[str] = set()
    for _ in range(top):
        chosen = choose_rates(records).rename({"best_lr": "peak_lr"})
        best.update(records.runs.join(chosen, on=chosen.columns, how="semi")["run_id"])
        runs = records.runs.join(chosen, on=chosen.columns, how="anti")
        records = Records(records.manifest, runs, records.evaluations.join(runs, on="run_id", how="semi"))
    return best


def _with_whole_budgets(runs: Iterable[RunConfig], folder: SweepFolder) -> list[RunConfig]:
    """Return the runs with budgets of the sweep's own: rounds give less to runs that may stop early."""
    added = {run_id for each in read_rounds(folder.path) for run_id in each.reasons}
    budgets: dict[int, int] = {}
    for run in _grid(folder) if added else ():
        batch = run.global_batch_tokens
        budgets[batch] = max(run.token_budget, budgets.get(batch, 0))
    return [
        run.model_copy(update={"token_budget": budgets[run.global_batch_tokens]}) if run.run_id in added else run
        for run in runs
    ]
