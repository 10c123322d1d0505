"""Sweeps on a real Slurm: what is submitted runs once, whatever happens to it. `pytest -m slurm` runs all of it."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from harness.record import RunFolder, read_json, read_rows
from sweeps.cli import main
from sweeps.clusters.profile import ClusterProfile
from sweeps.clusters.queue import QueuedJob, queued_jobs
from sweeps.clusters.snapshot import PACKAGES
from sweeps.clusters.submission import Submission, submit
from sweeps.launch import stage_runs
from sweeps.plan import prepare_runs
from sweeps.spec import SweepSpec
from sweeps.speed import Speed
from sweeps.store import SweepFolder, failure_reason, is_claimed, is_missing, read_run, write_sweep
from tests.runs import TINY
from tests.slurm_cluster import SlurmCluster, SlurmError, wait_until
from tests.slurm_processes import processes_of
from tests.stepping import curve
from tests.sweep_examples import changed, started

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[1]
STEPS, REAL = "tests.stepping:train", "harness.train:train"
CLOCKS = {"train_seconds", "train_cpu_seconds", "eval_seconds", "other_seconds"}
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
UNKNOWN = Speed(None, "not measured")
STRIKES = ("USR2", "requeue", "cancel", "KILL job", "KILL worker")
PROFILE = ClusterProfile(name="test", max_minutes=10, signal_seconds=30, environment=ENVIRONMENT)


def submission(folder: SweepFolder, train: str = STEPS, runs_per_job: int = 1, **profile: Any) -> Submission:
    spec, chosen = folder.read_spec(), PROFILE.model_copy(update=profile)
    grid = stage_runs(folder, "grid")
    confirm_runs = len(spec.confirm.seeds) * len(grid) if spec.confirm else 0
    return Submission(folder, spec, chosen, grid, UNKNOWN, runs_per_job, confirm_runs, train)


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


def science(run: RunFolder) -> list[dict[str, Any]]:
    """The curve without its clocks: what must not depend on interruptions."""
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in read_rows(run.evaluations)]


def steps_done(run: RunFolder) -> int:
    try:
        return int(read_json(run.progress)["step"])
    except (OSError, ValueError):
        return 0


def wait_for_step(run: RunFolder, step: int) -> None:
    wait_until(lambda: steps_done(run) >= step, 90, f"{run.path.name} to reach step {step}")


def wait_for_end(slurm: SlurmCluster, seconds: float = 120) -> None:
    wait_until(lambda: not slurm.run("squeue", "--noheader"), seconds, "all jobs to end")


def log(folder: SweepFolder, job: QueuedJob, task: int = 0) -> str:
    return (folder.path / "jobs" / f"{job.task_ids[task]}_0_log.out").read_text()


def kill_process_of(slurm: SlurmCluster, job_id: str, words: bytes) -> None:
    """Kill the process of a job whose command line has the words."""
    here = {f"SLURM_JOB_ID={job_id}"}
    pids = [pid for pid, environment in processes_of(slurm.configuration).items() if here <= environment]
    [pid] = [pid for pid in pids if words in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")]
    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    """A sweep of four runs: AdamW and Muon, 64 and 16 steps each."""
    return started(tmp_path / "small", machine={"accelerator": "cpu"})


@pytest.fixture
def one(tmp_path: Path) -> SweepFolder:
    """A sweep of one run, of 64 steps."""
    return started(
        tmp_path / "one", machine={"accelerator": "cpu"}, grid={"global_batch_tokens": [256], "optimizer": ["muon"]}
    )


@pytest.fixture
def real_sweep(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SweepFolder]:
    """Return a function that writes the folder of one run that truly trains, in small steps."""
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))

    def write(path: Path, steps: int, **machine: Any) -> SweepFolder:
        corpus = {"source": "text", "paths": [str(text / "*.txt")], "tokenizer": "ascii", "max_epochs": 99}
        base = {key: TINY[key] for key in ("model", "schedule", "averaging", "evaluation")} | {"corpus": corpus}
        sweep = changed(
            base=base,
            optimizers={"muon": {"momentum": 0.9, "learning_rate": [0.02]}},
            grid={"global_batch_tokens": [256]},
            token_budget=256 * steps,
            machine={"accelerator": "cpu", "threads": 1, "checkpoint_every_seconds": 1000.0} | machine,
        )
        spec = SweepSpec.parse(sweep, source="real")
        folder = SweepFolder(path)
        write_sweep(spec, prepare_runs(spec)[0], folder)
        return folder

    return write


def test_submitted_sweep_finishes_and_a_resubmission_starts_nothing(slurm: SlurmCluster, folder: SweepFolder) -> None:
    jobs = submit(submission(folder))
    assert [len(job.tasks) for job in jobs] == [4]
    assert submit(submission(folder)) == []  # in flight
    wait_for_end(slurm)
    assert done(folder) == [True] * 4
    for run in runs(folder):
        assert_undisturbed(run)
    assert submit(submission(folder)) == []  # done
    assert {slurm.jobs()[task].state for task in jobs[0].task_ids} == {"COMPLETED"}
    assert [job.job_id for job in queued_jobs(folder.path)] == [jobs[0].job_id]


def test_job_that_gets_its_signal_is_requeued_once_and_loses_no_step(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(0.1)))
    [run] = runs(one)
    wait_for_step(run, 5)
    slurm.run("scancel", "--signal=USR2", "--batch", job.job_id)
    wait_for_end(slurm)
    assert (done(one), resumes(one), slurm.jobs()[job.job_id].restarts) == ([True], [1], 1)
    assert_undisturbed(run)


def test_requeue_from_outside_resumes_and_repeats_nothing(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(0.1)))
    [run] = runs(one)
    wait_for_step(run, 15)
    slurm.run("scontrol", "requeue", job.job_id)
    wait_until(lambda: slurm.jobs()[job.job_id].restarts, 30, "the requeue")
    assert submit(submission(one)) == []
    wait_for_end(slurm)
    assert (done(one), resumes(one), slurm.jobs()[job.job_id].restarts) == ([True], [1], 1)
    assert_undisturbed(run)


def test_cancelled_job_saves_and_stays_cancelled_until_it_is_submitted_again(
    slurm: SlurmCluster, one: SweepFolder
) -> None:
    [job] = submit(submission(one, environment=slowly(0.1)))
    [run] = runs(one)
    wait_for_step(run, 5)
    slurm.run("scancel", job.job_id)
    wait_for_end(slurm)
    assert (slurm.jobs()[job.job_id].state, slurm.jobs()[job.job_id].restarts) == ("CANCELLED", 0)
    assert run.checkpoint.exists()
    assert not run.failure.exists()
    assert len(submit(submission(one))) == 1
    wait_for_end(slurm)
    assert (done(one), resumes(one)) == ([True], [1])
    assert_undisturbed(run)


def test_killed_job_is_submitted_again_and_goes_on(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(0.1)))
    [run] = runs(one)
    wait_for_step(run, 15)
    kill_process_of(slurm, job.job_id, b"submitit.core._submit")
    wait_for_end(slurm)
    assert slurm.jobs()[job.job_id].state == "FAILED"
    wait_until(lambda: not is_claimed(run), 10, "the orphaned worker to save and leave")
    assert done(one) == [False]
    assert len(submit(submission(one))) == 1
    wait_for_end(slurm)
    assert (done(one), resumes(one)) == ([True], [1])
    assert_undisturbed(run)


def test_killed_worker_is_replaced_within_its_job(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(0.1)))
    [run] = runs(one)
    wait_for_step(run, 15)
    kill_process_of(slurm, job.job_id, b"spawn_main")
    wait_for_end(slurm)
    assert (slurm.jobs()[job.job_id].state, slurm.jobs()[job.job_id].restarts) == ("COMPLETED", 0)
    assert "died by SIGKILL" in log(one, job)
    assert_undisturbed(run)


@pytest.mark.parametrize("misbehaviour", ["fail", "die"])
def test_failing_run_does_not_touch_its_neighbours_in_the_job(
    slurm: SlurmCluster, folder: SweepFolder, misbehaviour: str
) -> None:
    (folder.path / "behaviour.txt").write_text(misbehaviour)
    [job] = submit(submission(folder, runs_per_job=4))
    assert [len(task) for task in job.tasks] == [4]
    wait_for_end(slurm)
    assert {read_run(run).optimizer.name: not is_missing(run) for run in runs(folder)} == {"adamw": True, "muon": False}
    reasons = {str(failure_reason(run)) for run in runs(folder) if is_missing(run)}
    assert all("the corpus has been moved" in reason or "SIGKILL" in reason for reason in reasons)
    assert slurm.jobs()[job.job_id].state == "FAILED"
    assert "2 of 4 runs failed" in log(folder, job)
    (folder.path / "behaviour.txt").write_text("")
    again = submit(submission(folder, runs_per_job=4))
    assert [len(task) for task in again[0].tasks] == [2]
    wait_for_end(slurm)
    assert done(folder) == [True] * 4


def test_confirmations_wait_for_the_grid_then_are_chosen_and_trained(slurm: SlurmCluster, tmp_path: Path) -> None:
    folder = started(tmp_path / "small", machine={"accelerator": "cpu"}, confirm={"seeds": [5]})
    grid, confirm = submit(submission(folder, environment=slowly(0.01)))
    assert (grid.stage, confirm.stage, confirm.tasks) == ("grid", "confirm", ((),) * 4)
    assert slurm.jobs()[f"{confirm.job_id}_0"].state == "PENDING"
    wait_for_end(slurm)
    stages = [run.stage for run in folder.read_manifest().runs]
    assert stages == ["grid"] * 4 + ["confirm"] * 4
    assert done(folder) == [True] * 8
    chosen = [job for job in queued_jobs(folder.path) if job.stage == "confirm"]
    assert sorted(run_id for task in chosen[0].tasks for run_id in task) == sorted(
        run.run_id for run in folder.read_manifest().runs if run.stage == "confirm"
    )
    assert submit(submission(folder)) == []


def test_two_submits_at_once_train_no_run_twice(slurm: SlurmCluster, folder: SweepFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from sweeps.store import SweepFolder\n"
        "from sweeps.clusters.submission import submit; from tests.test_slurm import submission\n"
        "print(len(submit(submission(SweepFolder(Path(sys.argv[1]))))))"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    assert sorted(process.communicate(timeout=60)[0].strip() for process in both) == ["0", "1"]
    wait_for_end(slurm)
    assert [len(job.tasks) for job in queued_jobs(folder.path)] == [4]
    assert done(folder) == [True] * 4


def test_code_that_was_queued_runs_whatever_becomes_of_the_checkout(
    slurm: SlurmCluster, one: SweepFolder, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    for package in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys; from pathlib import Path; from sweeps.store import SweepFolder\n"
        "from sweeps.clusters.submission import submit; from tests.test_slurm import submission\n"
        "print(submit(submission(SweepFolder(Path(sys.argv[1])), sbatch={'hold': True}))[0].job_id)"
    )
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    job_id = subprocess.run(
        [sys.executable, "-c", code, str(one.path)],
        capture_output=True, text=True, check=True, cwd=tmp_path, env=environment,
    ).stdout.strip()  # fmt: skip
    for package in PACKAGES:
        (checkout / package / "__init__.py").write_text("raise RuntimeError('not the code that was queued')")
    (tmp_path / "analysis").mkdir()  # where the job starts: would come before the installed package
    slurm.run("scontrol", "release", job_id)
    wait_for_end(slurm)
    assert done(one) == [True], (one.path / "jobs" / f"{job_id}_0_log.out").read_text()
    [code_folder] = (one.path / "code").iterdir()
    assert read_json(runs(one)[0].run)["code_commit"] == code_folder.name


@pytest.mark.slow
def test_array_of_a_hundred_runs(slurm: SlurmCluster, tmp_path: Path) -> None:
    rates = [round(0.001 * (1 + number), 4) for number in range(100)]
    folder = started(
        tmp_path / "hundred",
        optimizers={"adamw": {"learning_rate": rates}},
        grid={"global_batch_tokens": [1024]},
        machine={"accelerator": "cpu"},
    )
    [job] = submit(submission(folder, environment=slowly(0.0)))
    assert len(job.tasks) == 100
    wait_for_end(slurm, 400)
    assert done(folder) == [True] * 100
    assert {slurm.jobs()[task].state for task in job.task_ids} == {"COMPLETED"}
    assert submit(submission(folder)) == []


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["low", "lownograce"])
def test_preempted_job_comes_back_and_loses_no_step(slurm: SlurmCluster, one: SweepFolder, partition: str) -> None:
    [job] = submit(submission(one, environment=slowly(0.2), partition=partition, sbatch={"nodelist": "n1"}))
    [run] = runs(one)
    wait_for_step(run, 10)
    high = slurm.submit("#!/bin/sh\nsleep 1\n", "--partition=high", "--nodelist=n1", "--exclusive")
    wait_until(lambda: slurm.jobs()[high].state == "COMPLETED", 90, "the preemptor")
    wait_for_end(slurm, 180)
    assert (done(one), resumes(one), slurm.jobs()[job.job_id].restarts) == ([True], [1], 1)
    assert_undisturbed(run)


@pytest.mark.slow
def test_run_of_a_dead_node_goes_on_elsewhere(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(0.2)))
    [run] = runs(one)
    wait_for_step(run, 15)
    slurm.kill_node(slurm.jobs()[job.job_id].nodes)
    wait_until(lambda: slurm.jobs()[job.job_id].restarts, 120, "Slurm to notice")
    assert submit(submission(one)) == []
    wait_for_end(slurm)
    assert (done(one), resumes(one)) == ([True], [1])
    assert_undisturbed(run)


@pytest.mark.slow
def test_run_longer_than_its_time_limit_is_requeued_and_loses_no_step(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(1.2), max_minutes=1, signal_seconds=20))
    wait_for_end(slurm, 400)
    assert done(one) == [True], log(one, job)
    assert slurm.jobs()[job.job_id].restarts >= resumes(one)[0] >= 1
    assert "TIMEOUT" not in slurm.jobs()[job.job_id].accounted
    assert_undisturbed(runs(one)[0])


@pytest.mark.slow
def test_training_that_is_stopped_twice_has_the_curve_of_an_undisturbed_one(
    slurm: SlurmCluster, real_sweep: Callable[..., SweepFolder], tmp_path: Path
) -> None:
    whole, folder = real_sweep(tmp_path / "whole", steps=1500), real_sweep(tmp_path / "stopped", steps=1500)
    submit(submission(whole, REAL))
    [job] = submit(submission(folder, REAL))
    [run] = runs(folder)
    for restarts in (1, 2):
        wait_for_step(run, steps_done(run) + 50)
        slurm.run("scancel", "--signal=USR2", "--batch", job.job_id)
        wait_until(lambda: slurm.jobs()[job.job_id].restarts == restarts, 60, "the requeue")  # noqa: B023
    wait_for_end(slurm, 400)
    assert (done(folder), resumes(folder)) == ([True], [2]), log(folder, job)
    assert science(run) == science(runs(whole)[0])


@pytest.mark.slow
def test_run_on_two_tasks_has_the_curve_of_one_and_resumes_bit_for_bit(
    slurm: SlurmCluster, real_sweep: Callable[..., SweepFolder], tmp_path: Path
) -> None:
    one = real_sweep(tmp_path / "one", steps=300)
    two, whole = (real_sweep(tmp_path / name, steps=300, devices=2) for name in ("two", "whole"))
    [job], *_ = (submit(submission(each, REAL, devices_per_node=1)) for each in (two, one, whole))
    wait_for_step(runs(two)[0], 10)
    assert slurm.jobs()[job.job_id].nodes == "n[1-2]"
    slurm.run("scancel", "--signal=USR2", "--batch", job.job_id)
    wait_for_end(slurm, 400)
    assert done(one) == done(two) == done(whole) == [True], log(two, job)
    assert resumes(two) == [1]
    assert science(runs(two)[0]) == science(runs(whole)[0])
    assert read_json(runs(two)[0].run)["num_devices"] == 2
    first, second = (losses_until(runs(each)[0], 60) for each in (one, two))  # then sums in another order show
    assert len(first) > 5
    assert second == pytest.approx(first, abs=5e-3)


def losses_until(run: RunFolder, step: int) -> list[float]:
    return [row["val_loss_nats"] for row in science(run) if row["step"] <= step]


def test_doctor_finds_a_good_cluster_ready_and_says_what_is_wrong_with_a_bad_one(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profiles = tmp_path / "critbatch" / "clusters"
    profiles.mkdir(parents=True)
    (profiles / "good.yaml").write_text("accelerator: cpu\nsignal_seconds: 10\n")
    (profiles / "lost.yaml").write_text("partition: man\n")
    (profiles / "broken.yaml").write_text("max_array_size: 50000\npython: /nowhere/python\n")
    assert main(["doctor", "--cluster", "good", "--results", str(tmp_path / "results")]) == 0
    said = capsys.readouterr().out
    assert {line.split(":")[0] for line in said.splitlines() if line.startswith("good  ")} == {
        f"good     {what}"
        for what in ("commands", "partition", "array size", "accounts", "test job", "clock", "shared folder", "Python",
                     "packages", "code", "requeue")
    }  # fmt: skip
    assert said.splitlines()[-1] == "good is ready: critbatch submit SWEEP --cluster good"
    assert list((tmp_path / "results").iterdir()) == []
    assert main(["doctor", "--cluster", "lost", "--results", str(tmp_path / "results")]) == 1
    said = capsys.readouterr().out
    assert "bad      partition: there is no man" in said
    assert "set partition to one of: main, high, low, lownograce" in said
    assert main(["doctor", "--cluster", "broken", "--results", str(tmp_path / "results")]) == 1
    said = capsys.readouterr().out
    assert "set max_array_size to 10001" in said
    assert "/nowhere/python: No such file or directory" in said
    assert slurm.run("squeue", "--noheader") == ""


@pytest.mark.slow
def test_array_under_chaos_finishes_every_run_once(slurm: SlurmCluster, tmp_path: Path) -> None:
    dice = random.Random(0)
    rates = [round(0.01 * (1 + number), 2) for number in range(20)]
    folder = started(
        tmp_path / "chaos",
        optimizers={"adamw": {"learning_rate": rates}},
        grid={"global_batch_tokens": [256]},
        machine={"accelerator": "cpu"},
    )
    struck: Counter[str] = Counter()
    jobs = submit(submission(folder, runs_per_job=2, environment=slowly(0.4)))
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(dice.uniform(0.5, 2.0))
        running = [name for name, job in slurm.jobs().items() if job.state == "RUNNING"]
        if not running:
            jobs += submit(submission(folder, runs_per_job=2, environment=slowly(0.4)))
            continue
        struck[strike(slurm, dice.choice(running), dice.choice(STRIKES))] += 1
    print(f"survived {dict(struck)}")
    for _ in range(5):
        wait_for_end(slurm, 300)
        wait_until(lambda: not any(map(is_claimed, runs(folder))), 20, "orphaned workers to leave")
        if not submit(submission(folder, runs_per_job=2, environment=slowly(0.0))):
            break
    assert done(folder) == [True] * 20
    assert sum(struck.values()) >= 15
    assert sum(resumes(folder)) > 5
    for run in runs(folder):
        assert_undisturbed(run)


def strike(slurm: SlurmCluster, task: str, how: str) -> str:
    """Hit a running task in one of several ways; return the way, or "missed" when it had just ended."""
    with suppress(SlurmError, ValueError, ProcessLookupError):
        if how == "requeue":
            slurm.run("scontrol", "requeue", task)
        elif how == "USR2":
            slurm.run("scancel", "--signal=USR2", "--batch", task)
        elif how == "cancel":
            slurm.run("scancel", task)
        else:
            words = b"submitit.core._submit" if how == "KILL job" else b"spawn_main"
            job_id = slurm.run("squeue", "--noheader", f"--jobs={task}", "--Format=JobID:").strip()
            kill_process_of(slurm, job_id, words)
        return how
    return "missed"
