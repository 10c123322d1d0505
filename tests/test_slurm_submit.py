"""What is submitted to a real Slurm runs once, with the code that was queued. `pytest -m slurm` runs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.record import read_json
from sweeps.clusters.queue import queued_jobs
from sweeps.clusters.snapshot import PACKAGES
from sweeps.clusters.submission import submit
from sweeps.store import SweepFolder, failure_reason, is_missing, read_run
from tests.slurm_cluster import SlurmCluster
from tests.slurm_sweeps import (
    ROOT,
    assert_undisturbed,
    done,
    four_runs,
    log,
    one_run,
    runs,
    slowly,
    submission,
    wait_for_end,
)
from tests.sweep_examples import started

pytestmark = pytest.mark.slurm


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return four_runs(tmp_path)


@pytest.fixture
def one(tmp_path: Path) -> SweepFolder:
    return one_run(tmp_path)


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
        "from sweeps.clusters.submission import submit; from tests.slurm_sweeps import submission\n"
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
        "from sweeps.clusters.submission import submit; from tests.slurm_sweeps import submission\n"
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
