"""What `status` says and `cancel` does while a real Slurm has the jobs. `pytest -m slurm` runs it."""

import json
from pathlib import Path

import pytest

from sweeps.cli import main
from sweeps.clusters import slurm as asking
from sweeps.clusters.queue import queued_jobs
from sweeps.clusters.submission import submit
from sweeps.store import SweepFolder
from tests.slurm_cluster import SlurmCluster, wait_until
from tests.slurm_sweeps import (
    assert_undisturbed,
    done,
    four_runs,
    one_run,
    resumes,
    runs,
    slowly,
    steps_done,
    submission,
    wait_for_end,
)
from tests.sweep_examples import started

pytestmark = pytest.mark.slurm


def status_of(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["status", str(folder.path), "--json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert status["problem"] is None
    listed: list[dict[str, str]] = status["runs"]
    return listed


def states_of(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [run["state"] for run in status_of(folder, capsys)]


def test_states_are_true_through_submission_cancel_and_a_second_submission(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking.ask, "__defaults__", (0.0,))
    folder = started(tmp_path / "two", machine={"accelerator": "cpu"}, grid={"global_batch_tokens": [256]})
    [job] = submit(submission(folder, runs_per_job=2, environment=slowly(0.2)))
    assert {run["state"] for run in status_of(folder, capsys)} <= {"queued", "running"}
    wait_until(lambda: max(map(steps_done, runs(folder))) >= 5, 90, "a run to reach step 5")
    assert sorted(run["state"] for run in status_of(folder, capsys)) == ["queued", "running"]
    [running] = [run for run in status_of(folder, capsys) if run["state"] == "running"]
    assert running["job"] == job.job_id

    assert main(["cancel", str(folder.path)]) == 0
    assert capsys.readouterr().out.startswith(f"Cancelled in Slurm: {job.job_id}")
    wait_for_end(slurm)
    assert [run["state"] for run in status_of(folder, capsys)] == ["cancelled", "cancelled"]

    submit(submission(folder, runs_per_job=2))
    assert {run["state"] for run in status_of(folder, capsys)} <= {"queued", "requeued", "running", "finished"}
    wait_for_end(slurm)
    assert done(folder) == [True, True]
    assert [run["state"] for run in status_of(folder, capsys)] == ["finished", "finished"]


def test_job_that_dies_before_its_run_begins_leaves_it_lost_with_the_reason_in_the_logs(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = one_run(tmp_path)
    [job] = submit(submission(folder, setup=("echo no such module >&2; exit 3",)))
    wait_for_end(slurm)
    [run] = status_of(folder, capsys)
    assert (run["state"], run["job"]) == ("lost", job.job_id)
    assert main(["logs", str(folder.path)]) == 0
    said = capsys.readouterr().out
    assert f"==> job {job.job_id} " in said
    assert said.splitlines()[-1] == "no such module"


def test_failed_run_is_retried_while_its_job_trains_the_others_and_none_runs_twice(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking.ask, "__defaults__", (0.0,))
    folder = four_runs(tmp_path)
    (folder.path / "behaviour.txt").write_text("fail")  # Muon's
    submit(submission(folder, runs_per_job=4, environment=slowly(0.15)))
    wait_until(lambda: "failed" in states_of(folder, capsys), 90, "a run to fail")
    (folder.path / "behaviour.txt").unlink()
    assert main(["retry", str(folder.path), "--failed"]) == 0
    assert "0 failed runs can be tried again" in capsys.readouterr().out  # their job is past them, and lives
    [again] = submit(submission(folder, runs_per_job=4))
    assert 1 <= len(again.tasks[0]) <= 2
    assert submit(submission(folder, runs_per_job=4)) == []
    wait_for_end(slurm)
    if submit(submission(folder)):  # what failed after the second submission
        wait_for_end(slurm)
    assert done(folder) == [True] * 4
    for run in runs(folder):
        assert_undisturbed(run)
    assert resumes(folder) == [0] * 4


def test_clean_leaves_a_running_job_alone_and_removes_all_of_it_once_it_is_over(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking.ask, "__defaults__", (0.0,))
    folder = four_runs(tmp_path)
    submit(submission(folder, environment=slowly(0.1)))
    wait_until(lambda: max(map(steps_done, runs(folder))) >= 5, 90, "a run to reach step 5")
    assert main(["clean", str(folder.path)]) == 0
    wait_for_end(slurm)
    assert done(folder) == [True] * 4
    assert len(list((folder.path / "jobs").iterdir())) > 8
    assert main(["clean", str(folder.path)]) == 0
    assert list((folder.path / "jobs").iterdir()) == []
    assert queued_jobs(folder.path) == []


def test_status_where_slurm_has_gone_keeps_its_last_answer_and_says_so(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking.ask, "__defaults__", (0.0,))
    folder = one_run(tmp_path)
    submit(submission(folder, sbatch={"hold": True}))
    assert states_of(folder, capsys) == ["queued"]
    gone = tmp_path / "slurm.conf"
    gone.write_text(slurm.configuration.read_text().replace(f"SlurmctldPort={slurm.ports[0]}", "SlurmctldPort=1"))
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(gone))
        patch.setattr(asking, "_ASK_SECONDS", 2.0)
        assert main(["status", str(folder.path)]) == 0
        said = capsys.readouterr().out
        assert "0 of 1 done, 1 queued" in said
        assert "Slurm did not answer: squeue" in said
        with pytest.raises(ValueError, match="not known what is in flight, so nothing is submitted"):
            submit(submission(folder))
        assert main(["cancel", str(folder.path)]) == 2
