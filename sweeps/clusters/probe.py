"""A job of a minute that looks at what every other job will need: code, packages, devices, clock, files and locks."""

import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from harness.origin import installed_packages
from harness.record import read_json, write_json
from sweeps.clusters import slurm
from sweeps.clusters.finding import Finding, Verdict
from sweeps.clusters.profile import ClusterProfile
from sweeps.clusters.sbatch import Request, sbatch
from sweeps.clusters.snapshot import take_snapshot
from sweeps.printing import counted

#: Packages whose version changes numbers, or whether a record can be read.
PACKAGES = ("torch", "lightning", "numpy", "polars", "pydantic", "submitit")
LARGEST_SKEW_SECONDS = 5.0


@dataclass(frozen=True)
class Probe:
    """The test job: it writes what a node sees into `folder`/answer.json; plain values only, as it is pickled."""

    folder: str
    accelerator: str

    def __call__(self) -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the limit is near from the start
        folder = Path(self.folder)
        write_json(folder / "answer.json", {"time": time.time()} | _node(folder, self.accelerator))


def run_probe(profile: ClusterProfile, results: Path, wait_seconds: float) -> Iterator[Finding]:
    """Yield what a test job finds that waits `wait_seconds` in the queue at most."""
    with _folder(results) as folder, (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        probe, submitted_at = Probe(str(folder), profile.accelerator), time.time()
        request = Request(profile, "critbatch-doctor", 1, take_snapshot(folder))
        job_id = sbatch(request, folder / "jobs", [probe])
        try:
            ended = _wait((folder / "answer.json").exists, job_id, wait_seconds)
        finally:
            with suppress(slurm.SlurmError):
                slurm.command("scancel", job_id)
        if ended is not None:
            yield Finding("test job", "bad", *_why_not(ended, folder, job_id, wait_seconds))
            return
        seconds = time.time() - submitted_at
        answer = read_json(folder / "answer.json")
        yield Finding("test job", "good", f"job {job_id} answered from {answer['host']} after {seconds:.0f} s")
        yield from _diagnosis(profile, folder, answer, submitted_at)


@contextmanager
def _folder(results: Path) -> Iterator[Path]:
    """Make a folder among the results for the test, and remove it after."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        folder = Path(mkdtemp(prefix=".doctor-", dir=results)).absolute()
    except OSError as error:
        raise ValueError(f"{results} cannot be written ({error.strerror}); choose another with --results") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(answered: Callable[[], bool], job_id: str, seconds: float) -> slurm.Task | None:
    """Wait for the answer; return none, or the job as it was given up."""
    end = time.monotonic() + seconds
    while not answered():
        task = slurm.tasks([job_id])[job_id]
        if time.monotonic() > end or not task.is_live:
            time.sleep(1.0)  # a shared folder may show a file late
            return None if answered() else task
        time.sleep(0.5)
    return None


def _why_not(task: slurm.Task, folder: Path, job_id: str, seconds: float) -> tuple[str, str]:
    if task.state == "PENDING":
        seen = f"job {job_id} still waited after {seconds:.0f} s ({task.reason or 'no reason given'})"
        return seen, "a longer --wait, another partition or qos, or what the reason says (man squeue)"
    logs = [path.read_text(errors="replace").splitlines() for path in sorted((folder / "jobs").glob("*.out"))]
    last = next((line for lines in logs for line in reversed(lines) if line.strip()), None)
    if last is None:
        advice = f"the nodes must see {folder.parent}: choose a shared folder with --results"
        return f"job {job_id} ended as {task.state} and wrote nothing", advice
    return f"job {job_id} ended as {task.state}: {last}", "correct python, setup or environment in the profile"


def _node(folder: Path, accelerator: str) -> dict[str, Any]:
    """Return what this node sees."""
    import harness

    return {
        "host": os.uname().nodename,
        "python": sys.version.split()[0],
        "code": str(Path(harness.__file__).parents[1]),
        "packages": {name: installed_packages().get(name) for name in PACKAGES},
        "sees_lock": _sees_lock(folder / "lock"),
        "scontrol": shutil.which("scontrol"),
        "gpus": _gpus() if accelerator != "cpu" else None,
    }


def _sees_lock(path: Path) -> bool:
    """Tell whether the lock that the login node holds is held here too."""
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _diagnosis(profile: ClusterProfile, folder: Path, answer: dict[str, Any], submitted_at: float) -> Iterator[Finding]:
    yield _clock(answer["time"], submitted_at, time.time())
    yield _lock(answer["sees_lock"], folder.parent)
    yield _python(answer["python"])
    yield _packages(answer["packages"])
    yield _code(answer["code"], folder)
    if profile.requeue:
        yield _requeue(answer["scontrol"])
    if profile.accelerator != "cpu":
        yield _devices(profile, answer["gpus"])


def _clock(node: float, before: float, after: float) -> Finding:
    """Judge the node's time, which was read between `before` and `after`."""
    skew = max(before - node, node - after, 0.0)
    if skew > LARGEST_SKEW_SECONDS:
        at = datetime.fromtimestamp(node, UTC).isoformat(timespec="seconds")
        seen = f"it was {at} on the node, {skew:.0f} s off"
        return Finding("clock", "bad", seen, "have the nodes' clocks set (NTP): times in records and states would lie")
    return Finding("clock", "good", f"within the {after - before:.0f} s of the job")


def _lock(is_seen: bool, results: Path) -> Finding:
    if is_seen:
        return Finding("shared folder", "good", f"files and locks of {results} are seen by the node")
    advice = "two jobs could train one run at once: take a file system with flock (NFS 4, Lustre with -o flock)"
    return Finding("shared folder", "bad", f"the node does not see a lock held here in {results}", advice)


def _python(node: str) -> Finding:
    here = sys.version.split()[0]
    if node.split(".")[:2] != here.split(".")[:2]:
        return Finding("Python", "bad", f"{node} on the node, {here} here", "set python to the same interpreter")
    return Finding("Python", "good", node)


def _packages(node: dict[str, str | None]) -> Finding:
    here = installed_packages()
    other = {name: there for name, there in node.items() if there != here.get(name)}
    if other:
        verdict: Verdict = "bad" if None in node.values() else "warning"
        advice = "set python in the profile to an environment with the same packages"
        seen = "; ".join(f"{name} {there or 'missing'}, here {here.get(name)}" for name, there in other.items())
        return Finding("packages", verdict, seen, advice)
    return Finding("packages", "good", ", ".join(f"{name} {version}" for name, version in node.items()))


def _code(code: str, folder: Path) -> Finding:
    if not code.startswith(str(folder)):
        advice = "something puts it before PYTHONPATH: setup lines, or a sitecustomize of the environment"
        return Finding("code", "bad", f"the job imports {code}, not the snapshot that was queued", advice)
    return Finding("code", "good", "the snapshot that was queued is what runs")


def _requeue(scontrol: str | None) -> Finding:
    if scontrol is None:
        advice = "a job could not requeue itself: load Slurm in setup, or set requeue: false and submit again yourself"
        return Finding("requeue", "bad", "no scontrol on the node", advice)
    return Finding("requeue", "good", scontrol)


def _devices(profile: ClusterProfile, gpus: int | None) -> Finding:
    if gpus:
        return Finding("devices", "good", counted(gpus, "GPU"))
    if profile.accelerator == "gpu" or profile.gpus_per_device:
        return Finding(
            "devices", "bad", "no GPU in the job", "set gpus_per_device or gres, and check PyTorch's CUDA build"
        )
    return Finding("devices", "good", "no GPU; runs train on processors")
