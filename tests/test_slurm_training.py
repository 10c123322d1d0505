"""Real training in jobs of a real Slurm, on one task and on two: every number is that of one undisturbed process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.record import read_json
from sweeps.clusters.submission import submit
from sweeps.launch import run_folder
from sweeps.store import SweepFolder
from tests.slurm_cluster import SlurmCluster, wait_until
from tests.slurm_sweeps import (
    REAL,
    done,
    kill_process_of,
    log,
    real_run,
    resumes,
    runs,
    science,
    steps_done,
    submission,
    wait_for_checkpoint,
    wait_for_end,
    wait_for_step,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

#: On two cores 10 s and 40 s: Slurm takes half a minute to notice that a daemon is gone.
SHORT, LONG = 600, 2500

Curve = list[dict[str, Any]]
CurveOf = Callable[[int], Curve]


@pytest.fixture(autouse=True)
def _prepared(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs find the corpus that is prepared here."""
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))


@pytest.fixture(scope="module")
def one_process(text: Path, tmp_path_factory: pytest.TempPathFactory) -> CurveOf:
    """The curve of so many steps in one process, outside of Slurm."""
    curves: dict[int, Curve] = {}

    def curve(steps: int) -> Curve:
        if steps not in curves:
            curves[steps] = trained_here(sweep(tmp_path_factory.mktemp("one") / "sweep", text, steps, devices=1))
        return curves[steps]

    return curve


def sweep(path: Path, text: Path, steps: int, devices: int) -> SweepFolder:
    """Start a sweep of one run, whose micro-batches are the same on one device, which adds up two, and on two devices.

    A sum of two does not depend on its order: every number has to be the same. Other micro-batches have other sums, and
    Muon, which rounds to bfloat16, soon shows it.
    """
    machine = {"devices": devices, "max_micro_batch_tokens": 128, "checkpoint_every_seconds": 1.0}
    return real_run(path, text, steps, **machine)


def trained_here(folder: SweepFolder) -> Curve:
    run_folder(folder, slots=1)
    assert done(folder) == [True]
    return science(runs(folder)[0])


def test_training_that_is_stopped_twice_has_the_curve_of_an_undisturbed_one(
    slurm: SlurmCluster, text: Path, tmp_path: Path
) -> None:
    whole, folder = (real_run(tmp_path / name, text, steps=1500) for name in ("whole", "stopped"))
    submit(submission(whole, REAL))
    [job] = submit(submission(folder, REAL))
    [run] = runs(folder)
    for restarts in (1, 2):
        wait_for_step(folder, steps_done(run) + 50)
        slurm.run("scancel", "--signal=USR2", "--batch", job.job_id)
        wait_until(lambda: slurm.jobs()[job.job_id].restarts == restarts, 120, "the requeue")  # noqa: B023
    wait_for_end(slurm)
    assert (done(folder), resumes(folder)) == ([True], [2]), log(folder, job)
    assert science(run) == science(runs(whole)[0])


def test_two_processes_here_have_the_curve_of_one(text: Path, tmp_path: Path, one_process: CurveOf) -> None:
    """Without Slurm: the same two processes as in its tasks below."""
    assert trained_here(sweep(tmp_path / "two", text, SHORT, devices=2)) == one_process(SHORT)


def leave_alone(slurm: SlurmCluster, job_id: str) -> None:
    """Do nothing to a job."""


def signal_to_stop(slurm: SlurmCluster, job_id: str) -> None:
    slurm.run("scancel", "--signal=USR2", "--batch", job_id)


def kill_second_process(slurm: SlurmCluster, job_id: str) -> None:
    kill_process_of(slurm, job_id, b"sweeps.clusters.ranks", "SLURM_PROCID=1")


def kill_second_daemon(slurm: SlurmCluster, job_id: str) -> None:
    slurm.kill_daemon(nodes_of(slurm, job_id)[1])


def kill_first_node(slurm: SlurmCluster, job_id: str) -> None:
    """Kill the job's own process with its node, which is how the process on the other node notices."""
    slurm.kill_node(nodes_of(slurm, job_id)[0])


def nodes_of(slurm: SlurmCluster, job_id: str) -> list[str]:
    return slurm.run("scontrol", "show", "hostnames", slurm.jobs()[job_id].nodes).split()


@pytest.mark.parametrize(
    ("strike", "steps", "restarts", "resumed"),
    [
        (leave_alone, SHORT, 0, 0),
        (signal_to_stop, SHORT, 1, 1),
        (kill_second_process, SHORT, 0, 1),
        (kill_second_daemon, LONG, 1, 1),
        (kill_first_node, SHORT, 1, 1),
    ],
)
def test_run_on_two_nodes_has_the_curve_of_one_process(
    slurm: SlurmCluster, text: Path, tmp_path: Path, one_process: CurveOf,
    strike: Callable[[SlurmCluster, str], None], steps: int, restarts: int, resumed: int,
) -> None:  # fmt: skip
    folder = sweep(tmp_path / "two", text, steps, devices=2)
    [job] = submit(submission(folder, REAL, devices_per_node=1))
    [run] = runs(folder)
    wait_for_checkpoint(folder)
    assert len(nodes_of(slurm, job.job_id)) == 2
    strike(slurm, job.job_id)
    wait_for_end(slurm)
    assert done(folder) == [True], log(folder, job)
    assert (slurm.jobs()[job.job_id].restarts, resumes(folder)) == (restarts, [resumed])
    assert read_json(run.run)["num_devices"] == 2
    assert science(run) == one_process(steps)
