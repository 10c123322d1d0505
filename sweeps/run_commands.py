"""The verbs about the runs of a started sweep: status, logs, retry, cancel, clean. Heavy imports stay inside."""

import argparse
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.arguments import count
from sweeps.arguments import json_option, print_table, results_option, started_folder

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sweeps.run_status import RunStatus
    from sweeps.status import SweepStatus
    from sweeps.store import SweepFolder


def add_verbs(verbs: Any) -> None:
    """Add the verbs to `verbs`, what `ArgumentParser.add_subparsers` returned."""
    results, sweep = results_option(), argparse.ArgumentParser(add_help=False)
    sweep.add_argument("sweep", metavar="SWEEP", help="name or folder of a sweep that was started")
    _add_status(verbs, results)
    verb = verbs.add_parser("logs", parents=[sweep, results], help="how the logs of a run and of its job end")
    verb.add_argument("run", metavar="RUN", nargs="?", help="a run_id, or how one begins (default: all that failed)")
    verb.add_argument("--lines", metavar="N", type=count, default=20, help="of each log (default: 20)")
    verb.set_defaults(verb=logs, settings=[])
    verb = verbs.add_parser("retry", parents=[sweep, results], help="let failed runs be tried again")
    verb.add_argument("--failed", action="store_true", required=True, help="all runs that failed")
    verb.add_argument("--cluster", metavar="NAME", help="and submit what is missing there")
    verb.set_defaults(verb=retry, settings=[], slots=None, runs_per_job=None, dry_run=False, budget_hours=None)
    verb = verbs.add_parser(
        "cancel", parents=[sweep, results], help="stop the jobs of a sweep; what is being trained saves a checkpoint"
    )
    verb.set_defaults(verb=cancel, settings=[])
    verb = verbs.add_parser(
        "clean", parents=[sweep, results], help="remove what finished runs and ended jobs have left; never a result"
    )
    verb.add_argument("--orphans", action="store_true", help="and runs without a result that left the sweep")
    verb.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    verb.set_defaults(verb=clean, settings=[])


def _add_status(verbs: Any, results: argparse.ArgumentParser) -> None:
    verb = verbs.add_parser(
        "status", parents=[results, json_option()], help="what is running, and why something is not"
    )
    verb.add_argument("sweep", metavar="SWEEP", nargs="?", help="name or folder of a sweep (default: all)")
    verb.add_argument("--runs", action="store_true", help="list every run")
    verb.add_argument(
        "--state", metavar="S", action="append", default=[], dest="states",
        help="list the runs in this state, as failed or queued; repeatable",
    )  # fmt: skip
    verb.add_argument(
        "--optimizer", metavar="O", action="append", default=[], dest="optimizers", help="only this one; repeatable"
    )
    verb.add_argument("--watch", action="store_true", help="again every two seconds, till all have their results")
    verb.set_defaults(verb=status, settings=[])


def status(options: argparse.Namespace) -> int:
    """Print where the runs of one sweep stand, or of all in the results folder."""
    from sweeps.status import as_json

    _check(options)
    if options.watch:
        return _watch(options)
    gc.freeze()  # what was imported stays: no need to look for cycles in it, again and again, while runs are read
    sweeps = _read(options)
    if options.json:
        print(json.dumps([as_json(sweep, _listed(sweep, options, sweep.runs)) for sweep in sweeps], indent=1))
        return 0
    if not sweeps:
        print(f"No sweep in {options.results}. To start one: critbatch run quickstart")
    for sweep in sweeps:
        for table in _tables(sweep, options):
            print_table(table)
        for line in _remarks(sweep):
            print(line)
    return 0


def logs(options: argparse.Namespace) -> int:
    """Print how the logs of one run end, or those of all that failed."""
    from sweeps.run_logs import FAILED, job_log, last_lines
    from sweeps.status import read_status

    folder = started_folder(options)
    runs = read_status(folder).runs
    chosen = [_named(options.run, runs, folder)] if options.run else [run for run in runs if run.state in FAILED]
    if not chosen:
        print(f"No run has failed; for the log of another one: critbatch logs {options.sweep} RUN")
    of_jobs = {}
    for run in chosen:
        log = folder.run(run.run_id).log
        print(f"==> {run.run_id}: {run.state}{f', {run.reason}' if run.reason else ''} ({log})")
        print(last_lines(log, options.lines))
        if run.job:
            of_jobs[run.job] = job_log(run.job, folder)
    for job_id, log in of_jobs.items():  # one that many of them shared, once
        print(f"==> job {job_id} ({log})")
        print(last_lines(log, options.lines))
    return 0


def retry(options: argparse.Namespace) -> int:
    """Forget that runs have failed; with a cluster, submit them."""
    from sweeps.printing import counted
    from sweeps.states import read_queue
    from sweeps.upkeep import forget_failures

    folder = started_folder(options)
    queue = read_queue(folder.path)
    forgotten = forget_failures(folder, queue)
    print(f"{counted(len(forgotten), 'failed run')} can be tried again.")
    if queue.problem:
        print(f"Slurm did not answer, so those that it may still have are left: {queue.problem}")
    if options.cluster is None:
        if forgotten:
            print(f"Now: critbatch run {folder.path}, or critbatch submit {folder.path} --cluster NAME")
        return 0
    from sweeps.cluster_commands import submit

    options.sweep = str(folder.path)
    return submit(options)


