"""What the verbs share: their common options, and what those options name: a sweep, its plan, its folder."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.arguments import count, number

if TYPE_CHECKING:
    from harness.config import MachineConfig, RunConfig
    from sweeps.plan import Plan
    from sweeps.spec import SweepSpec
    from sweeps.speed import Speed
    from sweeps.store import SweepFolder


def sweep_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("sweep", metavar="SWEEP", help="a preset, a YAML file, or the folder of a sweep")
    return parser


def results_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--results", metavar="DIR", default="results", help="where sweeps have their folders (default: results)"
    )
    return parser


def settings_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="settings",
        help="change a key of the sweep (confirm.top=2) or fix one of its runs (global_batch_tokens=4096); repeatable",
    )  # fmt: skip
    return parser


def slots_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--slots", metavar="N", type=count, help="runs at once (default: one per core, or per GPU)")
    return parser


def json_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def budget_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--budget-hours", metavar="H", type=number, help="refuse a sweep that may take more hours of devices than that"
    )
    return parser


def planned(
    options: argparse.Namespace, trains_here: bool = True
) -> "tuple[Plan, SweepSpec, list[RunConfig], SweepFolder]":
    """Read, expand and check the sweep; nothing is written but the corpus cache.

    Raises: ValueError, also when it `trains_here` and this machine has not the GPUs for that.
    """
    from sweeps.launch import check_machine, default_slots
    from sweeps.plan import check_hours, make_plan, prepare_runs

    spec = read_sweep(options)
    if trains_here:
        check_machine(spec.machine)
    runs, check_budget = prepare_runs(spec)
    folder = own_folder(options, spec.name)
    slots = options.slots or default_slots(spec.machine)
    speed, *others = (*_cluster_speeds(options, spec.machine), *_own_speeds(options, folder))
    plan = make_plan(spec, runs, check_budget, slots, speed, [each for each in others if each.is_known])
    if (budget := getattr(options, "budget_hours", None)) is not None:
        check_hours(plan, budget)
    return plan, spec, runs, folder


def read_sweep(options: argparse.Namespace) -> "SweepSpec":
    """Read the sweep that SWEEP and --set name."""
    from sweeps.sweep_file import UnknownSweepError, read_spec

    try:
        return read_spec(options.sweep, options.settings)
    except UnknownSweepError as error:
        folder = Path(options.results) / options.sweep
        if (folder / "sweep.yaml").is_file():
            raise ValueError(f"no sweep {options.sweep!r} here; did you mean {str(folder)!r}?") from None
        raise error from None


def measured(options: argparse.Namespace, folder: "SweepFolder") -> "Speed":
    """Return the speed as stated with --flops-per-second, else as measured on the sweep's steps or finished runs."""
    return _own_speeds(options, folder)[0]


def _own_speeds(options: argparse.Namespace, folder: "SweepFolder") -> "tuple[Speed, ...]":
    from harness.record import TIMINGS_JSON
    from sweeps.speed import Speed, measured_speeds
    from sweeps.store import records

    stated = getattr(options, "flops_per_second", None)
    timings: list[dict[str, Any]] = []
    if (folder.path / TIMINGS_JSON).exists():
        from analysis.inputs.timings import read_timings

        frame = read_timings(folder.path)
        timings = [] if frame is None else frame.to_dicts()
    found = measured_speeds(records(folder), timings)
    return (Speed(stated, "as stated"), *found) if stated else found


def _cluster_speeds(options: argparse.Namespace, machine: "MachineConfig") -> "tuple[Speed, ...]":
    """Return what the profiles of the clusters named for comparison say of their devices."""
    from sweeps.clusters.profile import read_profile

    return tuple(read_profile(name).speed(machine.devices) for name in getattr(options, "clusters", None) or ())


def written(options: argparse.Namespace) -> "tuple[SweepFolder, int]":
    """Write the sweep's folder, say what is new in it, and return it with the slots."""
    plan, spec, runs, folder = planned(options)
    write_and_say(spec, runs, folder, f"{plan.runs_in_words} on {_slots_in_words(plan.slots)}")
    return folder, plan.slots


def write_and_say(spec: "SweepSpec", runs: "list[RunConfig]", folder: "SweepFolder", in_words: str) -> None:
    """Write the sweep's folder and say what changed in it."""
    from sweeps.changes import changes_in_words, contents
    from sweeps.store import is_running, write_sweep

    before = contents(folder)
    write_sweep(spec, runs, folder)
    print(f"{spec.name}: {in_words}, in {folder.path}")
    for line in changes_in_words(before, contents(folder)):
        print(line)
    if is_running(folder):
        print("Another critbatch is running this sweep; its runs are shared, and times measured now are slower.")


def own_folder(options: argparse.Namespace, name: str) -> "SweepFolder":
    """Return the folder that SWEEP is, when it is one; else the one under --results with the sweep's name."""
    from sweeps.store import SweepFolder
    from sweeps.sweep_file import preset_names

    given = Path(options.sweep)
    is_folder = options.sweep not in preset_names() and (given / "sweep.yaml").is_file()
    return SweepFolder(given if is_folder else Path(options.results) / name)


def started_folder(options: argparse.Namespace) -> "SweepFolder":
    """Return the folder of a sweep that was started: SWEEP itself, that name under --results, or that of its file."""
    from sweeps.store import SweepFolder

    for path in (Path(options.sweep), Path(options.results) / options.sweep):
        if (path / "sweep.json").is_file() and not options.settings:
            return SweepFolder(path)
    return own_folder(options, read_sweep(options).name)


def print_table(table: object) -> None:
    """Print what rich can draw."""
    from rich.console import Console

    # A file or a pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _slots_in_words(slots: int) -> str:
    from sweeps.printing import counted

    return counted(slots, "slot")
