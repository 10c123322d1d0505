"""Confirmations that jobs choose when the grid is done: once, for all of them, and told where the grid is not whole."""

import json
from pathlib import Path

import pytest

from harness.config import MachineConfig
from harness.record import RunFolder
from sweeps import confirmations
from sweeps.cli import main
from sweeps.clusters.queue import QueuedJob, queued_jobs, remember
from sweeps.clusters.shares import Share, runs_of
from sweeps.confirmations import choose_confirmations, partly_chosen
from sweeps.store import SweepFolder, is_missing, read_machine, read_run
from tests.fake_training import finish
from tests.slurm_stand_in import StandIn
from tests.sweep_examples import started


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    """A sweep whose best rates are those of the runs with a result."""
    folder = started(tmp_path / "small", confirm={"seeds": [5]})
    monkeypatch.setattr(
        confirmations, "_runs_at_best_rates",
        lambda *_: {run.path.name for run in grid(folder) if not is_missing(run)},
    )  # fmt: skip
    return folder


def grid(folder: SweepFolder) -> list[RunFolder]:
    return [folder.run(run.run_id) for run in folder.read_manifest().runs if run.stage == "grid"]


def finish_all(runs: list[RunFolder]) -> None:
    for run in runs:
        finish(read_run(run), run)


def submitted(folder: SweepFolder, *sizes: int, choice: str = "abc") -> None:
    """Say that arrays of these sizes are to confirm."""
    for number, size in enumerate(sizes):
        job = {"cluster": "test", "kind": "slurm", "submitted_at": "2026-01-01T00:00:00+00:00", "minutes": 5}
        tasks = {"job_id": f"{9 + number}", "stage": "confirm", "tasks": [[]] * size, "choice": choice}
        remember(QueuedJob.parse(job | tasks, "test"), folder.path)


def share(number: int, of: int, choice: str = "abc") -> Share:
    return Share(choice, number, of, MachineConfig(threads=3))


def test_shares_of_one_choice_have_each_run_once_over_all_their_arrays(folder: SweepFolder) -> None:
    finish_all(grid(folder))
    submitted(folder, 2, 1)
    found = [runs_of(share(number, 3), folder) for number in (2, 0, 1)]
    chosen = [run.run_id for run in folder.read_manifest().runs if run.stage == "confirm"]
    assert sorted(run_id for each in found for run_id in each) == sorted(chosen)
    assert [len(each) for each in found] == [1, 2, 1]
    assert [job.tasks for job in queued_jobs(folder.path)] == [(found[1], found[2]), (found[0],)]


def test_first_share_chooses_for_all_whatever_becomes_of_the_grid_or_the_sweep_meanwhile(folder: SweepFolder) -> None:
    first, *others = grid(folder)
    finish_all([first])
    submitted(folder, 2)
    [run_id] = runs_of(share(0, 2), folder)
    finish_all(others)
    started(folder.path, confirm={"seeds": [5]}, machine={"devices": 2})
    assert runs_of(share(1, 2), folder) == ()
    assert runs_of(share(0, 2), folder) == (run_id,)
    assert [run.run_id for run in folder.read_manifest().runs if run.stage == "confirm"] == [run_id]


def test_confirmations_are_trained_as_they_were_queued(folder: SweepFolder) -> None:
    finish_all(grid(folder))
    submitted(folder, 1)
    for run_id in runs_of(share(0, 1), folder):
        assert read_machine(folder.run(run_id)).threads == 3


def test_choice_of_another_submission_is_its_own(folder: SweepFolder) -> None:
    finish_all(grid(folder))
    submitted(folder, 1)
    remember(queued_jobs(folder.path)[0].model_copy(update={"job_id": "20", "choice": "later"}), folder.path)
    runs_of(share(0, 1), folder)
    assert [any(job.tasks) for job in queued_jobs(folder.path)] == [True, False]


def test_choice_from_part_of_the_grid_is_told_until_it_is_made_again(
    folder: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    StandIn(tmp_path / "bin", monkeypatch)
    *done, lacking = grid(folder)
    finish_all(done)
    choose_confirmations(folder.read_spec(), folder)
    [line] = partly_chosen(folder)
    assert line.startswith(
        "Confirmations were chosen while 1 run of the grid had no result (115k muon at 1,024 tokens)"
    )
    assert main(["status", str(folder.path)]) == 0
    assert line in capsys.readouterr().out
    assert main(["status", str(folder.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["confirmations"] == line
    finish_all([lacking])
    choose_confirmations(folder.read_spec(), folder)
    assert partly_chosen(folder) == []
