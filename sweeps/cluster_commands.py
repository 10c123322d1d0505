"""The verbs that reach other machines: submit, doctor. Heavy imports stay inside."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.arguments import count
from sweeps.arguments import (
    budget_option,
    measured,
    own_folder,
    read_sweep,
    results_option,
    settings_option,
    slots_option,
    sweep_option,
    write_and_say,
    written,
)

if TYPE_CHECKING:
    from sweeps.clusters.arrays import Submission
    from sweeps.clusters.profile import ClusterProfile
    from sweeps.spec import SweepSpec


def add_verbs(verbs: Any) -> None:
    """Add the verbs to `verbs`, what `ArgumentParser.add_subparsers` returned."""
    cluster = argparse.ArgumentParser(add_help=False)
    cluster.add_argument(
        "--cluster", metavar="NAME", required=True,
        help="local: this machine, in the background; else the name of a cluster's profile",
    )  # fmt: skip
    verb = verbs.add_parser(
        "submit",
        parents=[sweep_option(), settings_option(), results_option(), slots_option(), budget_option(), cluster],
        help="the same through a job queue",
    )
    verb.add_argument(
        "--runs-per-job", metavar="K", type=count,
        help="runs that one job trains in turn (default: as many as last ten minutes)",
    )  # fmt: skip
    verb.add_argument("--dry-run", action="store_true", help="print the sbatch scripts and submit nothing")
    verb.set_defaults(verb=submit)
    verb = verbs.add_parser(
        "doctor", parents=[cluster, results_option()], help="whether a cluster is ready for sweeps, and what to fix"
    )
    verb.add_argument(
        "--wait", metavar="SECONDS", type=count, default=300, help="for the test job to start (default: 300)"
    )
    verb.set_defaults(verb=doctor)


def submit(options: argparse.Namespace) -> int:
    """Queue jobs that train what is missing, and return at once."""
    from sweeps.clusters.profile import read_profile

    profile = read_profile(options.cluster)
    if options.slots:
        profile = profile.model_copy(update={"max_running_jobs": options.slots})
    return _submit_local(options) if profile.kind == "local" else _submit_to_slurm(options, profile)


def doctor(options: argparse.Namespace) -> int:
    """Print what is found on a cluster, and what to do about it; return 1 when something has to be fixed."""
    from sweeps.clusters.doctor import examine
    from sweeps.clusters.profile import read_profile

    profile = read_profile(options.cluster)
    if profile.kind == "local":
        raise ValueError("local is this machine, which needs no queue; try it with: critbatch run quickstart")
    verdicts = []
    for finding in examine(profile, Path(options.results), options.wait):
        print(f"{finding.verdict:8} {finding.what}: {finding.seen}", flush=True)
        if finding.advice:
            print(f"{'':8} → {finding.advice}", flush=True)
        verdicts.append(finding.verdict)
    if "bad" in verdicts:
        print(f"\n{options.cluster} is not ready.")
        return 1
    print(f"\n{options.cluster} is ready: critbatch submit SWEEP --cluster {options.cluster}")
    return 0


def _submit_local(options: argparse.Namespace) -> int:
    for name, given in (("--dry-run", options.dry_run), ("--runs-per-job", options.runs_per_job)):
        if given:
            raise ValueError(f"{name} is for a cluster with a queue, and local is this machine; leave it out")
    from sweeps.launch import submit_local
    from sweeps.printing import counted

    folder, slots = written(options)
    jobs = submit_local(folder, slots)
    ids = ", ".join(job.job_id for job in jobs)
    print(f"Submitted {counted(len(jobs), 'job')}: {ids} (logs in {folder.path / 'jobs'}).")
    print(f"critbatch status {folder.path}   shows how they do; then: critbatch report {folder.path}")
    return 0


def _submit_to_slurm(options: argparse.Namespace, profile: "ClusterProfile") -> int:
    from sweeps.clusters.submission import scripts, submit
    from sweeps.printing import counted

    submission = _submission(options, profile)
    folder = submission.folder
    if options.dry_run:
        print("\n".join(scripts(submission)))
        return 0
    queued = submit(submission)
    for job in queued:
        runs = sum(map(len, job.tasks))
        what = counted(runs, "run") if runs else "confirmations"
        print(f"Submitted {what} in {counted(len(job.tasks), 'job')} of {job.minutes} minutes at most: {job.job_id}")
    if not queued:
        print("Nothing to submit: every run has its result or is in flight.")
    print(f"critbatch status {folder.path}   shows how they do; then: critbatch report {folder.path}")
    return 0


def _submission(options: argparse.Namespace, profile: "ClusterProfile") -> "Submission":
    """Plan the sweep for the cluster, and write its folder."""
    from sweeps.clusters.arrays import Submission
    from sweeps.plan import check_hours, make_plan, prepare_runs

    spec = _on(profile, read_sweep(options))
    profile.devices_on_a_node(spec.machine.devices)  # or a refusal, before anything is written
    runs, check_budget = prepare_runs(spec)
    folder = own_folder(options, spec.name)
    stated = profile.speed(spec.machine.devices)
    speed = next((each for each in (stated, measured(options, folder)) if each.is_known), stated)
    plan = make_plan(spec, runs, check_budget, slots=1, speed=speed)
    if options.budget_hours is not None:
        check_hours(plan, options.budget_hours)
    if not options.dry_run:
        write_and_say(spec, runs, folder, f"{plan.runs_in_words} for {profile.name}")
    confirmations = [row.work for row in plan.rows for _ in range(row.confirm_runs)]
    return Submission(folder, spec, profile, runs, speed, options.runs_per_job, confirmations)


def _on(profile: "ClusterProfile", spec: "SweepSpec") -> "SweepSpec":
    """Return the sweep with the accelerator that the cluster has, where its profile names one."""
    if profile.accelerator == "auto":
        return spec
    return spec.model_copy(update={"machine": spec.machine.model_copy(update={"accelerator": profile.accelerator})})