def cancel(options: argparse.Namespace) -> int:
    """Stop whoever trains the sweep, or is about to; return 1 when somebody is out of reach."""
    from sweeps.clusters.local import withdraw
    from sweeps.printing import counted
    from sweeps.upkeep import cancel_jobs, stop_processes

    folder = started_folder(options)
    jobs = cancel_jobs(folder)
    withdrawn = withdraw(folder.path)
    stopped, elsewhere = stop_processes(folder, jobs)
    if jobs:
        print(f"Cancelled in Slurm: {', '.join(job.job_id for job in jobs)}")
    if withdrawn:
        print(f"Withdrawn before it began: {counted(len(withdrawn), 'job')} on this machine")
    if stopped:
        print(f"Asked to save and stop: process {', '.join(map(str, sorted(stopped)))}")
    for host in sorted(elsewhere):
        print(f"Runs are being trained on {host}; there: critbatch cancel {folder.path.absolute()}")
    if not (jobs or withdrawn or stopped or elsewhere):
        print("Nothing to cancel: no run is queued or being trained.")
    return 1 if elsewhere else 0


def clean(options: argparse.Namespace) -> int:
    """Remove what served to train, and is needed no more."""
    from sweeps.clusters.remains import find_remains, remove_remains
    from sweeps.printing import counted
    from sweeps.upkeep import leftovers, orphans, remove, size_bytes

    folder, verb = started_folder(options), "Would remove" if options.dry_run else "Removed"
    found = [*leftovers(folder), *(orphans(folder) if options.orphans else [])]
    megabytes = sum(map(size_bytes, found)) / 1e6
    found = found if options.dry_run else remove(found)
    remains = find_remains(folder) if options.dry_run else remove_remains(folder)
    if options.dry_run:
        print(*found, *remains.files, sep="\n", end="\n" if found or remains.files else "")
    print(f"{verb} {len(found):,} files and folders, {megabytes:,.1f} MB.")
    if remains.jobs or remains.files:
        files, queued = counted(len(remains.files), "file"), len(remains.jobs)
        print(f"{verb} {files} from jobs/ and {queued:,} from queue/, of jobs that are over.")
    if remains.problem:
        print(f"Slurm did not answer, so what jobs have left is kept: {remains.problem}")
    return 0


def _check(options: argparse.Namespace) -> None:
    from sweeps.store import State

    known = [str(each) for each in State]
    if unknown := [each for each in options.states if each not in known]:
        raise ValueError(f"--state {unknown[0]}: no such state; there are {', '.join(known)}")
    if options.watch and options.json:
        raise ValueError("--watch draws tables; leave out --json, or call it again and again")


def _read(options: argparse.Namespace) -> "list[SweepStatus]":
    from sweeps.status import read_status, sweep_folders

    folders = [started_folder(options)] if options.sweep else sweep_folders(Path(options.results))
    sweeps = [read_status(folder) for folder in folders]
    if not options.optimizers:
        return sweeps
    known = {run.optimizer for sweep in sweeps for run in sweep.runs}
    if unknown := set(options.optimizers) - known:
        raise ValueError(f"--optimizer {min(unknown)}: there are {', '.join(sorted(known)) or 'none'}")
    return [sweep.of(options.optimizers) for sweep in sweeps]


def _watch(options: argparse.Namespace) -> int:
    from sweeps.display import watch

    def picture() -> "tuple[RenderableType, bool]":
        from rich.console import Group

        sweeps = _read(options)
        tables = [part for sweep in sweeps for part in (*_tables(sweep, options), *_remarks(sweep))]
        return Group(*tables), all(sweep.is_over for sweep in sweeps)

    watch(picture)
    return 0


def _tables(sweep: "SweepStatus", options: argparse.Namespace) -> "list[RenderableType]":
    from sweeps.status import cells_table, runs_table
    from sweeps.store import State

    running = [run for run in sweep.runs if run.state == State.RUNNING]
    listed = _listed(sweep, options, sweep.runs if options.runs else running)
    return [cells_table(sweep), *([runs_table(listed)] if listed else [])]


def _listed(
    sweep: "SweepStatus", options: argparse.Namespace, otherwise: "list[RunStatus] | tuple[RunStatus, ...]"
) -> "list[RunStatus]":
    """Return the runs in the states that were asked for; `otherwise` where none were."""
    return [run for run in sweep.runs if run.state in options.states] if options.states else list(otherwise)


def _remarks(sweep: "SweepStatus") -> list[str]:
    from sweeps.clusters.local import died_before
    from sweeps.status import blocked, failures, jobs_in_words, stopped

    asked = [f"Slurm did not answer: {sweep.problem}"] if sweep.problem else []
    wrong = [*failures(sweep.runs, sweep.folder), *blocked(sweep.runs), *stopped(sweep.runs)]
    dead = [
        f"A job on this machine ended before it began; {sweep.folder / 'jobs' / f'{process}_0_log.err'} says why"
        for process in died_before(sweep.folder)
    ]
    return [*asked, *dead, *sweep.confirmations, *jobs_in_words(sweep.runs), *wrong]


def _named(name: str, runs: "tuple[RunStatus, ...]", folder: "SweepFolder") -> "RunStatus":
    found = [run for run in runs if run.run_id == name] or [run for run in runs if run.run_id.startswith(name)]
    if len(found) != 1:
        how_many = f"{len(found)} runs begin so" if found else "no run begins so"
        raise ValueError(f"{name}: {how_many}; critbatch status {folder.path} --runs --json lists them")
    return found[0]
