"""Whether a cluster is ready for sweeps: its commands, partition and limits, then a test job on one of its nodes."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sweeps.clusters import slurm
from sweeps.clusters.finding import Finding
from sweeps.clusters.probe import run_probe
from sweeps.clusters.profile import ClusterProfile

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "srun")


def examine(profile: ClusterProfile, results: Path, wait_seconds: float) -> Iterator[Finding]:
    """Yield the findings one after the other; the test job waits `wait_seconds` in the queue at most."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        advice = "run critbatch on a login node of the cluster, or load its Slurm module"
        yield Finding("commands", "bad", f"not on the PATH: {', '.join(missing)}", advice)
        return
    yield Finding("commands", "good", ", ".join(COMMANDS))
    try:
        yield from _controller(profile)
        yield from run_probe(profile, results, wait_seconds)
    except ValueError as error:
        yield Finding("Slurm", "bad", str(error), "correct the cluster's profile, or ask its administrators")


def _controller(profile: ClusterProfile) -> Iterator[Finding]:
    config = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", slurm.command("scontrol", "show", "config"), re.MULTILINE))
    partitions = {
        each["PartitionName"]: each
        for each in map(_fields, slurm.command("scontrol", "show", "partition", "--oneliner").splitlines())
    }
    yield from _partition(profile, partitions)
    yield _array_size(profile, int(config.get("MaxArraySize", "1001")))
    yield _accounts()


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _partition(profile: ClusterProfile, partitions: dict[str, dict[str, str]]) -> Iterator[Finding]:
    name = profile.partition or next((each for each, of in partitions.items() if of.get("Default") == "YES"), None)
    if name is None or name not in partitions:
        seen = f"there is no {name}" if name else "the cluster has no default one"
        yield Finding("partition", "bad", seen, f"set partition to one of: {', '.join(partitions)}")
        return
    fields = partitions[name]
    if fields.get("State") != "UP":
        yield Finding("partition", "bad", f"{name} is {fields.get('State')}", "wait, or take another partition")
    limit = _minutes(fields.get("MaxTime", "UNLIMITED"))
    if limit is not None and limit < profile.max_minutes:
        seen = f"{name} ends jobs after {limit} minutes, the profile says {profile.max_minutes}"
        yield Finding("partition", "bad", seen, f"set max_minutes to {limit} or less")
    else:
        yield Finding("partition", "good", f"{name}, jobs of up to {profile.max_minutes} minutes")
    if "REQUEUE" in fields.get("PreemptMode", "") and int(fields.get("GraceTime") or 0) < profile.signal_seconds:
        seen = f"jobs on {name} may be preempted with {fields.get('GraceTime')} s of notice"
        advice = "fine where a checkpoint takes less; what is since the last one is trained again"
        yield Finding("preemption", "warning", seen, advice)


def _minutes(limit: str) -> int | None:
    """Return Slurm's [days-]hours:minutes:seconds in minutes; none where there is no limit."""
    if limit == "UNLIMITED":
        return None
    days, _, clock = limit.rpartition("-")
    hours, minutes, _ = (int(part) for part in clock.split(":"))
    return int(days or 0) * 24 * 60 + hours * 60 + minutes


def _array_size(profile: ClusterProfile, limit: int) -> Finding:
    if profile.max_array_size > limit:
        seen = f"MaxArraySize is {limit}, the profile says {profile.max_array_size}"
        return Finding("array size", "bad", seen, f"set max_array_size to {limit}")
    return Finding("array size", "good", f"arrays of up to {profile.max_array_size} jobs (the cluster: {limit})")


def _accounts() -> Finding:
    try:
        slurm.command("sacct", "--noheader", "--allocations", "--format=JobID")
    except slurm.SlurmError as error:
        advice = "states of jobs that left the queue are then read off their runs' files alone"
        return Finding("accounts", "warning", str(error), advice)
    return Finding("accounts", "good", "sacct answers")
