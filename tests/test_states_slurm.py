"""What `status` says and `cancel` does while a real Slurm has the jobs. `pytest -m slurm` runs it."""

import json
from pathlib import Path

import pytest

from sweeps.cli import main
from sweeps.clusters import slurm as asking
from sweeps.clusters.submission import submit
from sweeps.store import SweepFolder
from tests.slurm_cluster import SlurmCluster, wait_until
from tests.sweep_examples import started
from tests.test_slurm import done, runs, slowly, steps_done, submission, wait_for_end

pytestmark = pytest.mark.slurm


def status_of(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["status", str(folder.path), "--json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert status["problem"] is None
    listed: list[dict[str, str]] = status["runs"]
    return listed


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
