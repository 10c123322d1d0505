"""A job that a real Slurm stops, kills, preempts or loses goes on, with no step lost or repeated."""

from pathlib import Path

import pytest

from sweeps.clusters.submission import submit
from sweeps.store import SweepFolder
from tests.slurm_cluster import SlurmCluster, wait_until
from tests.slurm_sweeps import (
    assert_ended_well,
    assert_goes_on,
    assert_undisturbed,
    done,
    kill_process_of,
    log,
    one_run,
    resumes,
    runs,
    slowly,
    submission,
    wait_for_end,
    wait_for_step,
)

pytestmark = pytest.mark.slurm


@pytest.fixture
def one(tmp_path: Path) -> SweepFolder:
    return one_run(tmp_path)


def test_job_that_gets_its_signal_is_requeued_once_and_loses_no_step(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(0.1)))
    wait_for_step(one, 5)
    slurm.run("scancel", "--signal=USR2", "--batch", job.job_id)
    assert_ended_well(slurm, one)
    assert slurm.jobs()[job.job_id].restarts == 1


def test_requeue_from_outside_resumes_and_repeats_nothing(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(0.1)))
    wait_for_step(one, 15)
    slurm.run("scontrol", "requeue", job.job_id)
    wait_until(lambda: slurm.jobs()[job.job_id].restarts, 120, "the requeue")
    assert submit(submission(one)) == []
    assert_ended_well(slurm, one)
    assert slurm.jobs()[job.job_id].restarts == 1


def test_cancelled_job_saves_and_stays_cancelled_until_it_is_submitted_again(
    slurm: SlurmCluster, one: SweepFolder
) -> None:
    [job] = submit(submission(one, environment=slowly(0.1)))
    wait_for_step(one, 5)
    slurm.run("scancel", job.job_id)
    wait_for_end(slurm)
    assert (slurm.jobs()[job.job_id].state, slurm.jobs()[job.job_id].restarts) == ("CANCELLED", 0)
    [run] = runs(one)
    assert (run.checkpoint.exists(), run.failure.exists()) == (True, False)
    assert_goes_on(slurm, one)


def test_killed_job_is_submitted_again_and_goes_on(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(0.1)))
    wait_for_step(one, 15)
    kill_process_of(slurm, job.job_id, b"submitit.core._submit")
    wait_for_end(slurm)
    assert slurm.jobs()[job.job_id].state == "FAILED"
    assert_goes_on(slurm, one)


def test_killed_worker_is_replaced_within_its_job(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(0.1)))
    wait_for_step(one, 15)
    kill_process_of(slurm, job.job_id, b"spawn_main")
    assert_ended_well(slurm, one)
    assert (slurm.jobs()[job.job_id].state, slurm.jobs()[job.job_id].restarts) == ("COMPLETED", 0)
    assert "died by SIGKILL" in log(one, job)


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["low", "lownograce"])
def test_preempted_job_comes_back_and_loses_no_step(slurm: SlurmCluster, one: SweepFolder, partition: str) -> None:
    [job] = submit(submission(one, environment=slowly(0.2), partition=partition, sbatch={"nodelist": "n1"}))
    wait_for_step(one, 10)
    high = slurm.submit("#!/bin/sh\nsleep 1\n", "--partition=high", "--nodelist=n1", "--exclusive")
    wait_until(lambda: slurm.jobs()[high].state == "COMPLETED", 240, "the preemptor")
    assert_ended_well(slurm, one)
    assert slurm.jobs()[job.job_id].restarts == 1


@pytest.mark.slow
def test_run_of_a_dead_node_goes_on_elsewhere(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(0.2)))
    wait_for_step(one, 15)
    slurm.kill_node(slurm.jobs()[job.job_id].nodes)
    wait_until(lambda: slurm.jobs()[job.job_id].restarts, 240, "Slurm to notice")
    assert submit(submission(one)) == []
    assert_ended_well(slurm, one)


@pytest.mark.slow
def test_run_longer_than_its_time_limit_is_requeued_and_loses_no_step(slurm: SlurmCluster, one: SweepFolder) -> None:
    [job] = submit(submission(one, environment=slowly(1.2), max_minutes=1, signal_seconds=20))
    wait_for_end(slurm)
    assert done(one) == [True], log(one, job)
    assert slurm.jobs()[job.job_id].restarts >= resumes(one)[0] >= 1
    assert "TIMEOUT" not in slurm.jobs()[job.job_id].accounted
    assert_undisturbed(runs(one)[0])
