"""The verbs that choose their runs as they go: tune and cbs. Heavy imports stay inside."""

import argparse
from typing import TYPE_CHECKING, Any

from analysis.arguments import count, number
from sweeps.arguments import (
    budget_option,
    planned,
    print_table,
    results_option,
    settings_option,
    slots_option,
    sweep_option,
    write_and_say,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from harness.config import RunConfig
    from sweeps.added import Proposal
    from sweeps.store import SweepFolder
    from sweeps.tuning.cost import Outcome


def add_verbs(verbs: Any) -> None:
    """Add the verbs to `verbs`, what `ArgumentParser.add_subparsers` returned."""
    parents = [sweep_option(), settings_option(), results_option(), slots_option(), budget_option(), _limits_option()]
    verb = verbs.add_parser(
        "tune", parents=parents, help="refine the learning rates until each optimum is interior, at equal trials"
    )
    verb.add_argument(
        "--axis", metavar="KEY=V,V", action="append", default=[], dest="axes",
        help="tune this too, as optimizer.weight_decay=0.05,0.1,0.2; repeatable",
    )  # fmt: skip
    verb.add_argument(
        "--trials", metavar="N", type=count, help="runs of an optimizer at a batch, at most (default: 4 × the grid's)"
    )
    verb.set_defaults(verb=tune)
    verb = verbs.add_parser(
        "cbs", parents=parents, help="the critical batch size within a stated factor, by the most telling runs"
    )
    verb.add_argument(
        "--width", metavar="R", type=number, required=True,
        help="stop when the upper end of the 90 %% interval is at most R times the lower one, as 1.5",
    )  # fmt: skip
    verb.add_argument(
        "--optimizer", metavar="NAME", action="append", default=[], dest="optimizers",
        help="of this one only; repeatable (default: all of the sweep)",
    )  # fmt: skip
    verb.set_defaults(verb=cbs)


def cbs(options: argparse.Namespace) -> int:
    """Measure critical batch sizes; return 0 when every interval is as narrow as asked for, else 1."""
    from sweeps.tuning.cbs import STOP_LEVEL, next_runs, series_cells, write_finished
    from sweeps.tuning.cbs import cbs as measure
    from sweeps.tuning.knee import Goal

    if options.width <= 1:
        raise ValueError(
            f"--width {options.width:g}: it is the interval's upper end over its lower one, above 1; as --width 1.5"
        )
    plan, spec, runs, folder = planned(options)
    goal = Goal(options.width, STOP_LEVEL, plan.slots, spec.confirm.seeds if spec.confirm else ())
    series = series_cells(runs, options.optimizers)
    if options.dry_run:
        return _say_next(folder, [], lambda: next_runs(folder, series, goal, options.budget_tokens))
    write_finished(spec, runs, folder)
    print(f"{spec.name}: critical batch sizes within a factor of {options.width:g}, in {folder.path}")
    found = measure(folder, series, goal, options.budget_tokens, plan.slots)
    for each in found:
        print(each.in_words)
    return 0 if all(each.verdict == "ok" for each in found) else 1


def tune(options: argparse.Namespace) -> int:
    """Tune the sweep; return 0 when every cell is settled, else 1."""
    from sweeps.tuning.axes import read_axes
    from sweeps.tuning.cells import tuned_cells
    from sweeps.tuning.cost import in_words, is_settled
    from sweeps.tuning.tune import limits_of, next_runs
    from sweeps.tuning.tune import tune as run_tuning

    plan, spec, runs, folder = planned(options)
    axes = read_axes(options.axes, runs)
    limits = limits_of(spec, runs, folder, options.trials, options.budget_tokens)
    if options.dry_run:
        cells = tuned_cells(runs, tuple(axes))
        return _say_next(folder, runs, lambda: next_runs(folder, cells, axes, limits))
    write_and_say(spec, runs, folder, f"tuned from {plan.runs_in_words} on, at most {limits.trials} a cell")
    found = run_tuning(folder, runs, axes, limits, plan.slots)
    print_table(tuning_table(found))
    for line in in_words(found):
        print(line)
    print(f"Then, for fresh seeds at the best rates and the report: critbatch run {options.sweep}")
    return 0 if is_settled(found) else 1


def tuning_table(found: "Sequence[Outcome]") -> "Table":
    """Return a row for each cell."""
    from sweeps.printing import narrow_table

    table = narrow_table()
    for name in ("model", "optimizer"):
        table.add_column(name, no_wrap=True)
    for heading in ("batch\ntokens", "best rate", "90 %\ninterval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for heading in ("trials", "tokens", "full grid's\ntokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in found:
        table.add_row(
            each.context,
            ", ".join(filter(None, (each.optimizer, each.setting))),
            f"{each.global_batch_tokens:,}",
            "–" if each.optimum is None else f"{each.optimum:.3g}",
            "–" if each.low is None or each.high is None else f"{each.low:.3g} to {each.high:.3g}",
            each.verdict,
            f"{each.trials:,}",
            f"{each.tokens:,}",
            f"{each.full_grid_tokens:,}",
        )
    return table


def _limits_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--budget-tokens", metavar="N", type=count, help="tokens of all runs together, those that are finished included"
    )
    parser.add_argument("--dry-run", action="store_true", help="say which runs come next; nothing is written or run")
    return parser


def _say_next(folder: "SweepFolder", runs: "Sequence[RunConfig]", propose: "Callable[[], Sequence[Proposal]]") -> int:
    """Say which runs the command would train first: those that are listed and missing, else those of the next round."""
    from sweeps.added import added_runs
    from sweeps.printing import counted
    from sweeps.store import is_missing
    from sweeps.tuning.rounds import in_words

    listed = {run.run_id: run for run in [*runs, *added_runs(folder.path, runs)]}
    missing = [run for run_id, run in listed.items() if is_missing(folder.run(run_id))]
    if missing:
        tokens = sum(run.realized_tokens for run in missing)
        print(f"First the {counted(len(missing), 'run')} that the sweep lacks, of up to {tokens:,} tokens.")
        return 0
    proposals = propose()
    print(f"Next {counted(len(proposals), 'run')}." if proposals else "Nothing to do.")
    for line in in_words(proposals):
        print(line)
    return 0
