"""What Slurm knows of a sweep's jobs: asked at most once in 30 s for each sweep, by whichever process comes first.

`squeue` is believed where it knows a task: it is never behind. What it has forgotten (a job stays there for minutes
after its end) is looked up in the accounts with `sacct`, once. A sweep whose tasks have all ended is not asked about.
A task that neither knows may be a wrong answer: it is asked about again. Jobs of another cluster are not asked about.
"""

import json
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from harness.record import write_json
from sweeps.clusters.queue import queue_folder, queue_lock, queued_jobs

ASK_EVERY_SECONDS = 30.0

#: A job in any other state waits, runs, or is about to.
ENDED = frozenset(("CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT", "UNKNOWN"))

#: What ends a job only once it is left to the accounts: till then Slurm may be about to requeue it.
MAY_RETURN = frozenset(("BOOT_FAIL", "NODE_FAIL", "PREEMPTED"))

#: How long a command may take; whoever asks where tasks stand waits for less.
_COMMAND_SECONDS = 60.0
_ASK_SECONDS = 15.0


@dataclass(frozen=True)
class Task:
    """A task of a job array in Slurm's words; UNKNOWN is one that Slurm has no trace of.

    `in_accounts` is one that is only there: it has left the queue.
    """

    state: str
    node: str = ""
    reason: str = ""
    restarts: int = 0
    in_accounts: bool = False

    @property
    def is_live(self) -> bool:
        return self.state not in ENDED and not (self.state in MAY_RETURN and self.in_accounts)

    @property
    def is_over(self) -> bool:
        """Whether it need not be asked about again."""
        return not self.is_live and self.state != "UNKNOWN"


@dataclass(frozen=True)
class Answer:
    """The tasks of a sweep by their id, when Slurm was asked, and why it did not answer where it did not."""

    tasks: dict[str, Task]
    asked_at: float
    problem: str | None = None

    def is_live(self, task: str) -> bool:
        return task in self.tasks and self.tasks[task].is_live


class SlurmError(ValueError):
    """A Slurm command that is missing, refuses, or does not answer."""


def ask(sweep: Path, max_age_seconds: float = ASK_EVERY_SECONDS) -> Answer:
    """Return where the sweep's tasks stand, from an answer at most `max_age_seconds` old.

    When Slurm does not answer, the last answer stands, with the problem in words, and as long before it is asked again.
    """
    wanted = {task: job.slurm_cluster for job in queued_jobs(sweep) if job.kind == "slurm" for task in job.task_ids}
    if not wanted:
        return Answer({}, time.time())
    if _is_good(before := _read(sweep), wanted, max_age_seconds):
        return before
    try:
        with queue_lock(sweep, ".slurm.lock"):  # others wait for this answer instead of asking too
            if not _is_good(before := _read(sweep), wanted, max_age_seconds):
                before = _asked(sweep, wanted, before)
    except OSError as error:  # a full disk, or somebody else's sweep, which one may only read
        problem = f"it was not asked, its answer cannot be kept in {queue_folder(sweep)} ({error.strerror})"
        return replace(before, problem=problem)
    return before


def command(*words: str, seconds: float = _COMMAND_SECONDS) -> str:
    """Run a Slurm command and return what it prints. Raises: SlurmError in the command's own words."""
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{words[0]} is not on the PATH; go to a machine of the cluster") from None
    except OSError as error:
        raise SlurmError(f"{words[0]} cannot be run ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} did not answer within {seconds:g} s; try again later") from None
    if result.returncode != 0:
        said = " ".join((result.stderr or result.stdout).split())
        raise SlurmError(f"{words[0]}: {said or f'exit status {result.returncode}'}")
    return result.stdout


def cluster_name() -> str | None:
    """Return the name of the cluster whose Slurm answers here; none where it does not say."""
    try:
        printed = command("scontrol", "show", "config", seconds=_ASK_SECONDS)
    except SlurmError:
        return None
    named = re.search(r"^ClusterName\s*=\s*(\S+)", printed, re.MULTILINE)
    return named[1] if named else None


