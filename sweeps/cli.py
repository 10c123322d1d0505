"""The command `critbatch`. Verbs only; whatever is heavy is imported inside them."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import commands
from analysis.arguments import count, number
from sweeps import cluster_commands, optimizer_commands, run_commands
from sweeps.arguments import (
    budget_option,
    json_option,
    planned,
    print_table,
    results_option,
    settings_option,
    slots_option,
    started_folder,
    sweep_option,
    written,
)
from sweeps.tuning import commands as adaptive_commands
from sweeps.widths import commands as width_commands

if TYPE_CHECKING:
    from sweeps.store import SweepFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return 0, 1 when runs failed, 2 for what the user has to change, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.verb(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has enough of it, as in `| head`
        _settle_output()
        return 1
    except ValueError as error:
        print(f"critbatch: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        _settle_output()
        print(f"critbatch: {_in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def plan(options: argparse.Namespace) -> int:
    """Print what a sweep would do; nothing is written but the corpus cache."""
    from sweeps.plan_view import as_json, as_table

    the_plan, *_ = planned(options, trains_here=False)
    if options.json:
        print(json.dumps(as_json(the_plan), indent=1))
    else:
        print_table(as_table(the_plan))
    return 0


def run(options: argparse.Namespace) -> int:
    """Train what is missing, then write the report."""
    from sweeps.launch import report, run_folder

    folder, slots = written(options)
    try:
        run_folder(folder, slots)
    except KeyboardInterrupt:
        print(f"Stopped. To go on: {_again('run', options)}")
        raise
    failed = _say_failures(folder)
    print(report(folder, _reference(folder)))
    return 1 if failed else 0


def report(options: argparse.Namespace) -> int:
    """Write the report of a sweep from its records, or of outside tables, or of several sweeps together."""
    from sweeps.launch import report as write

    if len(options.paths) > 1 or commands.is_table(options.paths[0]):
        folder = Path(options.output or Path(options.results) / Path(options.paths[0]).stem)
        print(commands.report(options, folder))
        return 0
    if options.output:
        raise ValueError(f"--output {options.output}: the report of one sweep lies in its own folder; leave it out")
    options.sweep = options.paths[0]
    own = started_folder(options)
    print(write(own, _reference(own), commands.estimate_options(options), options.baseline, options.targets))
    return 0


def time_steps(options: argparse.Namespace) -> int:
    """Time a micro-batch and an optimizer step of each kind of run, alone, for the cost model of the frontier."""
    from sweeps.timing import as_line, time_sweep

    _, spec, runs, folder = planned(options)
    print(time_sweep(runs, spec.machine, folder, options.repeats, lambda row: print(as_line(row), flush=True)))
    return 0


def presets(options: argparse.Namespace) -> int:
    """List the sweeps that come with the package."""
    del options
    from sweeps.sweep_file import PRESETS, preset_names, read_spec

    for name in preset_names():
        print(f"{name:20} {read_spec(name).description}")
    print(f"\nTheir files, to copy and change, are in {PRESETS}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="critbatch",
        description="How far can the batch size be raised, and with which optimizer?",
        epilog="Start with: critbatch run quickstart",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    sweep, results, settings = sweep_option(), results_option(), settings_option()
    slots, budget, as_json = slots_option(), budget_option(), json_option()

    verb = verbs.add_parser(
        "plan", parents=[sweep, settings, results, slots, budget, as_json], help="what a sweep would do, before it does"
    )
    verb.add_argument(
        "--flops-per-second", metavar="X", type=number, help="of this machine, for the hours (default: measured)"
    )
    verb.add_argument(
        "--cluster", metavar="NAME", action="append", dest="clusters",
        help="hours on the devices of this cluster, as its profile has them; repeatable",
    )  # fmt: skip
    verb.set_defaults(verb=plan)
    verb = verbs.add_parser(
        "run", parents=[sweep, settings, results, slots, budget], help="train what is missing, then report"
    )
    verb.set_defaults(verb=run)
    cluster_commands.add_verbs(verbs)
    run_commands.add_verbs(verbs)
    optimizer_commands.add_verbs(verbs)
    adaptive_commands.add_verbs(verbs)
    width_commands.add_verbs(verbs)
    verb = verbs.add_parser(
        "report", parents=[commands.input_options(), settings], help="figures, tables and report.html from the records"
    )
    verb.add_argument("--output", metavar="DIR", help="for tables, or several sweeps (default: under --results)")
    verb.set_defaults(verb=report)
    commands.add_verbs(verbs)
    verb = verbs.add_parser(
        "time",
        aliases=["bench"],
        parents=[sweep, settings, results],
        help="seconds of its steps, nothing beside them: plans are calibrated by it",
    )
    verb.add_argument(
        "--repeats", metavar="N", type=count, default=50, help="steps that the median is over (default: 50)"
    )
    verb.set_defaults(verb=time_steps, slots=1)
    verb = verbs.add_parser("presets", help="list the sweeps that come with the package")
    verb.set_defaults(verb=presets)
    return parser


def _settle_output() -> None:
    """Discard what of the output cannot be written: Python would try again when it ends, and complain once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _in_words(error: OSError) -> str:
    from harness.failures import is_unwritable

    place = f"{error.filename}: " if error.filename else ""
    advice = "; make room, or get the right to it: what is complete is kept" if is_unwritable(error) else ""
    return f"{place}{error.strerror or error}{advice}"


def _reference(folder: "SweepFolder") -> Path:
    """Return where a published run of the same sweep would be."""
    return folder.path.parent / "reference" / folder.path.name


def _say_failures(folder: "SweepFolder") -> list[str]:
    from sweeps.status import blocked, failures, read_status

    runs = read_status(folder).runs
    failed = [*failures(runs, folder.path), *blocked(runs)]
    print("\n".join(failed), file=sys.stderr, end="\n" if failed else "")
    return failed


def _again(verb: str, options: argparse.Namespace) -> str:
    settings = [part for setting in options.settings for part in ("--set", setting)]
    return shlex.join(["critbatch", verb, options.sweep, "--results", options.results, *settings])


if __name__ == "__main__":
    sys.exit(main())
