"""What is asked of Slurm, how often, and what is believed."""

import time
from pathlib import Path

import pytest

from sweeps.clusters import slurm
from sweeps.clusters.queue import QueuedJob, forget, queued_jobs, remember
from tests.slurm_stand_in import StandIn


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path / "bin", monkeypatch)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "sweep").mkdir()
    return tmp_path / "sweep"


def job(job_id: str, tasks: int = 2, cluster: str | None = None) -> QueuedJob:
    return QueuedJob(
        cluster="test", kind="slurm", job_id=job_id, submitted_at="2026-01-01T00:00:00+00:00", minutes=5, stage="grid",
        tasks=tuple((f"run-{task}",) for task in range(tasks)), slurm_cluster=cluster,
    )  # fmt: skip


def test_queue_returns_what_was_remembered_oldest_first(sweep: Path) -> None:
    for job_id in ("90", "100"):
        remember(job(job_id), sweep)
    assert queued_jobs(sweep) == [job("90"), job("100")]
    forget(job("90"), sweep)
    assert queued_jobs(sweep) == [job("100")]


def test_job_of_one_task_is_no_array() -> None:
    assert job("7").task_ids == ["7_0", "7_1"]
    assert job("7", tasks=1).task_ids == ["7"]


def test_slurm_is_not_asked_about_a_sweep_without_jobs(stand_in: StandIn, sweep: Path) -> None:
    assert slurm.ask(sweep).tasks == {}
    assert stand_in.calls("squeue") == []