def _is_good(answer: Answer, wanted: Mapping[str, str | None], max_age_seconds: float) -> bool:
    """Say whether an answer is young enough, or final."""
    is_young = time.time() - answer.asked_at <= max_age_seconds
    if answer.problem or not wanted.keys() <= answer.tasks.keys():
        return is_young and answer.problem is not None
    return is_young or all(answer.tasks[task].is_over for task in wanted)


def _asked(sweep: Path, wanted: Mapping[str, str | None], before: Answer) -> Answer:
    """Ask about the tasks of `wanted`, each with its cluster, but for those that are over or another cluster's."""
    kept = {task: known for task, known in before.tasks.items() if task in wanted and known.state != "UNKNOWN"}
    asked = {task: cluster for task, cluster in wanted.items() if task not in kept or not kept[task].is_over}
    here = cluster_name() if any(asked.values()) else None
    away = {task: cluster for task, cluster in asked.items() if here and cluster and cluster != here}
    found: dict[str, Task] = {}
    problem = f"jobs of {', '.join(sorted(set(away.values())))} are not known to {here}; go there" if away else None
    try:
        found = tasks(sorted(asked.keys() - away.keys()))
    except SlurmError as error:
        problem = str(error)
    answer = Answer(kept | found, time.time(), problem)
    write_json(_cache(sweep), asdict(answer), durable=False)
    return answer


def tasks(wanted: Sequence[str]) -> dict[str, Task]:
    """Ask where these tasks stand, now. Raises: SlurmError when Slurm does not answer.

    What has left the queue is over, though the accounts may not say so yet, or ever.
    """
    if not wanted:
        return {}
    jobs = sorted({task.partition("_")[0] for task in wanted})
    queued = _squeue(jobs)
    forgotten = [task for task in wanted if task not in queued]
    accounted = _sacct(jobs) if forgotten else {}
    known = {task: found for task, found in accounted.items() if found.state in ENDED | MAY_RETURN} | queued
    return {task: known.get(task, Task("UNKNOWN")) for task in wanted}


def _squeue(jobs: Iterable[str]) -> dict[str, Task]:
    columns = "--Format=JobArrayID:|,State:|,NodeList:|,RestartCnt:|,Reason:|"
    words = ["squeue", f"--jobs={','.join(jobs)}", "--states=all", "--array", "--noheader", columns]
    try:
        printed = command(*words, seconds=_ASK_SECONDS)
    except SlurmError as error:
        if "Invalid job id" in str(error):  # all forgotten
            return {}
        raise
    found = {}
    for line in printed.splitlines():
        task, state, node, restarts, reason = line.split("|", 4)
        found[task] = Task(state, node, reason.rstrip("|").replace("None", ""), int(restarts or 0))
    return found


def _sacct(jobs: Iterable[str]) -> dict[str, Task]:
    words = ["sacct", "-XnP", f"--jobs={','.join(jobs)}", "--format=JobID,State,NodeList"]
    try:
        printed = command(*words, seconds=_ASK_SECONDS)
    except SlurmError as error:
        if "disabled" in str(error):  # a cluster without accounts
            return {}
        raise
    found = {}
    for line in printed.splitlines():
        task, state, node = line.split("|")
        found[task] = Task(state.split()[0], node, in_accounts=True)  # "CANCELLED by 0"
    return found


def _cache(sweep: Path) -> Path:
    return queue_folder(sweep) / ".slurm.json"


def _read(sweep: Path) -> Answer:
    try:
        content = json.loads(_cache(sweep).read_bytes())
        known = {task: Task(**fields) for task, fields in content["tasks"].items()}
        return Answer(known, content["asked_at"], content["problem"])
    except (OSError, ValueError, KeyError, TypeError):
        return Answer({}, 0.0)
