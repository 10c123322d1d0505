"""Sweeps on the Slurm of the tests: how they are submitted, watched, struck, and compared with undisturbed ones."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.record import RunFolder, read_json, read_rows
from sweeps.clusters.arrays import Submission
from sweeps.clusters.profile import ClusterProfile
from sweeps.clusters.queue import QueuedJob
from sweeps.clusters.submission import submit
from sweeps.launch import stage_runs
from sweeps.plan import prepare_runs
from sweeps.spec import SweepSpec
from sweeps.speed import Speed
from sweeps.store import SweepFolder, is_claimed, is_missing, read_run, write_sweep
from sweeps.work import work_of
from tests.runs import TINY
from tests.slurm_cluster import SlurmCluster, wait_until
from tests.slurm_processes import processes_of
from tests.stepping import curve
from tests.sweep_examples import changed, started

ROOT = Path(__file__).parents[1]
STEPS, REAL = "tests.stepping:train", "harness.train:train"
CLOCKS = {"train_seconds", "train_cpu_seconds", "eval_seconds", "other_seconds"}
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
UNKNOWN = Speed(None, "not measured")
PROFILE = ClusterProfile(name="test", max_minutes=10, signal_seconds=30, environment=ENVIRONMENT)


def four_runs(place: Path) -> SweepFolder:
    """Start a sweep of AdamW and Muon with 64 and 16 steps each."""
    return started(place / "small", machine={"accelerator": "cpu"})


def one_run(place: Path) -> SweepFolder:
    """Start a sweep of one run, of 64 steps."""
    grid = {"global_batch_tokens": [256], "optimizer": ["muon"]}
    return started(place / "one", machine={"accelerator": "cpu"}, grid=grid)


def real_run(path: Path, text: Path, steps: int, **machine: Any) -> SweepFolder:
    """Start a sweep of one run that truly trains on the corpus of the tests, in small steps."""
    corpus = {"source": "text", "paths": [str(text / "*.txt")], "tokenizer": "ascii", "max_epochs": 99}
    base = {key: TINY[key] for key in ("model", "schedule", "averaging", "evaluation")} | {"corpus": corpus}
    sweep = changed(
        base=base,
        optimizers={"muon": {"momentum": 0.9, "learning_rate": [0.02]}},
        grid={"global_batch_tokens": [256]},
        token_budget=256 * steps,
        machine={"accelerator": "cpu", "threads": 1, "checkpoint_every_seconds": 1000.0} | machine,
    )
    spec, folder = SweepSpec.parse(sweep, source="real"), SweepFolder(path)
    write_sweep(spec, prepare_runs(spec)[0], folder)
    return folder


def submission(folder: SweepFolder, train: str = STEPS, runs_per_job: int = 1, **profile: Any) -> Submission:
    spec, chosen = folder.read_spec(), PROFILE.model_copy(update=profile)
    grid = stage_runs(folder, "grid")
    confirmed = [run for run in grid for _ in spec.confirm.seeds] if spec.confirm else []
    work = [work_of(run, spec.machine) for run in confirmed]
    return Submission(folder, spec, chosen, grid, UNKNOWN, runs_per_job, work, train)


def slowly(step_seconds: float) -> dict[str, str]:
    return ENVIRONMENT | {"STEP_SECONDS": str(step_seconds)}


def runs(folder: SweepFolder) -> list[RunFolder]:
    return [folder.run(run.run_id) for run in folder.read_manifest().runs]


def done(folder: SweepFolder) -> list[bool]:
    return [not is_missing(run) for run in runs(folder)]


def resumes(folder: SweepFolder) -> list[int]:
    return [read_json(run.run)["resumes"] for run in runs(folder)]


def assert_undisturbed(run: RunFolder) -> None:
    """Every step once, each following from the one before."""
    assert [row["val_loss_nats"] for row in read_rows(run.evaluations)] == curve(read_run(run))


def assert_ended_well(slurm: SlurmCluster, folder: SweepFolder, resumed: int = 1) -> None:
    """Once all jobs have ended, the one run of the sweep has its result, and its curve is as if nothing had been."""
    wait_for_end(slurm)
    assert (done(folder), resumes(folder)) == ([True], [resumed])
    assert_undisturbed(runs(folder)[0])


def assert_goes_on(slurm: SlurmCluster, folder: SweepFolder, resumed: int = 1) -> None:
    """Submitted again, the one run of the sweep goes on from where it was saved, and ends well."""
    wait_until(lambda: not any(map(is_claimed, runs(folder))), 60, "an orphaned worker to save and leave")
    assert len(submit(submission(folder))) == 1
    assert_ended_well(slurm, folder, resumed)


def science(run: RunFolder) -> list[dict[str, Any]]:
    """The curve without its clocks: what must not depend on interruptions."""
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in read_rows(run.evaluations)]


def steps_done(run: RunFolder) -> int:
    try:
        return int(read_json(run.progress)["step"])
    except (OSError, ValueError):
        return 0


def wait_for_step(folder: SweepFolder, step: int) -> None:
    """Wait until the one run of the sweep has come so far."""
    [run] = runs(folder)
    wait_until(lambda: steps_done(run) >= step, 300, f"{run.path.name} to reach step {step}")


def wait_for_checkpoint(folder: SweepFolder) -> None:
    [run] = runs(folder)
    wait_until(run.checkpoint.exists, 300, f"{run.path.name} to save its state")


def wait_for_end(slurm: SlurmCluster, seconds: float = 600) -> None:
    wait_until(lambda: not slurm.run("squeue", "--noheader"), seconds, "all jobs to end")


def log(folder: SweepFolder, job: QueuedJob, task: int = 0) -> str:
    return (folder.path / "jobs" / f"{job.task_ids[task]}_0_log.out").read_text()


def kill_process_of(slurm: SlurmCluster, job_id: str, words: bytes, *variables: str) -> None:
    os.kill(process_of(slurm, job_id, words, *variables), signal.SIGKILL)


def process_of(slurm: SlurmCluster, job_id: str, words: bytes, *variables: str) -> int:
    """Return the process of a job with these words in its command line, and these variables in its environment.

    Raises: LookupError where there is none, or are several.
    """
    here = {f"SLURM_JOB_ID={job_id}", *variables}
    pids = [pid for pid, environment in processes_of(slurm.configuration).items() if here <= environment]
    found = [pid for pid in pids if words in _command_line(pid)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} processes of job {job_id} with {words!r}")
    return found[0]


def _command_line(pid: int) -> bytes:
    with suppress(OSError):  # ended meanwhile
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    return b""