def test_slurm_is_asked_once_in_a_while_and_not_at_all_once_every_task_has_ended(
    stand_in: StandIn, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(job("7"), sweep)
    stand_in.runs("7_0", "7_1")
    for _ in range(5):
        assert slurm.ask(sweep).is_live("7_1")
    assert len(stand_in.calls("squeue")) == 1
    later = slurm.time.time() + slurm.ASK_EVERY_SECONDS + 1
    monkeypatch.setattr(slurm.time, "time", lambda: later)
    stand_in.runs("7_0", "7_1", state="COMPLETED")
    for _ in range(5):
        assert not slurm.ask(sweep, max_age_seconds=0.0).is_live("7_1")
    assert len(stand_in.calls("squeue")) == 2
    remember(job("8", tasks=1), sweep)
    stand_in.runs("8")
    assert slurm.ask(sweep).is_live("8")
    assert stand_in.calls("squeue")[-1].startswith("--jobs=8 ")


def test_queue_is_believed_before_the_accounts_and_what_neither_knows_is_unknown(
    stand_in: StandIn, sweep: Path
) -> None:
    remember(job("7", tasks=3), sweep)
    stand_in.runs("7_0", state="PENDING")
    stand_in.says("sacct", "7_0|NODE_FAIL|n1\n7_1|CANCELLED by 0|n2\n")
    answer = slurm.ask(sweep)
    assert {task: known.state for task, known in answer.tasks.items()} == {
        "7_0": "PENDING", "7_1": "CANCELLED", "7_2": "UNKNOWN",
    }  # fmt: skip
    assert [task for task in answer.tasks if answer.is_live(task)] == ["7_0"]


@pytest.mark.parametrize("state", ["NODE_FAIL", "PREEMPTED"])
def test_job_that_slurm_may_requeue_is_live_until_only_the_accounts_know_it(
    stand_in: StandIn, sweep: Path, state: str
) -> None:
    remember(job("7", tasks=1), sweep)
    stand_in.runs("7", state=state)
    assert slurm.ask(sweep, 0.0).is_live("7")
    stand_in.runs()
    stand_in.says("sacct", f"7|{state}|n1\n")
    assert not slurm.ask(sweep, 0.0).is_live("7")


def test_answer_stands_when_slurm_is_silent_with_the_reason(stand_in: StandIn, sweep: Path) -> None:
    remember(job("7"), sweep)
    stand_in.runs("7_0", "7_1")
    before = slurm.ask(sweep)
    (stand_in.folder / "down").touch()
    after = slurm.ask(sweep, max_age_seconds=0.0)
    assert after.tasks == before.tasks
    assert after.problem == "squeue: slurm_load_jobs error: Unable to contact slurm controller"


def test_what_has_left_the_queue_is_over_though_the_accounts_have_it_running(stand_in: StandIn, sweep: Path) -> None:
    remember(job("7", tasks=1), sweep)
    stand_in.says("sacct", "7|RUNNING|n1\n")
    assert slurm.ask(sweep).tasks["7"].state == "UNKNOWN"


def test_slurm_that_does_not_answer_is_asked_once_in_a_while_too(
    stand_in: StandIn, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(job("7"), sweep)
    (stand_in.folder / "down").touch()
    answers = [slurm.ask(sweep) for _ in range(5)]
    assert len(stand_in.calls("squeue")) == 1
    assert {answer.problem for answer in answers} == {
        "squeue: slurm_load_jobs error: Unable to contact slurm controller"
    }
    remember(job("8"), sweep)
    assert slurm.ask(sweep).tasks == {}
    assert slurm.ask(sweep, max_age_seconds=0.0).problem
    assert len(stand_in.calls("squeue")) == 2
    (stand_in.folder / "down").unlink()
    stand_in.runs("7_0", "7_1", "8_0", "8_1")
    later = slurm.time.time() + slurm.ASK_EVERY_SECONDS + 1
    monkeypatch.setattr(slurm.time, "time", lambda: later)
    assert slurm.ask(sweep).is_live("8_1")
    assert slurm.ask(sweep).problem is None


def test_wrong_answer_of_slurm_is_not_believed_for_good(
    stand_in: StandIn, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(job("7"), sweep)
    answer = slurm.ask(sweep)  # neither squeue nor sacct knows the job
    assert answer.tasks["7_0"].state == "UNKNOWN"
    assert not answer.is_live("7_0")
    stand_in.runs("7_0", "7_1")
    assert slurm.ask(sweep) == answer
    later = slurm.time.time() + slurm.ASK_EVERY_SECONDS + 1
    monkeypatch.setattr(slurm.time, "time", lambda: later)
    assert slurm.ask(sweep).is_live("7_0")


def test_task_that_was_unknown_counts_as_unheard_of_once_slurm_is_silent(stand_in: StandIn, sweep: Path) -> None:
    remember(job("7", tasks=1), sweep)
    assert slurm.ask(sweep).tasks["7"].state == "UNKNOWN"
    (stand_in.folder / "down").touch()
    assert slurm.ask(sweep, max_age_seconds=0.0).tasks == {}


def test_jobs_of_another_cluster_are_not_asked_about(stand_in: StandIn, sweep: Path) -> None:
    remember(job("7", tasks=1, cluster="north"), sweep)
    remember(job("8", tasks=1, cluster="south"), sweep)
    stand_in.is_cluster("south")
    stand_in.runs("7", "8")  # 7 is somebody else's job there
    answer = slurm.ask(sweep)
    assert answer.tasks.keys() == {"8"}
    assert answer.problem == "jobs of north are not known to south; go there"
    assert stand_in.calls("squeue")[-1].startswith("--jobs=8 ")
    stand_in.is_cluster("north")
    stand_in.runs("7", state="COMPLETED")
    answer = slurm.ask(sweep, max_age_seconds=0.0)
    assert ({task: known.state for task, known in answer.tasks.items()}) == {"7": "COMPLETED", "8": "RUNNING"}
    stand_in.is_cluster("south")
    stand_in.runs("8")
    assert slurm.ask(sweep, max_age_seconds=0.0).problem is None  # what is over need not be asked about


@pytest.mark.parametrize("command", ["squeue", "sacct"])
def test_slurm_that_hangs_is_left_alone_after_some_seconds(
    stand_in: StandIn, sweep: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(slurm, "_ASK_SECONDS", 0.3)
    remember(job("7", tasks=1), sweep)
    (stand_in.folder / command).write_text("#!/bin/bash\nexec sleep 60\n")
    began = time.monotonic()
    answer = slurm.ask(sweep)
    assert time.monotonic() - began < 5
    assert (answer.tasks, answer.problem) == ({}, f"{command} did not answer within 0.3 s; try again later")


def test_missing_command_is_named(sweep: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    remember(job("7"), sweep)
    assert "squeue is not on the PATH" in str(slurm.ask(sweep).problem)
