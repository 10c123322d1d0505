"""A disk that fills up, or that turns read-only, under jobs of a real Slurm: a clear error, and nothing is lost."""

from pathlib import Path

import pytest

from sweeps.cli import main
from sweeps.clusters.submission import submit
from sweeps.store import State
from tests.disk import Disk
from tests.slurm_cluster import SlurmCluster, wait_until
from tests.slurm_sweeps import assert_goes_on, done, log, one_run, slowly, submission, wait_for_end, wait_for_step
from tests.test_slurm_states import states_of

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize("words", ["No space left on device", "Read-only file system"])
def test_run_that_cannot_write_ends_its_job_with_a_clear_error_and_goes_on_later(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    """The error is a stand-in's, so that no disk is needed; the tests below have one."""
    folder = one_run(tmp_path)
    (folder.path / "behaviour.txt").write_text(f"refuse at step 20: {words}")
    [job] = submit(submission(folder, environment=slowly(0.1)))
    wait_for_end(slurm)
    assert f"cannot be written ({words}); make room or get the right to write" in log(folder, job)
    assert (done(folder), states_of(folder, capsys)) == ([False], [State.LOST])
    assert main(["logs", str(folder.path)]) == 0
    assert f"cannot be written ({words})" in capsys.readouterr().out
    (folder.path / "behaviour.txt").unlink()
    assert_goes_on(slurm, folder)


def test_run_on_a_disk_that_fills_up_goes_on_when_there_is_room(slurm: SlurmCluster, disk: Disk) -> None:
    folder = one_run(disk.path)
    submit(submission(folder, environment=slowly(0.1)))
    wait_for_step(folder, 15)
    disk.fill()
    wait_for_end(slurm)
    assert done(folder) == [False]
    disk.change("size=64m")
    assert_goes_on(slurm, folder)


def test_job_that_finds_its_folder_read_only_loses_nothing(
    slurm: SlurmCluster, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = one_run(disk.path)
    [job] = submit(submission(folder, sbatch={"hold": True}))
    disk.change("ro")
    slurm.run("scontrol", "release", job.job_id)
    wait_until(
        lambda: slurm.jobs()[job.job_id].state not in ("PENDING", "RUNNING", "COMPLETING"), 120, "the job to fail"
    )
    assert main(["status", str(folder.path)]) == 0
    assert "cannot be kept in" in capsys.readouterr().out
    disk.change("rw")
    slurm.cancel_all()
    assert_goes_on(slurm, folder, resumed=0)
