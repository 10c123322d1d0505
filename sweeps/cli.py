"""The command `critbatch`. Verbs only; whatever is heavy is imported inside them."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.config import RunConfig
    from sweeps.plan import Plan, Speed
    from sweeps.spec import SweepSpec
    from sweeps.store import SweepFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return 0, 1 when runs failed, 2 for what the user has to change, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.verb(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has enough of it, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        print(f"critbatch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def plan(options: argparse.Namespace) -> int:
    """Print what a sweep would do; nothing is written but the corpus cache."""
    from sweeps.plan import as_json, as_table

    planned, *_ = _planned(options)
    if options.json:
        print(json.dumps(as_json(planned), indent=1))
    else:
        _print(as_table(planned))
    return 0


def run(options: argparse.Namespace) -> int:
    """Train what is missing, then write the report."""
    from sweeps.launch import report, run_folder

    folder, slots = _written(options)
    try:
        run_folder(folder, slots)
    except KeyboardInterrupt:
        print(f"Stopped. To go on: {_again('run', options)}")
        raise
    failed = _say_failures(folder)
    print(report(folder, _reference(folder)))
    return 1 if failed else 0


def submit(options: argparse.Namespace) -> int:
    """Queue jobs that train what is missing, and return at once."""
    from sweeps.launch import submit_local
    from sweeps.printing import counted

    folder, slots = _written(options)
    jobs = submit_local(folder, slots)
    ids = ", ".join(job.job_id for job in jobs)
    print(f"Submitted {counted(len(jobs), 'job')}: {ids} (logs in {folder.path / 'jobs'}).")
    print(f"critbatch status {folder.path}   shows how they do; then: critbatch report {folder.path}")
    return 0


def status(options: argparse.Namespace) -> int:
    """Print where the runs of one sweep stand, or of all in the results folder."""
    from sweeps.status import as_json, cells_table, failures, read_status, runs_table, sweep_folders
    from sweeps.store import State

    folders = [_started_folder(options)] if options.sweep else sweep_folders(Path(options.results))
    sweeps = [read_status(folder) for folder in folders]
    if options.json:
        print(json.dumps([as_json(sweep) for sweep in sweeps], indent=1))
        return 0
    if not sweeps:
        print(f"No sweep in {options.results}. To start one: critbatch run quickstart")
    for sweep in sweeps:
        shown = sweep.runs if options.runs else tuple(run for run in sweep.runs if run.state == State.RUNNING)
        _print(cells_table(sweep))
        if shown:
            _print(runs_table(shown))
        for line in failures(sweep.runs, sweep.folder):
            print(line)
    return 0


def report(options: argparse.Namespace) -> int:
    """Write the report of a sweep from its records."""
    from sweeps.launch import report as write

    folder = _started_folder(options)
    print(write(folder, _reference(folder)))
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
    sweep = argparse.ArgumentParser(add_help=False)
    sweep.add_argument("sweep", metavar="SWEEP", help="a preset, a YAML file, or the folder of a sweep")
    results = argparse.ArgumentParser(add_help=False)
    results.add_argument(
        "--results", metavar="DIR", default="results", help="where sweeps have their folders (default: results)"
    )
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="settings",
        help="change a key of the sweep (confirm.top=2) or fix one of its runs (global_batch_tokens=4096); repeatable",
    )  # fmt: skip
    slots = argparse.ArgumentParser(add_help=False)
    slots.add_argument("--slots", metavar="N", type=_count, help="runs at once (default: one per core, or per GPU)")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON instead of tables")

    verb = verbs.add_parser(
        "plan", parents=[sweep, settings, results, slots, as_json], help="what a sweep would do, before it does"
    )
    verb.add_argument(
        "--flops-per-second", metavar="X", type=_speed_value, help="of this machine, for the hours (default: measured)"
    )
    verb.set_defaults(verb=plan)
    verb = verbs.add_parser("run", parents=[sweep, settings, results, slots], help="train what is missing, then report")
    verb.set_defaults(verb=run)
    verb = verbs.add_parser("submit", parents=[sweep, settings, results, slots], help="the same through a job queue")
    verb.add_argument("--cluster", choices=["local"], required=True, help="local: this machine, in the background")
    verb.set_defaults(verb=submit)
    verb = verbs.add_parser("status", parents=[results, as_json], help="what is running, and why something is not")
    verb.add_argument("sweep", metavar="SWEEP", nargs="?", help="name or folder of a sweep (default: all)")
    verb.add_argument("--runs", action="store_true", help="list every run")
    verb.set_defaults(verb=status, settings=[])
    verb = verbs.add_parser(
        "report", parents=[sweep, settings, results], help="figures, tables and report.html from the records"
    )
    verb.set_defaults(verb=report)
    verb = verbs.add_parser("presets", help="list the sweeps that come with the package")
    verb.set_defaults(verb=presets)
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above zero, not {text!r}")
    return int(text)


def _speed_value(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above zero, as 2e10, not {text!r}")
    return value


def _planned(options: argparse.Namespace) -> "tuple[Plan, SweepSpec, list[RunConfig], SweepFolder]":
    """Read, expand and check the sweep; nothing is written but the corpus cache."""
    from sweeps.launch import check_machine, default_slots
    from sweeps.plan import make_plan, prepare_runs

    spec = _spec(options)
    check_machine(spec.machine)
    runs, check_budget = prepare_runs(spec)
    folder = _own_folder(options, spec.name)
    slots = options.slots or default_slots(spec.machine)
    return make_plan(spec, runs, check_budget, slots, _speed(options, folder)), spec, runs, folder


def _spec(options: argparse.Namespace) -> "SweepSpec":
    from sweeps.sweep_file import UnknownSweepError, read_spec

    try:
        return read_spec(options.sweep, options.settings)
    except UnknownSweepError as error:
        folder = Path(options.results) / options.sweep
        if (folder / "sweep.yaml").is_file():
            raise ValueError(f"no sweep {options.sweep!r} here; did you mean {str(folder)!r}?") from None
        raise error from None


def _speed(options: argparse.Namespace, folder: "SweepFolder") -> "Speed":
    from sweeps.plan import Speed, measured_speed
    from sweeps.store import records

    stated = getattr(options, "flops_per_second", None)
    return Speed(stated, "as stated") if stated else measured_speed(records(folder))


def _written(options: argparse.Namespace) -> "tuple[SweepFolder, int]":
    from sweeps.changes import changes_in_words, contents
    from sweeps.printing import counted
    from sweeps.store import is_running, write_sweep

    planned, spec, runs, folder = _planned(options)
    before = contents(folder)
    write_sweep(spec, runs, folder)
    print(f"{spec.name}: {planned.runs_in_words} on {counted(planned.slots, 'slot')}, in {folder.path}")
    for line in changes_in_words(before, contents(folder)):
        print(line)
    if is_running(folder):
        print("Another critbatch is running this sweep; its runs are shared, and times measured now are slower.")
    return folder, planned.slots


def _own_folder(options: argparse.Namespace, name: str) -> "SweepFolder":
    """Return the folder that SWEEP is, when it is one; else the one under --results with the sweep's name."""
    from sweeps.store import SweepFolder
    from sweeps.sweep_file import preset_names

    given = Path(options.sweep)
    is_folder = options.sweep not in preset_names() and (given / "sweep.yaml").is_file()
    return SweepFolder(given if is_folder else Path(options.results) / name)


def _started_folder(options: argparse.Namespace) -> "SweepFolder":
    """Return the folder of a sweep that was started: SWEEP itself, that name under --results, or that of its file."""
    from sweeps.store import SweepFolder

    for path in (Path(options.sweep), Path(options.results) / options.sweep):
        if (path / "sweep.json").is_file() and not options.settings:
            return SweepFolder(path)
    return _own_folder(options, _spec(options).name)


def _reference(folder: "SweepFolder") -> Path:
    """Return where a published run of the same sweep would be."""
    return folder.path.parent / "reference" / folder.path.name


def _say_failures(folder: "SweepFolder") -> list[str]:
    from sweeps.status import failures, read_status

    failed = failures(read_status(folder).runs, folder.path)
    print("\n".join(failed), file=sys.stderr, end="\n" if failed else "")
    return failed


def _again(verb: str, options: argparse.Namespace) -> str:
    settings = [part for setting in options.settings for part in ("--set", setting)]
    return shlex.join(["critbatch", verb, options.sweep, "--results", options.results, *settings])


def _print(table: object) -> None:
    from rich.console import Console

    # A file or a pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    sys.exit(main())
