"""Real training in jobs of a real Slurm: stopped, resumed, on two tasks."""

from pathlib import Path

import pytest

from harness.record import RunFolder, read_json
from sweeps.clusters.submission import submit
from tests.slurm_cluster import SlurmCluster, wait_until
from tests.slurm_sweeps import (
    REAL,
    done,
    log,
    real_run,
    resumes,
    runs,
    science,
    steps_done,
    submission,
    wait_for_end,
    wait_for_step,
)

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def _prepared(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs find the corpus that is prepared here."""
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))


@pytest.mark.slow
def test_training_that_is_stopped_twice_has_the_curve_of_an_undisturbed_one(
    slurm: SlurmCluster, text: Path, tmp_path: Path
) -> None:
    whole, folder = (real_run(tmp_path / name, text, steps=1500) for name in ("whole", "stopped"))
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
    slurm: SlurmCluster, text: Path, tmp_path: Path
) -> None:
    one = real_run(tmp_path / "one", text, steps=300)
    two, whole = (real_run(tmp_path / name, text, steps=300, devices=2) for name in ("two", "whole"))
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
